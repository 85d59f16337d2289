/* Takes requests and replies: the values of a message that was looked at, with its tensors borrowed. */
#ifndef SHMTRANSPORT_DECODING_H
#define SHMTRANSPORT_DECODING_H

#include "module.h"

#include "inspection.h"

struct values {
    PyObject *arguments, *keywords; /* of a request: a tuple and a dict */
    PyObject *result;               /* of a reply */
    uint64_t tensor_bytes;
};

/* Whether this side's core can make all values, as far as this can be known before any is made. */
bool can_be_taken(const struct call *call, PyObject *borrows);

/* Make the values of a call that can be taken: 1. 0 where a tensor could not be borrowed after all; -1 with an error set.
 * In both cases the tensors are released. */
int take_values(const struct call *call, PyObject *borrows, struct values *values);

#endif
