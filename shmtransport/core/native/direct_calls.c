/* The calls of a client that need nothing but this core: DirectCalls.
 *
 * begin makes a request, publishes it and expects its reply; wait looks and blocks until replies come, and ends the calls
 * that they belong to. Each does so only where nothing stands in the way: no other thread receives, the message ring has room, all values
 * are plain. Otherwise it has done nothing, or has left the message with the ring, and protocol/calls.py and
 * endpoints/exchange.py, whose rules these are, do the whole of it.
 *
 * Making values may run Python code in a garbage collection, which may use the same client. So a message is taken out of
 * the ring before its values are made, and what was looked at before is looked at again after that.
 */
#include "module.h"

#include "bell_type.h"
#include "borrows_type.h"
#include "call_state.h"
#include "counters_type.h"
#include "decoding.h"
#include "encoding.h"
#include "layout.h"
#include "message_ring_type.h"
#include "patience.h"
#include "waiting.h"

#define LONGEST_SLEEP 0.1 /* seconds: then the endpoint looks whether the server lives */
#define MOST_ATTEMPTS 100

typedef struct {
    PyObject_HEAD
    PyObject *ring, *pending, *ids, *loans, *borrows, *counters;
    PyObject *patience, *bell;
    PyObject *call_back;                         /* called with a call that has ended and has callbacks */
    PyObject *acquire, *release;                 /* of the lock that a thread holds while it receives */
    PyObject *followers, *received_for;          /* those that wait for their replies: empty if no other thread does */
    PyObject *begin_receiving, *end_receiving;   /* called with a call, around a wait that blocks */
    unsigned long long largest_message;
    bool closed;
} DirectCalls;

static PyTypeObject *direct_type; /* for as long as the process lives */

static int direct_init(PyObject *object, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"ring",    "pending",   "ids",          "loans",           "borrows",       "counters",
                            "call_back", "acquire", "release", "followers", "received_for", "begin_receiving",
                            "end_receiving", "largest_message", "patience", "bell", NULL};
    DirectCalls *self = (DirectCalls *)object;
    PyObject *ring, *pending, *ids, *loans, *borrows, *counters, *call_back, *acquire, *release, *followers;
    PyObject *received_for, *begin_receiving, *end_receiving, *patience, *bell;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OO!OOOOOOOO!O!OOKOO", names, &ring, &PyDict_Type, &pending,
                                     &ids, &loans, &borrows, &counters, &call_back, &acquire, &release, &PyDict_Type,
                                     &followers, &PyList_Type, &received_for, &begin_receiving, &end_receiving,
                                     &self->largest_message, &patience, &bell))
        return -1;
    if (self->ring != NULL || ring_in(ring) == NULL || counters_of(counters) == NULL
        || patience_of(patience) == NULL || bell_in(bell) == NULL || !PyIter_Check(ids)
        || !is_loans(loans) || !is_borrows(borrows)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "DirectCalls");
        return -1;
    }
    self->ring = Py_NewRef(ring);
    self->pending = Py_NewRef(pending);
    self->ids = Py_NewRef(ids);
    self->loans = Py_NewRef(loans);
    self->borrows = Py_NewRef(borrows);
    self->counters = Py_NewRef(counters);
    self->call_back = Py_NewRef(call_back);
    self->acquire = Py_NewRef(acquire);
    self->release = Py_NewRef(release);
    self->followers = Py_NewRef(followers);
    self->received_for = Py_NewRef(received_for);
    self->begin_receiving = Py_NewRef(begin_receiving);
    self->end_receiving = Py_NewRef(end_receiving);
    self->patience = Py_NewRef(patience);
    self->bell = Py_NewRef(bell);
    if (self->largest_message > ring_in(ring)->largest_message)
        self->largest_message = ring_in(ring)->largest_message;
    return 0;
}

static int direct_traverse(PyObject *object, visitproc visit, void *arg)
{
    DirectCalls *self = (DirectCalls *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->ring);
    Py_VISIT(self->pending);
    Py_VISIT(self->call_back);
    Py_VISIT(self->acquire);
    Py_VISIT(self->release);
    Py_VISIT(self->followers);
    Py_VISIT(self->received_for);
    Py_VISIT(self->begin_receiving);
    Py_VISIT(self->end_receiving);
    return 0;
}

