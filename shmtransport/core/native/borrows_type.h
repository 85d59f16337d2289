/* A connection's borrows, for the decoding of its messages. */
#ifndef SHMTRANSPORT_BORROWS_TYPE_H
#define SHMTRANSPORT_BORROWS_TYPE_H

#include "module.h"

#include <stdbool.h>

#include "descriptor.h"
#include "views.h"

bool is_borrows(PyObject *object);

/* The first argument of all that follow must be one that is_borrows is true of. */

/* Whose tensors these are. */
const struct tensors *library_of(PyObject *borrows);

/* Whether a tensor, or also an array of it, can be made of what is described. */
bool can_be_borrowed(PyObject *borrows, const struct descriptor *descriptor, bool as_array);

/* A tensor, whose size is added to *nbytes; None for what can't be borrowed; NULL with an error set. */
PyObject *borrow_described(PyObject *borrows, const struct descriptor *descriptor, uint64_t *nbytes);

/* Whether the segment that it borrows from has been cut short. */
bool borrows_were_cut(PyObject *borrows);

#endif
