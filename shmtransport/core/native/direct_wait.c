/* DirectCalls.wait: looks and blocks until replies come, and ends the calls that they belong to.
 *
 * Making values may run Python code in a garbage collection, which may use the same client. So a message is taken out of
 * the ring before its values are made, and what was looked at before is looked at again after that.
 */
#include "direct_calls.h"

#include "bell_type.h"
#include "call_state.h"
#include "counters_type.h"
#include "decoding.h"
#include "layout.h"
#include "message_ring_type.h"
#include "patience.h"
#include "waiting.h"

#define LONGEST_SLEEP 0.1 /* seconds: then the endpoint looks whether the server lives */
#define MOST_ATTEMPTS 100

static bool has_callbacks(const CallState *call)
{
    return call->callbacks != NULL && call->callbacks != Py_None;
}

/* Read a reply that was looked at, and end its call: 1, or -1 with an error set. */
static int take_reply(DirectCalls *self, const struct call *reply, PyObject *number, size_t nbytes, double started)
{
    CallState *ended = NULL;
    PyObject *data = ring_take_next(self->ring);
    int taken = in_flight_end(&self->flights, reply, number, nbytes, started, &ended);
    Py_DECREF(data);
    if (ended != NULL && has_callbacks(ended)) { /* which it got while its reply was being read */
        PyObject *told = PyObject_CallFunctionObjArgs(self->call_back, ended, NULL);
        taken = told == NULL ? -1 : taken;
        Py_XDECREF(told);
    }
    Py_XDECREF((PyObject *)ended);
    return taken;
}

/* Take the next message, if it is a plain reply to a call that nothing else waits for: 1; 0 if it is not; -1 with an error
 * set, PeerProtocolError if the connection is to end with it. */
static int receive(DirectCalls *self)
{
    PyObject *data = ring_next(self->ring);
    char *bytes;
    Py_ssize_t nbytes;
    struct call reply;
    double started = clock_seconds();
    if (data == NULL || PyBytes_AsStringAndSize(data, &bytes, &nbytes) < 0 || !inspect_call(bytes, (size_t)nbytes, &reply)
        || reply.tag != TAG_REPLY || !can_be_taken(&reply, self->flights.borrows))
        return 0;
    PyObject *number = PyLong_FromUnsignedLongLong(reply.call_id);
    if (number == NULL)
        return -1;
    CallState *call = in_flight_find(&self->flights, number);
    bool is_plain = call != NULL && !has_callbacks(call);
    int received = is_plain ? take_reply(self, &reply, number, (size_t)nbytes, started) : 0;
    Py_DECREF(number);
    return received;
}

/* As receive, in this thread's turn. */
static int receive_in_turn(DirectCalls *self)
{
    PyObject *acquired = PyObject_CallFunctionObjArgs(self->acquire, Py_False, NULL);
    if (acquired != Py_True) {
        Py_XDECREF(acquired);
        return acquired == NULL ? -1 : 0;
    }
    Py_DECREF(acquired);
    int received = 0;
    if (direct_is_usable(self) && PyDict_Size(self->followers) == 0 && PyList_Size(self->received_for) == 0)
        received = receive(self);
    PyObject *error = received < 0 ? fetch_error() : NULL;
    PyObject *released = PyObject_CallObject(self->release, NULL);
    Py_XDECREF(released);
    if (error != NULL)
        raise_again(error);
    return released == NULL ? -1 : received;
}

/* Look until there is a message or the call is ready, for a slice of time: 1 if one of both is so, -1 with an error set. */
static int look(DirectCalls *self, CallState *call, double deadline)
{
    double slice_end = look_slice_end(clock_seconds(), deadline);
    const struct message_ring *ring = ring_in(self->ring);
    const cell_value *published = message_ring_peer_published(ring);
    PyObject *kept = Py_NewRef(self->ring); /* the cell lives as long */
    uint64_t consumed = ring->consumed;
    bool found;
    Py_BEGIN_ALLOW_THREADS
    found = look_until_changed(&published, &consumed, 1, &call->ready, slice_end);
    Py_END_ALLOW_THREADS
    Py_DECREF(kept);
    return found ? 1 : PyErr_CheckSignals();
}

