/* The message ring as Python sees it: the base of native_twin.MessageRing, which finds out the addresses. */
#include "message_ring_type.h"

#include "waiting.h"

typedef struct {
    PyObject_HEAD
    struct message_ring ring;
    PyObject *own_memory, *peer_memory; /* what keeps the two areas mapped */
    PyObject *taken; /* a message that was taken from the ring and that read has not returned yet, or NULL */
} MessageRing;

static PyTypeObject *ring_type; /* for as long as the process lives */

static struct message_ring *ring_of(PyObject *self)
{
    return &((MessageRing *)self)->ring;
}

struct message_ring *ring_in(PyObject *object)
{
    if (PyObject_TypeCheck(object, ring_type))
        return ring_of(object);
    PyErr_SetObject(PyExc_TypeError, object);
    return NULL;
}

static PyObject *ring_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"own_address", "own_nbytes", "own_memory", "peer_address", "peer_nbytes", "peer_memory",
                            NULL};
    unsigned long long own_address, own_nbytes, peer_address, peer_nbytes;
    PyObject *own_memory, *peer_memory;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "KKOKKO", names, &own_address, &own_nbytes, &own_memory,
                                     &peer_address, &peer_nbytes, &peer_memory))
        return NULL;
    if (!ring_area_fits((uintptr_t)own_address, own_nbytes))
        return refuse("bad_ring_memory", "(K)", own_nbytes);
    if (!ring_area_fits((uintptr_t)peer_address, peer_nbytes))
        return refuse("bad_ring_memory", "(K)", peer_nbytes);
    MessageRing *self = (MessageRing *)PyType_GenericAlloc(type, 0);
    if (self == NULL)
        return NULL;
    message_ring_begin(&self->ring, ring_area_at((uintptr_t)own_address, own_nbytes),
                       ring_area_at((uintptr_t)peer_address, peer_nbytes));
    self->own_memory = Py_NewRef(own_memory);
    self->peer_memory = Py_NewRef(peer_memory);
    return (PyObject *)self;
}

static void ring_dealloc(PyObject *self)
{
    Py_XDECREF(((MessageRing *)self)->own_memory);
    Py_XDECREF(((MessageRing *)self)->peer_memory);
    Py_XDECREF(((MessageRing *)self)->taken);
    free_object(self);
}

static PyObject *raise_finding(const struct message_ring *ring, enum ring_outcome outcome,
                               const struct ring_finding *finding)
{
    const uint64_t *figures = finding->figures;
    switch (outcome) {
    case RING_BAD_PUBLISHED:
        return refuse("bad_published", "(KKK)", figures[0], figures[1], ring->peer.capacity);
    case RING_BAD_RECORD:
        return refuse("bad_record", "(KK)", figures[0], figures[1]);
    case RING_BAD_LENGTH:
        return refuse("bad_length", "(KK)", figures[0], ring->largest_message);
    default:
        return refuse("bad_consumed", "(KKK)", figures[0], ring->peer_consumed, ring->published);
    }
}

static PyObject *ring_write(PyObject *self, PyObject *argument)
{
    struct message_ring *ring = ring_of(self);
    char *data;
    Py_ssize_t length;
    if (PyBytes_AsStringAndSize(argument, &data, &length) < 0)
        return NULL;
    if ((uint64_t)length > ring->largest_message)
        return refuse("message_too_large", "(nK)", length, ring->largest_message);
    struct ring_finding finding;
    enum ring_outcome outcome = message_ring_write(ring, data, (uint32_t)length, &finding);
    if (outcome > RING_NOTHING)
        return raise_finding(ring, outcome, &finding);
    if (outcome == RING_DONE)
        message_ring_wake_peer(ring);
    return PyBool_FromLong(outcome == RING_DONE);
}

/* Take the next message from the ring, if there is one; false if an error was raised. Its bytes are made first, and they
 * are no container: no Python code runs in here. */
static bool take(MessageRing *self)
{
    struct ring_finding finding;
    enum ring_outcome outcome = message_ring_find(&self->ring, &finding);
    if (outcome == RING_NOTHING)
        return true;
    if (outcome != RING_DONE) {
        raise_finding(&self->ring, outcome, &finding);
        return false;
    }
    PyObject *data = PyBytes_FromStringAndSize(NULL, finding.length);
    if (data == NULL)
        return false;
    message_ring_take(&self->ring, &finding, PyBytes_AsString(data));
    self->taken = data;
    message_ring_tell_of_room(&self->ring);
    return true;
}

/* What was taken stays with the ring until nothing can come between that and the return: where a signal handler raises
 * here, the next read returns it. */
