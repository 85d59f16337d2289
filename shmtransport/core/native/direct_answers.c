/* The answers of a server that need nothing but this core: DirectAnswers, one for each client, and answer_in_turn for
 * those by doorbell.
 *
 * A request is taken, its handler called, and its result sent, as endpoints/server.py does, whose rules these are. What
 * needs more is left: a message stays with its ring, and what a handler has returned or raised goes to the caller.
 *
 * A handler is Python code, and so is what a garbage collection may run: what was looked at before is looked at again
 * after that.
 */
#include "module.h"

#include "bell_type.h"
#include "borrows_type.h"
#include "counters_type.h"
#include "decoding.h"
#include "encoding.h"
#include "layout.h"
#include "message_ring_type.h"
#include "patience.h"
#include "waiting.h"

#include <string.h>

#define MOST_IN_TURN 128

typedef struct {
    PyObject_HEAD
    PyObject *ring; /* NULL for a client by another channel */
    PyObject *handlers, *loans, *borrows, *counters;
    PyObject *last_method; /* the name in the last request that was taken: usually the next one's too */
    PyObject *set, *reset; /* of the context variable that tells a handler whom it serves */
    PyObject *caller;      /* what that is set to */
    unsigned long long largest_message;
    bool heard;  /* its first message was received: until then all are left */
    bool closed; /* the client has gone, or this is a forked child */
} DirectAnswers;

static PyTypeObject *direct_type; /* for as long as the process lives */

static int direct_init(PyObject *object, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"ring",  "handlers", "loans",  "borrows", "counters", "set_caller",
                            "reset_caller", "caller", "largest_message", NULL};
    DirectAnswers *self = (DirectAnswers *)object;
    PyObject *ring, *handlers, *loans, *borrows, *counters, *set, *reset, *caller;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OO!OOOOOOK", names, &ring, &PyDict_Type, &handlers, &loans,
                                     &borrows, &counters, &set, &reset, &caller, &self->largest_message))
        return -1;
    bool has_ring = ring != Py_None;
    if (self->handlers != NULL || (has_ring && ring_in(ring) == NULL) || counters_of(counters) == NULL || !is_loans(loans)
        || !is_borrows(borrows)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "DirectAnswers");
        return -1;
    }
    self->ring = has_ring ? Py_NewRef(ring) : NULL;
    self->handlers = Py_NewRef(handlers);
    self->loans = Py_NewRef(loans);
    self->borrows = Py_NewRef(borrows);
    self->counters = Py_NewRef(counters);
    self->set = Py_NewRef(set);
    self->reset = Py_NewRef(reset);
    self->caller = Py_NewRef(caller);
    if (has_ring && self->largest_message > ring_in(ring)->largest_message)
        self->largest_message = ring_in(ring)->largest_message;
    return 0;
}

static int direct_traverse(PyObject *object, visitproc visit, void *arg)
{
    DirectAnswers *self = (DirectAnswers *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->ring);
    Py_VISIT(self->handlers);
    Py_VISIT(self->set);
    Py_VISIT(self->reset);
    Py_VISIT(self->caller);
    return 0;
}

static int direct_clear(PyObject *object)
{
    DirectAnswers *self = (DirectAnswers *)object;
    Py_CLEAR(self->ring);
    Py_CLEAR(self->handlers);
    Py_CLEAR(self->loans);
    Py_CLEAR(self->borrows);
    Py_CLEAR(self->counters);
    Py_CLEAR(self->last_method);
    Py_CLEAR(self->set);
    Py_CLEAR(self->reset);
    Py_CLEAR(self->caller);
    return 0;
}

static void direct_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    direct_clear(self);
    free_object(self);
}

/* A request that is being answered. */
struct answering {
    struct call request;
    PyObject *method, *handler;
    struct values values;
    double started;
};

static void end_answering(struct answering *answering)
{
    Py_CLEAR(answering->method);
    Py_CLEAR(answering->handler);
    Py_CLEAR(answering->values.arguments);
    Py_CLEAR(answering->values.keywords);
}

/* Take a message out of a list, or the next one out of the ring: the caller's from now on. */
static PyObject *take_out(DirectAnswers *self, PyObject *data, PyObject *list)
{
    if (list == NULL)
        return ring_take_next(self->ring);
    Py_INCREF(data);
    PyList_SetSlice(list, 0, 1, NULL); /* which it has: never an error */
    return data;
}

/* The name of a request's method; NULL, without an error, if there is none. */
static PyObject *method_of(DirectAnswers *self, const struct call *request)
{
    const char *name = (const char *)request->method.bytes;
    Py_ssize_t length = 0, count = (Py_ssize_t)request->method.count;
    const char *last = self->last_method == NULL ? NULL : PyUnicode_AsUTF8AndSize(self->last_method, &length);
    if (last == NULL || length != count || memcmp(last, name, (size_t)count) != 0) {
        PyObject *before = self->last_method;
        self->last_method = PyUnicode_DecodeUTF8(name, count, NULL);
        Py_XDECREF(before);
    }
    PyErr_Clear();
    return Py_XNewRef(self->last_method);
}

