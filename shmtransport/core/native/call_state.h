/* One call of a client, as core/calls.py's CallState. */
#ifndef SHMTRANSPORT_CALL_STATE_H
#define SHMTRANSPORT_CALL_STATE_H

#include "module.h"

#include <stdatomic.h>

typedef struct {
    PyObject_HEAD
    PyObject *method, *data, *error, *callbacks, *result; /* NULL for None */
    long long call_id, generation;
    double submitted;
    bool ended, has_tensors, handed_out;
    atomic_uchar ready; /* a thread that waits looks at it without the GIL */
} CallState;

bool is_call_state(PyObject *object);

/* End a call with a result, which it takes over, or with an error. */
void call_succeed(CallState *call, PyObject *result, bool has_tensors);
void call_fail(CallState *call, PyObject *error);

#endif
