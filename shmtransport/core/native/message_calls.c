/* MessageCalls: a client's requests and replies as messages, whatever channel they go by. It makes and takes them where
 * nothing in one needs Python; otherwise it has done nothing, and protocol/calls.py, whose rules these are, does it.
 */
#include "module.h"

#include "call_state.h"
#include "counters_type.h"
#include "decoding.h"
#include "encoding.h"
#include "in_flight.h"
#include "layout.h"
#include "waiting.h"

typedef struct {
    PyObject_HEAD
    struct in_flight flights;
    PyObject *ids;
    unsigned long long largest_message;
} MessageCalls;

static PyTypeObject *message_calls_type; /* for as long as the process lives */

static int message_init(PyObject *object, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"pending", "ids", "loans", "borrows", "counters", "largest_message", NULL};
    MessageCalls *self = (MessageCalls *)object;
    PyObject *pending, *ids, *loans, *borrows, *counters;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OOOOOK", names, &pending, &ids, &loans, &borrows, &counters,
                                     &self->largest_message))
        return -1;
    if (self->ids != NULL || !PyIter_Check(ids)) {
        PyErr_SetString(PyExc_TypeError, "MessageCalls");
        return -1;
    }
    if (!in_flight_init(&self->flights, pending, loans, borrows, counters))
        return -1;
    self->ids = Py_NewRef(ids);
    return 0;
}

static int message_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(((MessageCalls *)object)->flights.pending);
    return 0;
}

static int message_clear(PyObject *object)
{
    MessageCalls *self = (MessageCalls *)object;
    in_flight_clear(&self->flights);
    Py_CLEAR(self->ids);
    return 0;
}

static void message_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    message_clear(self);
    free_object(self);
}

/* The bytes of a request whose tensors are held, or NULL with nothing done; an error may be set. */
static PyObject *encode(MessageCalls *self, CallState *call, PyObject *number, PyObject *arguments, PyObject *keywords)
{
    struct encoder encoder;
    long long call_id = PyLong_AsLongLong(number);
    if (call_id < 0
        || encode_request_alone(&encoder, self->flights.loans, (uint64_t)call_id, call->method, arguments, keywords) <= 0)
        return NULL;
    size_t length = encoder.packer.length;
    PyObject *data = length > self->largest_message
        ? NULL
        : PyBytes_FromStringAndSize((const char *)encoder.packer.bytes, (Py_ssize_t)length);
    if (data == NULL) {
        encoder_undo(&encoder);
        return NULL;
    }
    PyObject *before = call->data;
    call->call_id = call_id;
    call->data = Py_NewRef(data);
    count_sent(counters_of(self->flights.counters), length, clock_seconds() - call->submitted, encoder.sent);
    encoder_end(&encoder);
    Py_XDECREF(before);
    return data;
}

/* encode(call, arguments, keywords): the bytes of a request, which gets its id and keeps them; None with nothing done. */
static PyObject *message_encode(PyObject *object, PyObject *const *arguments, Py_ssize_t count)
{
    MessageCalls *self = (MessageCalls *)object;
    if (count != 3 || !is_call_state(arguments[0]) || !PyTuple_Check(arguments[1]) || !PyDict_Check(arguments[2])
        || self->ids == NULL)
        return PyErr_Format(PyExc_TypeError, "%zd", count);
    CallState *call = (CallState *)arguments[0];
    if (call->method == NULL || !is_method_name(call->method))
        Py_RETURN_NONE;
    PyObject *number = PyIter_Next(self->ids);
    if (number == NULL)
        return NULL;
    PyObject *data = encode(self, call, number, arguments[1], arguments[2]);
    Py_DECREF(number);
    return data != NULL || PyErr_Occurred() ? data : Py_NewRef(Py_None);
}

static PyObject *end_call(MessageCalls *self, const struct call *reply, size_t nbytes, double started)
{
    PyObject *number = PyLong_FromUnsignedLongLong(reply->call_id);
    if (number == NULL)
        return NULL;
    CallState *ended = NULL;
    int taken = in_flight_find(&self->flights, number) == NULL
        ? 0
        : in_flight_end(&self->flights, reply, number, nbytes, started, &ended);
    Py_DECREF(number);
    if (ended != NULL || taken < 0)
        return (PyObject *)ended;
    return Py_NewRef(taken == 0 ? Py_None : Py_False);
}

/* take(data): the call that a reply has ended; None with nothing done; False if its call was given up meanwhile. */
static PyObject *message_take(PyObject *object, PyObject *data)
{
    MessageCalls *self = (MessageCalls *)object;
    char *bytes;
    Py_ssize_t nbytes;
    struct call reply;
    double started = clock_seconds();
    if (PyBytes_AsStringAndSize(data, &bytes, &nbytes) < 0)
        return NULL;
    if (self->ids == NULL || !inspect_call(bytes, (size_t)nbytes, &reply) || reply.tag != TAG_REPLY
        || !can_be_taken(&reply, self->flights.borrows))
        Py_RETURN_NONE;
    return end_call(self, &reply, (size_t)nbytes, started);
}

static PyMethodDef message_methods[] = {
    {"encode", (PyCFunction)(void (*)(void))message_encode, METH_FASTCALL, NULL},
    {"take", message_take, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot message_slots[] = {
    {Py_tp_init, message_init},
    {Py_tp_dealloc, message_dealloc},
    {Py_tp_traverse, message_traverse},
    {Py_tp_clear, message_clear},
    {Py_tp_methods, message_methods},
    {0, NULL},
};

static PyType_Spec message_spec = {
    .name = "shmtransport.core._native.MessageCalls",
    .basicsize = sizeof(MessageCalls),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = message_slots,
};

int add_message_calls_type(PyObject *module)
{
    return make_type_once(&message_calls_type, &message_spec)
        ? PyModule_AddObjectRef(module, "MessageCalls", (PyObject *)message_calls_type)
        : -1;
}