/* Take a message, the only one in a list or the ring's next one, if it is a plain request for a handler that there is: 1; 0
 * with nothing done; -1 with an error set. */
static int take_request(DirectAnswers *self, PyObject *data, PyObject *list, struct answering *answering)
{
    char *bytes;
    Py_ssize_t nbytes;
    double started = clock_seconds();
    struct call *request = &answering->request;
    if (data == NULL || PyBytes_AsStringAndSize(data, &bytes, &nbytes) < 0 || !inspect_call(bytes, (size_t)nbytes, request)
        || request->tag != TAG_REQUEST || !can_be_taken(request, self->borrows))
        return 0;
    answering->method = method_of(self, request);
    answering->handler = answering->method == NULL ? NULL : PyDict_GetItemWithError(self->handlers, answering->method);
    Py_XINCREF(answering->handler);
    if (answering->handler == NULL) {
        PyErr_Clear();
        return 0;
    }
    data = take_out(self, data, list);
    int taken = take_values(request, self->borrows, &answering->values);
    Py_DECREF(data); /* not held while the handler runs */
    if (taken == 0)
        refuse("invalid_values", "()");
    if (taken > 0 && request->tensor_count > 0 && borrows_were_cut(self->borrows)) {
        refuse("cut_short", "()");
        taken = 0;
    }
    if (taken <= 0)
        return -1;
    answering->started = clock_seconds();
    count_received(counters_of(self->counters), (uint64_t)nbytes, answering->values.tensor_bytes,
                   answering->started - started);
    return 1;
}

/* Call the handler in the context of its caller; neither it nor its arguments are held after that. */
static PyObject *call_handler(DirectAnswers *self, struct answering *answering)
{
    PyObject *token = PyObject_CallFunctionObjArgs(self->set, self->caller, NULL);
    if (token == NULL)
        return NULL;
    count_in_flight(counters_of(self->counters), 1);
    PyObject *keywords = PyDict_Size(answering->values.keywords) > 0 ? answering->values.keywords : NULL;
    PyObject *result = PyObject_Call(answering->handler, answering->values.arguments, keywords);
    PyObject *error = result == NULL ? fetch_error() : NULL;
    Py_CLEAR(answering->values.arguments);
    Py_CLEAR(answering->values.keywords);
    Py_CLEAR(answering->handler);
    PyObject *reset = PyObject_CallFunctionObjArgs(self->reset, token, NULL);
    Py_DECREF(token);
    Py_XDECREF(reset);
    if (error != NULL)
        raise_again(error);
    else if (reset == NULL)
        Py_CLEAR(result);
    return result;
}

/* What the caller is to do the rest of: (call_id, method, result, error, started). Takes result and error over. */
static PyObject *rest_of(const struct answering *answering, PyObject *result, PyObject *error)
{
    return Py_BuildValue("KONNd", (unsigned long long)answering->request.call_id, answering->method,
                         result == NULL ? Py_NewRef(Py_None) : result, error == NULL ? Py_NewRef(Py_None) : error,
                         answering->started);
}

static PyObject *bytes_of(const struct packer *packer)
{
    return PyBytes_FromStringAndSize((const char *)packer->bytes, (Py_ssize_t)packer->length);
}

/* Send a reply by the ring: True, or its bytes where there is no room in it; NULL with an error set. */
static PyObject *send(DirectAnswers *self, const struct packer *packer)
{
    struct ring_finding finding;
    struct message_ring *ring = ring_in(self->ring);
    if (message_ring_write(ring, packer->bytes, (uint32_t)packer->length, &finding) != RING_DONE)
        return bytes_of(packer);
    message_ring_wake_peer(ring);
    Py_RETURN_TRUE;
}

/* Send a result, which it takes over: when the reply is there, this process no longer holds it. */
static PyObject *send_result(DirectAnswers *self, const struct answering *answering, PyObject *result)
{
    struct encoder encoder;
    struct counters *counters = counters_of(self->counters);
    double before = clock_seconds();
    int made = encode_reply_alone(&encoder, self->loans, answering->request.call_id, result);
    if (made > 0 && encoder.packer.length > self->largest_message) {
        encoder_undo(&encoder);
        made = 0;
    }
    if (made == 0)
        return rest_of(answering, result, NULL);
    Py_DECREF(result);
    if (made < 0)
        return NULL;
    if (loans_were_cut(self->loans) || borrows_were_cut(self->borrows)) { /* it may have been made of zeros */
        encoder_undo(&encoder);
        refuse("cut_short", "()");
        return fetch_error();
    }
    if (self->closed) { /* by Python code that making the reply has run */
        encoder_undo(&encoder);
        Py_RETURN_TRUE;
    }
    PyObject *sent = self->ring == NULL ? bytes_of(&encoder.packer) : NULL;
    if (self->ring != NULL || sent != NULL) {
        double now = clock_seconds(); /* counted before the client can ask for it */
        count_sent(counters, encoder.packer.length, now - before, encoder.sent);
        count_call(counters, now - answering->started, false);
    }
    if (self->ring != NULL)
        sent = send(self, &encoder.packer);
    if (sent == NULL) { /* no memory for its bytes: the call fails, and no more */
        encoder_undo(&encoder);
        return rest_of(answering, NULL, fetch_error());
    }
    encoder_end(&encoder);
    return sent;
}

