#include "in_flight.h"

#include "borrows_type.h"
#include "counters_type.h"
#include "decoding.h"
#include "loans_type.h"
#include "waiting.h"

bool in_flight_init(struct in_flight *flights, PyObject *pending, PyObject *loans, PyObject *borrows, PyObject *counters)
{
    if (!PyDict_Check(pending) || counters_of(counters) == NULL || !is_loans(loans) || !is_borrows(borrows)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "in_flight");
        return false;
    }
    flights->pending = Py_NewRef(pending);
    flights->loans = Py_NewRef(loans);
    flights->borrows = Py_NewRef(borrows);
    flights->counters = Py_NewRef(counters);
    return true;
}

void in_flight_clear(struct in_flight *flights)
{
    Py_CLEAR(flights->pending);
    Py_CLEAR(flights->loans);
    Py_CLEAR(flights->borrows);
    Py_CLEAR(flights->counters);
}

CallState *in_flight_find(const struct in_flight *flights, PyObject *number)
{
    PyObject *call = PyDict_GetItemWithError(flights->pending, number);
    return call != NULL && is_call_state(call) ? (CallState *)call : NULL;
}

/* Forget that a call is in flight, and return a reference to it; NULL if another has. */
static CallState *take_out(const struct in_flight *flights, PyObject *number)
{
    CallState *call = in_flight_find(flights, number);
    if (call != NULL) {
        Py_INCREF(call);
        PyDict_DelItem(flights->pending, number);
    }
    return call;
}

/* End a call whose reply could not be read, with what is raised. */
static CallState *fail_unread(const struct in_flight *flights, PyObject *number)
{
    PyObject *error = fetch_error();
    CallState *call = error == NULL ? NULL : take_out(flights, number);
    if (call == NULL) {
        Py_XDECREF(error);
        return NULL;
    }
    call_fail(call, error);
    count_call(counters_of(flights->counters), clock_seconds() - call->submitted, true);
    return call;
}

/* End a call with the result that was read. */
static CallState *succeed(const struct in_flight *flights, PyObject *number, PyObject *result, bool has_tensors, double now)
{
    CallState *call = take_out(flights, number);
    if (call == NULL) { /* given up: its tensors are released */
        Py_DECREF(result);
        return NULL;
    }
    count_call(counters_of(flights->counters), now - call->submitted, false);
    call_succeed(call, result, has_tensors);
    return call;
}

int in_flight_end(const struct in_flight *flights, const struct call *reply, PyObject *number, size_t nbytes, double started,
                  CallState **ended)
{
    struct values values;
    int taken = take_values(reply, flights->borrows, &values);
    if (taken < 0) {
        *ended = fail_unread(flights, number);
        return 1;
    }
    if (taken == 0) {
        refuse("invalid_values", "()");
        return -1;
    }
    if (borrows_were_cut(flights->borrows) || loans_were_cut(flights->loans)) {
        Py_DECREF(values.result);
        refuse("cut_short", "()");
        return -1;
    }
    double now = clock_seconds();
    count_received(counters_of(flights->counters), nbytes, values.tensor_bytes, now - started);
    *ended = succeed(flights, number, values.result, reply->tensor_count > 0, now);
    return 1;
}