/* All may be cleared by a garbage collection while no method runs; methods look at closed first. */
static int direct_clear(PyObject *object)
{
    DirectCalls *self = (DirectCalls *)object;
    self->closed = true;
    Py_CLEAR(self->ring);
    Py_CLEAR(self->pending);
    Py_CLEAR(self->ids);
    Py_CLEAR(self->loans);
    Py_CLEAR(self->borrows);
    Py_CLEAR(self->counters);
    Py_CLEAR(self->call_back);
    Py_CLEAR(self->acquire);
    Py_CLEAR(self->release);
    Py_CLEAR(self->followers);
    Py_CLEAR(self->received_for);
    Py_CLEAR(self->begin_receiving);
    Py_CLEAR(self->end_receiving);
    Py_CLEAR(self->patience);
    Py_CLEAR(self->bell);
    return 0;
}

static void direct_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    direct_clear(self);
    free_object(self);
}

static bool is_usable(const DirectCalls *self)
{
    return !self->closed && self->ring != NULL;
}

/* --- begin --- */

static bool is_name(PyObject *method)
{
    return PyUnicode_CheckExact(method) && PyUnicode_GetLength(method) <= MAX_NAME_CHARACTERS;
}

/* Publish a request and expect its reply: nothing here runs Python code. 1, 0 with nothing done, -1 with an error set. */
static int publish(DirectCalls *self, CallState *call, PyObject *number, const struct packer *packer)
{
    struct ring_finding finding;
    if (self->closed || packer->length > self->largest_message)
        return 0;
    if (PyDict_SetItem(self->pending, number, (PyObject *)call) < 0)
        return -1;
    if (message_ring_write(ring_in(self->ring), packer->bytes, (uint32_t)packer->length, &finding) == RING_DONE)
        return 1;
    return PyDict_DelItem(self->pending, number); /* which it has: never an error */
}

static int begin(DirectCalls *self, CallState *call, PyObject *number, PyObject *arguments, PyObject *keywords)
{
    struct encoder encoder;
    long long call_id = PyLong_AsLongLong(number);
    if (call_id < 0)
        return PyErr_Occurred() ? -1 : 0;
    int made = encode_request_alone(&encoder, self->loans, (uint64_t)call_id, call->method, arguments, keywords);
    if (made <= 0)
        return made;
    int published = publish(self, call, number, &encoder.packer);
    if (published <= 0) {
        encoder_undo(&encoder);
        return published;
    }
    struct counters *counters = counters_of(self->counters);
    struct message_ring *ring = ring_in(self->ring);
    message_ring_wake_peer(ring);
    message_ring_has_room(ring);
    call->call_id = call_id;
    count_in_flight(counters, (uint64_t)PyDict_Size(self->pending));
    count_sent(counters, encoder.packer.length, clock_seconds() - call->submitted, encoder.sent);
    encoder_end(&encoder);
    return 1;
}

/* begin(call, arguments, keywords): whether the request was sent. */
static PyObject *direct_begin(PyObject *object, PyObject *const *arguments, Py_ssize_t count)
{
    DirectCalls *self = (DirectCalls *)object;
    if (count != 3 || !is_call_state(arguments[0]) || !PyTuple_Check(arguments[1]) || !PyDict_Check(arguments[2]))
        return PyErr_Format(PyExc_TypeError, "%zd", count);
    CallState *call = (CallState *)arguments[0];
    if (!is_usable(self) || call->method == NULL || !is_name(call->method))
        Py_RETURN_FALSE;
    PyObject *number = PyIter_Next(self->ids);
    if (number == NULL)
        return NULL;
    int begun = begin(self, call, number, arguments[1], arguments[2]);
    Py_DECREF(number);
    return begun < 0 ? NULL : PyBool_FromLong(begun);
}

/* --- wait --- */

/* The call in flight of this number, if there is one: borrowed. */
static CallState *call_of(DirectCalls *self, PyObject *number)
{
    PyObject *call = PyDict_GetItemWithError(self->pending, number);
    return call != NULL && is_call_state(call) ? (CallState *)call : NULL;
}

static bool has_callbacks(const CallState *call)
{
    return call->callbacks != NULL && call->callbacks != Py_None;
}

/* Forget that a call is in flight, and return a reference to it; NULL if another has. */
static CallState *end_flight(DirectCalls *self, PyObject *number)
{
    CallState *call = call_of(self, number);
    if (call != NULL) {
        Py_INCREF(call);
        PyDict_DelItem(self->pending, number);
    }
    return call;
}

/* Have the callbacks called that a call got while its reply was being read; false with an error set. */
static bool call_back(DirectCalls *self, CallState *call)
{
    PyObject *told = has_callbacks(call) ? PyObject_CallFunctionObjArgs(self->call_back, call, NULL) : Py_NewRef(Py_None);
    Py_XDECREF(told);
    return told != NULL;
}