/* Have the endpoint told that this thread begins or ends to receive for a call, by blocking: 1 or 0, as it answers; -1 with
 * an error set. */
static int tell(PyObject *whom, CallState *call)
{
    PyObject *told = PyObject_CallFunctionObjArgs(whom, call, NULL);
    int is_true = told == NULL ? -1 : PyObject_IsTrue(told);
    Py_XDECREF(told);
    return is_true;
}

/* As tell, for end_receiving: again where a signal handler has raised in the middle of it; -1 then, with its error set. */
static int tell_end(PyObject *end_receiving, CallState *call)
{
    PyObject *error = NULL;
    for (int attempt = 0; attempt < MOST_ATTEMPTS && tell(end_receiving, call) < 0; attempt++) {
        PyObject *raised = fetch_error();
        if (error == NULL)
            error = raised;
        else
            Py_XDECREF(raised);
    }
    if (error == NULL)
        return 0;
    raise_again(error);
    return -1;
}

/* Block until there may be something to receive, for a while: 1; 0 if that is left to the endpoint, since another thread
 * receives or follows, or nothing has come; -1 with an error set. */
static int sleep_in_turn(DirectCalls *self, CallState *call, double seconds)
{
    PyObject *ring = Py_NewRef(self->ring), *bell = Py_NewRef(self->bell), *ending = Py_NewRef(self->end_receiving);
    struct message_ring *rings[] = {ring_in(ring)};
    int begun = tell(self->begin_receiving, call), slept = 0;
    if (begun > 0) {
        slept = bell_sleep(bell_in(bell), rings, 1, seconds < LONGEST_SLEEP ? seconds : LONGEST_SLEEP);
        if (slept > 0)
            count_wait(counters_of(self->flights.counters));
    }
    if (begun != 0) {
        PyObject *error = begun < 0 || slept < 0 ? fetch_error() : NULL;
        int ended = tell_end(ending, call);
        if (error != NULL) {
            if (ended < 0)
                PyErr_Clear();
            raise_again(error);
            ended = -1;
        }
        begun = ended < 0 ? -1 : slept == 0 || call->ready || ring_is_readable(ring);
    }
    Py_DECREF(ring);
    Py_DECREF(bell);
    Py_DECREF(ending);
    return begun;
}

int direct_wait_for(DirectCalls *self, CallState *call, double seconds)
{
    double end = -1, deadline = -1; /* of the wait, and of the look that has begun */
    bool is_patient = false;        /* whether the look ends where patience does */
    while (!call->ready && direct_is_usable(self)) {
        if (ring_is_readable(self->ring)) {
            int received = receive_in_turn(self);
            if (received <= 0)
                return received;
            continue;
        }
        struct patience *patience = patience_of(self->patience);
        double now = clock_seconds();
        if (end < 0)
            end = now + seconds;
        if (deadline < 0) {
            double most = patience_seconds(patience);
            is_patient = most > 0 && now + most <= end;
            deadline = is_patient ? now + most : most > 0 ? end : now;
        }
        if (now >= deadline) {
            if (is_patient)
                patience_learn(patience, false);
            int slept = now < end ? sleep_in_turn(self, call, end - now) : 0;
            if (slept <= 0)
                return slept;
            deadline = -1;
            continue;
        }
        int found = look(self, call, deadline);
        if (found < 0)
            return -1;
        if (found && is_patient && direct_is_usable(self))
            patience_learn(patience, true);
    }
    return 0;
}

PyObject *direct_wait(PyObject *object, PyObject *const *arguments, Py_ssize_t count)
{
    DirectCalls *self = (DirectCalls *)object;
    if (count != 2 || !is_call_state(arguments[0]))
        return PyErr_Format(PyExc_TypeError, "%zd", count);
    CallState *call = (CallState *)arguments[0];
    double seconds = PyFloat_AsDouble(arguments[1]);
    if ((seconds == -1.0 && PyErr_Occurred()) || direct_wait_for(self, call, seconds) < 0)
        return NULL;
    return PyBool_FromLong(call->ready);
}