/* Answer a message, the only one in a list or the ring's next one: True; None with nothing done; what the caller is to do the rest of; an
 * error that the client, or else this process, is to blame for; NULL with an error of a callback. */
static PyObject *answer(DirectAnswers *self, PyObject *data, PyObject *list)
{
    struct answering answering = {.method = NULL};
    PyObject *answered;
    int taken = data == NULL ? 0 : take_request(self, data, list, &answering);
    if (taken <= 0)
        answered = taken == 0 ? Py_NewRef(Py_None) : fetch_error();
    else {
        PyObject *result = call_handler(self, &answering);
        if (result == NULL)
            answered = rest_of(&answering, NULL, fetch_error());
        else if (!self->closed)
            answered = send_result(self, &answering, result);
        else {
            Py_DECREF(result);
            answered = Py_NewRef(Py_True);
        }
    }
    end_answering(&answering);
    return answered;
}

/* answer(messages): answer a message that came by another channel, as answer above. It is alone in a list, and is taken out
 * of it before the handler runs. */
static PyObject *direct_answer(PyObject *object, PyObject *list)
{
    DirectAnswers *self = (DirectAnswers *)object;
    if (!PyList_Check(list) || PyList_Size(list) != 1)
        return PyErr_Format(PyExc_TypeError, "%R", list);
    PyObject *data = PyList_GetItem(list, 0);
    if (self->closed || self->handlers == NULL || !PyBytes_Check(data))
        Py_RETURN_NONE;
    return answer(self, data, list);
}

/* --- answer_in_turn --- */

/* Answer the next message in a ring. */
static PyObject *answer_next(DirectAnswers *self)
{
    bool is_there = !self->closed && self->heard && ring_is_readable(self->ring);
    return answer(self, is_there ? ring_next(self->ring) : NULL, NULL);
}

/* Look at all rings until one has a message or attention is wanted, for a slice of time; whether one of both is so. */
static bool look_at_all(DirectAnswers *const *in_turn, Py_ssize_t count, const atomic_uchar *attention, double deadline)
{
    const cell_value *published[MOST_IN_TURN];
    uint64_t consumed[MOST_IN_TURN];
    bool found;
    for (Py_ssize_t index = 0; index < count; index++) {
        const struct message_ring *ring = ring_in(in_turn[index]->ring);
        published[index] = message_ring_peer_published(ring);
        consumed[index] = ring->consumed;
    }
    Py_BEGIN_ALLOW_THREADS
    found = look_until_changed(published, consumed, (size_t)count, attention, deadline);
    Py_END_ALLOW_THREADS
    return found;
}

static bool is_left(const DirectAnswers *self, PyObject *answered)
{
    return answered == Py_None && ring_is_readable(self->ring);
}

static bool is_wanted(const atomic_uchar *attention)
{
    return atomic_load_explicit(attention, memory_order_acquire) != 0;
}

static bool is_time_up(const atomic_uchar *attention, double limit)
{
    return is_wanted(attention) || clock_seconds() >= limit;
}

/* Answer each one's next message. *answered is whether there were any, unless this returns something: what answer has,
 * other than True and None, with its place; False where a message is left; True where the caller is to look at something
 * after an answer. */
static PyObject *answer_round(DirectAnswers *const *in_turn, Py_ssize_t count, const atomic_uchar *attention,
                              double limit, bool *answered)
{
    *answered = false;
    for (Py_ssize_t index = 0; index < count; index++) {
        PyObject *one = answer_next(in_turn[index]);
        if (one == NULL)
            return NULL;
        if (one != Py_True && one != Py_None)
            return Py_BuildValue("nN", index, one);
        bool left = is_left(in_turn[index], one), is_over = one == Py_True && is_time_up(attention, limit);
        *answered = *answered || one == Py_True;
        Py_DECREF(one);
        if (left || is_over)
            return PyBool_FromLong(is_over);
    }
    Py_RETURN_NONE;
}