/* End a call whose reply could not be read, with what is raised; false with an error set. */
static bool fail_unread(DirectCalls *self, PyObject *number)
{
    PyObject *error = fetch_error();
    CallState *call = end_flight(self, number);
    if (call == NULL || error == NULL) {
        Py_XDECREF(error);
        Py_XDECREF(call);
        return true;
    }
    call_fail(call, error);
    count_call(counters_of(self->counters), clock_seconds() - call->submitted, true);
    bool told = call_back(self, call);
    Py_DECREF(call);
    return told;
}

/* End a call with the result that was read; false with an error set. */
static bool end_call(DirectCalls *self, PyObject *number, const struct values *values, bool has_tensors)
{
    CallState *call = end_flight(self, number);
    if (call == NULL) { /* given up: its tensors are released */
        Py_DECREF(values->result);
        return true;
    }
    count_call(counters_of(self->counters), clock_seconds() - call->submitted, false);
    call_succeed(call, values->result, has_tensors);
    bool told = call_back(self, call);
    Py_DECREF(call);
    return told;
}

/* Read a reply that was looked at, and end its call: 1, or -1 with an error set. */
static int take_reply(DirectCalls *self, const struct call *reply, PyObject *number, size_t nbytes, double started)
{
    struct values values;
    PyObject *data = ring_take_next(self->ring);
    int taken = take_values(reply, self->borrows, &values);
    Py_DECREF(data);
    if (taken < 0)
        return fail_unread(self, number) ? 1 : -1;
    if (taken == 0) {
        refuse("invalid_values", "()");
        return -1;
    }
    if (borrows_were_cut(self->borrows) || loans_were_cut(self->loans)) {
        Py_DECREF(values.result);
        refuse("cut_short", "()");
        return -1;
    }
    count_received(counters_of(self->counters), nbytes, values.tensor_bytes, clock_seconds() - started);
    return end_call(self, number, &values, reply->tensor_count > 0) ? 1 : -1;
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
        || reply.tag != TAG_REPLY || !can_be_taken(&reply, self->borrows))
        return 0;
    PyObject *number = PyLong_FromUnsignedLongLong(reply.call_id);
    if (number == NULL)
        return -1;
    CallState *call = call_of(self, number);
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
    if (is_usable(self) && PyDict_Size(self->followers) == 0 && PyList_Size(self->received_for) == 0)
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
            count_wait(counters_of(self->counters));
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

/* Receive, look and block until the call is ready, something is left, or time is up: 0, or -1 with an error set. */
static int wait_for(DirectCalls *self, CallState *call, double seconds)
{
    double end = -1, deadline = -1; /* of the wait, and of the look that has begun */
    bool is_patient = false;        /* whether the look ends where patience does */
    while (!call->ready && is_usable(self)) {
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
        if (found && is_patient && is_usable(self))
            patience_learn(patience, true);
    }
    return 0;
}

/* wait(call, seconds): wait for as long as this, or for less; whether the call is ready. PeerProtocolError if the connection
 * is to end with it. */
static PyObject *direct_wait(PyObject *object, PyObject *const *arguments, Py_ssize_t count)
{
    DirectCalls *self = (DirectCalls *)object;
    if (count != 2 || !is_call_state(arguments[0]))
        return PyErr_Format(PyExc_TypeError, "%zd", count);
    CallState *call = (CallState *)arguments[0];
    double seconds = PyFloat_AsDouble(arguments[1]);
    if ((seconds == -1.0 && PyErr_Occurred()) || wait_for(self, call, seconds) < 0)
        return NULL;
    return PyBool_FromLong(call->ready);
}

static PyObject *direct_close(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    ((DirectCalls *)self)->closed = true;
    Py_RETURN_NONE;
}

static PyMethodDef direct_methods[] = {
    {"begin", (PyCFunction)(void (*)(void))direct_begin, METH_FASTCALL, NULL},
    {"wait", (PyCFunction)(void (*)(void))direct_wait, METH_FASTCALL, NULL},
    {"close", direct_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot direct_slots[] = {
    {Py_tp_init, direct_init},
    {Py_tp_dealloc, direct_dealloc},
    {Py_tp_traverse, direct_traverse},
    {Py_tp_clear, direct_clear},
    {Py_tp_methods, direct_methods},
    {0, NULL},
};

static PyType_Spec direct_spec = {
    .name = "shmtransport.core._native.DirectCalls",
    .basicsize = sizeof(DirectCalls),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = direct_slots,
};

int add_direct_calls_type(PyObject *module)
{
    return make_type_once(&direct_type, &direct_spec) ? PyModule_AddObjectRef(module, "DirectCalls", (PyObject *)direct_type)
                                                      : -1;
}
