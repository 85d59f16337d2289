/* How one library's tensors are made and described, as Python sees it: Tensors, which tells nothing about it. */
#ifndef SHMTRANSPORT_TENSORS_TYPE_H
#define SHMTRANSPORT_TENSORS_TYPE_H

#include "views.h"

/* What an object of this type holds; NULL with a TypeError for any other object. */
const struct tensors *tensors_of(PyObject *object);

#endif
