/* A mapping as Python sees it: Mapping. */
#ifndef SHMTRANSPORT_MAPPING_TYPE_H
#define SHMTRANSPORT_MAPPING_TYPE_H

#include "module.h"

#include "mapping.h"

/* The mapping of an object of this type, held by that object, if count items of nbytes bytes lie in it, from an offset
 * on; NULL with an error set if they don't, or for any other object. */
struct mapping *mapping_with(PyObject *object, Py_ssize_t offset, Py_ssize_t count, size_t nbytes);

#endif
