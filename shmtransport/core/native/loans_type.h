/* A connection's loans, for the encoding of its messages. */
#ifndef SHMTRANSPORT_LOANS_TYPE_H
#define SHMTRANSPORT_LOANS_TYPE_H

#include "module.h"

#include <stdbool.h>

bool is_loans(PyObject *object);

/* Append the descriptor of a loan's tensor to a list, hold it, and tell its size: 1. For anything else 0, with nothing
 * done; -1 with an error set. The first argument must be one that is_loans is true of. */
int export_loan(PyObject *loans, PyObject *tensor, PyObject *out, int64_t *nbytes);

#endif
