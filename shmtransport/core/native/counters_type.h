/* Counters as Python sees them. */
#ifndef SHMTRANSPORT_COUNTERS_TYPE_H
#define SHMTRANSPORT_COUNTERS_TYPE_H

#include "module.h"

#include "counters.h"

/* What an object of this type, or of one derived from it, counts in; NULL with a TypeError for any other object. */
struct counters *counters_of(PyObject *object);

#endif
