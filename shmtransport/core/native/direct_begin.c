/* DirectCalls.begin: makes a request, publishes it, and expects its reply, or has done nothing. */
#include "direct_calls.h"

#include "call_state.h"
#include "counters_type.h"
#include "encoding.h"
#include "layout.h"
#include "message_ring_type.h"
#include "waiting.h"

/* Publish a request and expect its reply: nothing here runs Python code. 1, 0 with nothing done, -1 with an error set. */
static int publish(DirectCalls *self, CallState *call, PyObject *number, const struct packer *packer)
{
    struct ring_finding finding;
    if (self->closed || packer->length > self->largest_message)
        return 0;
    if (PyDict_SetItem(self->flights.pending, number, (PyObject *)call) < 0)
        return -1;
    if (message_ring_write(ring_in(self->ring), packer->bytes, (uint32_t)packer->length, &finding) == RING_DONE)
        return 1;
    return PyDict_DelItem(self->flights.pending, number); /* which it has: never an error */
}

static int begin(DirectCalls *self, CallState *call, PyObject *number, PyObject *arguments, PyObject *keywords)
{
    struct encoder encoder;
    long long call_id = PyLong_AsLongLong(number);
    if (call_id < 0)
        return PyErr_Occurred() ? -1 : 0;
    int made = encode_request_alone(&encoder, self->flights.loans, (uint64_t)call_id, call->method, arguments, keywords);
    if (made <= 0)
        return made;
    int published = publish(self, call, number, &encoder.packer);
    if (published <= 0) {
        encoder_undo(&encoder);
        return published;
    }
    struct counters *counters = counters_of(self->flights.counters);
    struct message_ring *ring = ring_in(self->ring);
    message_ring_wake_peer(ring);
    message_ring_has_room(ring);
    call->call_id = call_id;
    count_in_flight(counters, (uint64_t)PyDict_Size(self->flights.pending));
    count_sent(counters, encoder.packer.length, clock_seconds() - call->submitted, encoder.sent);
    encoder_end(&encoder);
    return 1;
}

int direct_begin_call(DirectCalls *self, CallState *call, PyObject *arguments, PyObject *keywords)
{
    if (!direct_is_usable(self) || call->method == NULL || !is_method_name(call->method))
        return 0;
    PyObject *number = PyIter_Next(self->ids);
    if (number == NULL)
        return -1;
    int begun = begin(self, call, number, arguments, keywords);
    Py_DECREF(number);
    return begun;
}

PyObject *direct_begin(PyObject *object, PyObject *const *arguments, Py_ssize_t count)
{
    if (count != 3 || !is_call_state(arguments[0]) || !PyTuple_Check(arguments[1]) || !PyDict_Check(arguments[2]))
        return PyErr_Format(PyExc_TypeError, "%zd", count);
    int begun = direct_begin_call((DirectCalls *)object, (CallState *)arguments[0], arguments[1], arguments[2]);
    return begun < 0 ? NULL : PyBool_FromLong(begun);
}
