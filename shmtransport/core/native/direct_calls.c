/* The calls of a client that need nothing but this core: DirectCalls, as Python sees it.
 *
 * begin, wait, and call, which is both in one, each in a file of its own, do their work only where nothing stands in the way: no other thread receives,
 * the message ring has room, all values are plain. Otherwise they have done nothing, or have left the message with the
 * ring, and protocol/calls.py and endpoints/exchange.py, whose rules these are, do the whole of it.
 */
#include "direct_calls.h"

#include "bell_type.h"
#include "message_ring_type.h"
#include "patience.h"

static PyTypeObject *direct_type; /* for as long as the process lives */

static int direct_init(PyObject *object, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"ring",    "pending",   "ids",          "loans",           "borrows",       "counters",
                            "call_back", "acquire", "release", "followers", "received_for", "begin_receiving",
                            "end_receiving", "largest_message", "patience", "bell", NULL};
    DirectCalls *self = (DirectCalls *)object;
    PyObject *ring, *pending, *ids, *loans, *borrows, *counters, *call_back, *acquire, *release, *followers;
    PyObject *received_for, *begin_receiving, *end_receiving, *patience, *bell;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OOOOOOOOOO!O!OOKOO", names, &ring, &pending, &ids, &loans,
                                     &borrows, &counters, &call_back, &acquire, &release, &PyDict_Type, &followers,
                                     &PyList_Type, &received_for, &begin_receiving, &end_receiving,
                                     &self->largest_message, &patience, &bell))
        return -1;
    if (self->ring != NULL || ring_in(ring) == NULL || patience_of(patience) == NULL || bell_in(bell) == NULL
        || !PyIter_Check(ids)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "DirectCalls");
        return -1;
    }
    if (!in_flight_init(&self->flights, pending, loans, borrows, counters))
        return -1;
    self->ring = Py_NewRef(ring);
    self->ids = Py_NewRef(ids);
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
    Py_VISIT(self->flights.pending);
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
    in_flight_clear(&self->flights);
    Py_CLEAR(self->ids);
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

static PyObject *direct_close(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    ((DirectCalls *)self)->closed = true;
    Py_RETURN_NONE;
}

static PyMethodDef direct_methods[] = {
    {"call", (PyCFunction)(void (*)(void))direct_call, METH_FASTCALL, NULL},
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
