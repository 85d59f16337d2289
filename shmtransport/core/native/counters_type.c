#include "counters_type.h"

typedef struct {
    PyObject_HEAD
    struct counters counters;
} Counters;

static PyTypeObject *counters_type; /* for as long as the process lives */

struct counters *counters_of(PyObject *object)
{
    if (PyObject_TypeCheck(object, counters_type))
        return &((Counters *)object)->counters;
    PyErr_SetObject(PyExc_TypeError, object);
    return NULL;
}

static struct counters *own(PyObject *self)
{
    return &((Counters *)self)->counters;
}

static void counters_dealloc(PyObject *self)
{
    free_object(self);
}

static PyObject *counters_count_sent(PyObject *self, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"control_bytes", "seconds", "tensors", "tensor_bytes", "copied", "copied_bytes", NULL};
    unsigned long long control_bytes, tensors = 0, tensor_bytes = 0, copied = 0, copied_bytes = 0;
    double seconds = 0.0;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "K|dKKKK", names, &control_bytes, &seconds, &tensors,
                                     &tensor_bytes, &copied, &copied_bytes))
        return NULL;
    count_sent(own(self), control_bytes, seconds, (struct sent_tensors){tensors, tensor_bytes, copied, copied_bytes});
    Py_RETURN_NONE;
}

static PyObject *counters_count_received(PyObject *self, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"control_bytes", "tensor_bytes", "seconds", NULL};
    unsigned long long control_bytes, tensor_bytes;
    double seconds;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "KKd", names, &control_bytes, &tensor_bytes, &seconds))
        return NULL;
    count_received(own(self), control_bytes, tensor_bytes, seconds);
    Py_RETURN_NONE;
}

static PyObject *counters_count_call(PyObject *self, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"seconds", "failed", NULL};
    double seconds;
    int failed = 0;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "d|p", names, &seconds, &failed))
        return NULL;
    count_call(own(self), seconds, failed);
    Py_RETURN_NONE;
}

static PyObject *counters_count_failure(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    own(self)->failures++;
    Py_RETURN_NONE;
}

static PyObject *counters_count_in_flight(PyObject *self, PyObject *argument)
{
    unsigned long long calls = PyLong_AsUnsignedLongLong(argument);
    if (PyErr_Occurred())
        return NULL;
    count_in_flight(own(self), calls);
    Py_RETURN_NONE;
}

static PyObject *counters_count_wait(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    count_wait(own(self));
    Py_RETURN_NONE;
}

static PyObject *counters_count_stall(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    own(self)->stalls++;
    Py_RETURN_NONE;
}

static PyObject *counters_count_stalled(PyObject *self, PyObject *argument)
{
    double seconds = PyFloat_AsDouble(argument);
    if (PyErr_Occurred())
        return NULL;
    own(self)->stall_seconds += seconds;
    Py_RETURN_NONE;
}

static PyObject *counters_latencies(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    PyObject *list = PyList_New(LATENCY_RANGES);
    for (Py_ssize_t index = 0; list != NULL && index < LATENCY_RANGES; index++) {
        PyObject *count = PyLong_FromUnsignedLongLong(own(self)->latencies[index]);
        if (count == NULL || PyList_SetItem(list, index, count) < 0)
            Py_CLEAR(list);
    }
    return list;
}

static PyMethodDef counters_methods[] = {
    {"count_sent", (PyCFunction)(void (*)(void))counters_count_sent, METH_VARARGS | METH_KEYWORDS, NULL},
    {"count_received", (PyCFunction)(void (*)(void))counters_count_received, METH_VARARGS | METH_KEYWORDS, NULL},
    {"count_call", (PyCFunction)(void (*)(void))counters_count_call, METH_VARARGS | METH_KEYWORDS, NULL},
    {"count_failure", counters_count_failure, METH_NOARGS, NULL},
    {"count_in_flight", counters_count_in_flight, METH_O, NULL},
    {"count_wait", counters_count_wait, METH_NOARGS, NULL},
    {"count_stall", counters_count_stall, METH_NOARGS, NULL},
    {"count_stalled", counters_count_stalled, METH_O, NULL},
    {"latencies", counters_latencies, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

#define TOTAL(name) {#name, T_ULONGLONG, offsetof(Counters, counters) + offsetof(struct counters, name), 0, NULL}
#define SECONDS(name) {#name, T_DOUBLE, offsetof(Counters, counters) + offsetof(struct counters, name), 0, NULL}

static PyMemberDef counters_members[] = {
    TOTAL(calls),
    TOTAL(failures),
    TOTAL(control_bytes_sent),
    TOTAL(control_bytes_received),
    TOTAL(tensors_sent),
    TOTAL(tensor_bytes_sent),
    TOTAL(tensor_bytes_received),
    TOTAL(tensors_copied),
    TOTAL(bytes_copied),
    TOTAL(waits),
    TOTAL(stalls),
    TOTAL(in_flight_peak),
    SECONDS(call_seconds),
    SECONDS(serialize_seconds),
    SECONDS(deserialize_seconds),
    SECONDS(stall_seconds),
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot counters_slots[] = {
    {Py_tp_dealloc, counters_dealloc},
    {Py_tp_methods, counters_methods},
    {Py_tp_members, counters_members},
    {0, NULL},
};

static PyType_Spec counters_spec = {
    .name = "shmtransport.core._native.Counters",
    .basicsize = sizeof(Counters),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = counters_slots,
};

int add_counters_type(PyObject *module)
{
    return make_type_once(&counters_type, &counters_spec)
        ? PyModule_AddObjectRef(module, "Counters", (PyObject *)counters_type)
        : -1;
}