/* Block until one of several clients, or this process, posts, for a while; -1 with the error of a signal handler set. */
static int sleep_for_all(DirectAnswers *const *in_turn, Py_ssize_t count, struct bell *bell, double seconds)
{
    struct message_ring *rings[MOST_IN_TURN];
    for (Py_ssize_t index = 0; index < count; index++)
        rings[index] = ring_in(in_turn[index]->ring);
    int slept = bell_sleep(bell, rings, (size_t)count, seconds);
    if (slept > 0)
        count_wait(counters_of(in_turn[0]->counters));
    return slept;
}

/* How answer_in_turn waits. */
struct waiting {
    const atomic_uchar *attention;
    struct patience *patience;
    struct bell *bell;
    double turn_seconds, sleep_seconds;
};

static PyObject *answer_all(DirectAnswers *const *in_turn, Py_ssize_t count, const struct waiting *how)
{
    double now = clock_seconds(), limit = now + how->turn_seconds, deadline = -1; /* of the look that has begun */
    for (bool has_slept = false;;) {
        bool answered;
        PyObject *round = answer_round(in_turn, count, how->attention, limit, &answered);
        if (round != Py_None)
            return round;
        Py_DECREF(round);
        now = clock_seconds();
        if (answered && deadline > 0)
            patience_learn(how->patience, true);
        if (is_wanted(how->attention) || (has_slept && !answered))
            Py_RETURN_FALSE;
        if (answered || deadline < 0) {
            double seconds = patience_seconds(how->patience);
            deadline = seconds > 0 ? now + seconds : 0;
        }
        has_slept = now >= deadline;
        if (has_slept) {
            if (deadline > 0)
                patience_learn(how->patience, false);
            if (sleep_for_all(in_turn, count, how->bell, how->sleep_seconds) < 0)
                return NULL;
            deadline = 0;
        } else if (!look_at_all(in_turn, count, how->attention, look_slice_end(now, deadline)) && PyErr_CheckSignals() < 0)
            return NULL;
    }
}

/* answer_in_turn(answers, attention, patience, bell, turn_seconds, sleep_seconds): answer what comes from several clients.
 * False if nothing comes while it blocks, if a message is left, and for more clients than it takes; True after an answer,
 * if the caller is to look at something or time is up; (index, rest) for what the caller is to do the rest of. attention is
 * a bytearray whose first byte is set by others, which then post the bell. */
PyObject *answer_in_turn(PyObject *Py_UNUSED(module), PyObject *parameters)
{
    PyObject *answers, *attention, *patience, *bell;
    struct waiting how;
    DirectAnswers *in_turn[MOST_IN_TURN];
    if (!PyArg_ParseTuple(parameters, "O!O!OOdd", &PyTuple_Type, &answers, &PyByteArray_Type, &attention, &patience, &bell,
                          &how.turn_seconds, &how.sleep_seconds))
        return NULL;
    how.patience = patience_of(patience);
    how.bell = how.patience == NULL ? NULL : bell_in(bell);
    if (how.bell == NULL)
        return NULL;
    Py_ssize_t count = PyTuple_Size(answers);
    if (count > MOST_IN_TURN)
        Py_RETURN_FALSE;
    if (PyByteArray_Size(attention) < 1 || count < 1)
        return PyErr_Format(PyExc_ValueError, "%zd", count);
    for (Py_ssize_t index = 0; index < count; index++) {
        PyObject *one = PyTuple_GetItem(answers, index);
        if (!Py_IS_TYPE(one, direct_type) || ((DirectAnswers *)one)->ring == NULL)
            return PyErr_Format(PyExc_TypeError, "%R", one);
        in_turn[index] = (DirectAnswers *)one;
    }
    how.attention = (const atomic_uchar *)PyByteArray_AsString(attention);
    return answer_all(in_turn, count, &how);
}

static PyObject *direct_close(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    ((DirectAnswers *)self)->closed = true;
    Py_RETURN_NONE;
}

static PyMethodDef direct_methods[] = {
    {"answer", direct_answer, METH_O, NULL},
    {"close", direct_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef direct_members[] = {
    {"heard", T_BOOL, offsetof(DirectAnswers, heard), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot direct_slots[] = {
    {Py_tp_init, direct_init},
    {Py_tp_members, direct_members},
    {Py_tp_methods, direct_methods},
    {Py_tp_dealloc, direct_dealloc},
    {Py_tp_traverse, direct_traverse},
    {Py_tp_clear, direct_clear},
    {0, NULL},
};

static PyType_Spec direct_spec = {
    .name = "shmtransport.core._native.DirectAnswers",
    .basicsize = sizeof(DirectAnswers),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = direct_slots,
};

int add_direct_answers_type(PyObject *module)
{
    return make_type_once(&direct_type, &direct_spec)
        ? PyModule_AddObjectRef(module, "DirectAnswers", (PyObject *)direct_type)
        : -1;
}
