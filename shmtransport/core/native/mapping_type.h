/* A mapping as Python sees it: Mapping. */
#ifndef SHMTRANSPORT_MAPPING_TYPE_H
#define SHMTRANSPORT_MAPPING_TYPE_H

#include "module.h"

#include "mapping.h"

/* The mapping of an object of this type, held by that object; NULL with a TypeError for any other object. */
struct mapping *mapping_of(PyObject *object);

#endif