static PyObject *ring_read(PyObject *object, PyObject *Py_UNUSED(nothing))
{
    MessageRing *self = (MessageRing *)object;
    do {
        if (self->taken == NULL && !take(self))
            return NULL;
        if (self->taken == NULL)
            Py_RETURN_NONE;
        if (PyErr_CheckSignals() < 0)
            return NULL;
    } while (self->taken == NULL); /* an inner call has returned it */
    PyObject *data = self->taken;
    self->taken = NULL;
    return data;
}

bool ring_is_readable(PyObject *self)
{
    return ((MessageRing *)self)->taken != NULL || message_ring_readable(ring_of(self));
}

PyObject *ring_next(PyObject *object)
{
    MessageRing *self = (MessageRing *)object;
    if (self->taken == NULL && !take(self)) {
        PyErr_Clear(); /* read meets it again */
        return NULL;
    }
    return self->taken;
}

PyObject *ring_take_next(PyObject *object)
{
    MessageRing *self = (MessageRing *)object;
    PyObject *data = self->taken;
    self->taken = NULL;
    return data;
}

static PyObject *ring_readable(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    return PyBool_FromLong(ring_is_readable(self));
}

static PyObject *ring_want_room(PyObject *self, PyObject *argument)
{
    int wanted = PyObject_IsTrue(argument);
    if (wanted < 0)
        return NULL;
    message_ring_want_room(ring_of(self), wanted);
    Py_RETURN_NONE;
}

static PyObject *ring_sleep(PyObject *self, PyObject *argument)
{
    int sleeps = PyObject_IsTrue(argument);
    if (sleeps < 0)
        return NULL;
    message_ring_sleep(ring_of(self), sleeps);
    Py_RETURN_NONE;
}

static PyObject *ring_take_post(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    return PyBool_FromLong(message_ring_take_post(ring_of(self)));
}

static PyObject *ring_end(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    message_ring_say_end(ring_of(self));
    Py_RETURN_NONE;
}

static PyObject *ring_ended(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    return PyBool_FromLong(((MessageRing *)self)->taken == NULL && message_ring_ended(ring_of(self)));
}

/* Looks in slices without the GIL; between two of them Python's signal handlers run, which may read from this ring. */
static PyObject *ring_wait_readable(PyObject *self, PyObject *argument)
{
    double deadline = PyFloat_AsDouble(argument); /* which may be Python code that reads from this ring */
    if (deadline == -1.0 && PyErr_Occurred())
        return NULL;
    const cell_value *published = message_ring_peer_published(ring_of(self));
    if (ring_is_readable(self))
        Py_RETURN_TRUE;
    for (double now = clock_seconds(); now < deadline; now = clock_seconds()) {
        uint64_t consumed = ring_of(self)->consumed;
        bool changed;
        Py_BEGIN_ALLOW_THREADS
        changed = look_until_changed(&published, &consumed, 1, NULL, look_slice_end(now, deadline));
        Py_END_ALLOW_THREADS
        if (changed)
            Py_RETURN_TRUE;
        if (PyErr_CheckSignals() < 0)
            return NULL;
        if (((MessageRing *)self)->taken != NULL)
            Py_RETURN_TRUE;
    }
    Py_RETURN_FALSE;
}

static PyMethodDef ring_methods[] = {
    {"write", ring_write, METH_O, NULL},
    {"read", ring_read, METH_NOARGS, NULL},
    {"readable", ring_readable, METH_NOARGS, NULL},
    {"want_room", ring_want_room, METH_O, NULL},
    {"sleep", ring_sleep, METH_O, NULL},
    {"take_post", ring_take_post, METH_NOARGS, NULL},
    {"end", ring_end, METH_NOARGS, NULL},
    {"ended", ring_ended, METH_NOARGS, NULL},
    {"wait_readable", ring_wait_readable, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

#define RING_MEMBER(name) (offsetof(MessageRing, ring) + offsetof(struct message_ring, name))

static PyMemberDef ring_members[] = {
    {"largest_message", T_ULONGLONG, RING_MEMBER(largest_message), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot ring_slots[] = {
    {Py_tp_new, ring_new},
    {Py_tp_dealloc, ring_dealloc},
    {Py_tp_methods, ring_methods},
    {Py_tp_members, ring_members},
    {0, NULL},
};

static PyType_Spec ring_spec = {
    .name = "shmtransport.core._native.MessageRing",
    .basicsize = sizeof(MessageRing),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = ring_slots,
};

int add_message_ring_type(PyObject *module)
{
    return make_type_once(&ring_type, &ring_spec) ? PyModule_AddObjectRef(module, "MessageRing", (PyObject *)ring_type)
                                                  : -1;
}
