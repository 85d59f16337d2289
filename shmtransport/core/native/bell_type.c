#include "bell_type.h"

#include "message_ring_type.h"

typedef struct {
    PyObject_HEAD
    struct bell bell;
} Bell;

static PyTypeObject *bell_type; /* for as long as the process lives */

struct bell *bell_in(PyObject *object)
{
    if (Py_IS_TYPE(object, bell_type))
        return &((Bell *)object)->bell;
    PyErr_SetObject(PyExc_TypeError, object);
    return NULL;
}

static void say_asleep(struct message_ring *const *rings, size_t count, bool sleeps)
{
    for (size_t index = 0; index < count; index++)
        message_ring_sleep(rings[index], sleeps);
}

static bool is_any_readable(struct message_ring *const *rings, size_t count)
{
    for (size_t index = 0; index < count; index++)
        if (message_ring_readable(rings[index]))
            return true;
    return false;
}

int bell_sleep(struct bell *bell, struct message_ring *const *rings, size_t count, double seconds)
{
    say_asleep(rings, count, true);
    bool blocks = !bell_take(bell, rings, count) && !is_any_readable(rings, count);
    if (blocks) {
        Py_BEGIN_ALLOW_THREADS
        bell_wait(bell, rings, count, seconds);
        Py_END_ALLOW_THREADS
    }
    say_asleep(rings, count, false); /* before a signal handler runs: it may fork, and the child has no part in this */
    return PyErr_CheckSignals() < 0 ? -1 : blocks;
}

static PyObject *bell_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {NULL};
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "", names))
        return NULL;
    return PyType_GenericAlloc(type, 0);
}

static void bell_dealloc(PyObject *self)
{
    free_object(self);
}

static PyObject *post(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    bell_post(&((Bell *)self)->bell);
    Py_RETURN_NONE;
}

/* The rings of a tuple of them, in an array of its own; NULL with an error set. */
static struct message_ring **rings_of(PyObject *objects, size_t count)
{
    struct message_ring **rings = PyMem_Malloc((count + 1) * sizeof *rings);
    if (rings == NULL)
        return (struct message_ring **)PyErr_NoMemory();
    for (size_t index = 0; index < count; index++) {
        rings[index] = ring_in(PyTuple_GetItem(objects, (Py_ssize_t)index));
        if (rings[index] == NULL) {
            PyMem_Free(rings);
            return NULL;
        }
    }
    return rings;
}

static PyObject *wait(PyObject *self, PyObject *parameters)
{
    struct bell *bell = &((Bell *)self)->bell;
    PyObject *objects;
    double seconds;
    if (!PyArg_ParseTuple(parameters, "O!d", &PyTuple_Type, &objects, &seconds))
        return NULL;
    size_t count = (size_t)PyTuple_Size(objects);
    struct message_ring **rings = rings_of(objects, count);
    if (rings == NULL)
        return NULL;
    bool taken = bell_take(bell, rings, count);
    if (!taken) {
        Py_BEGIN_ALLOW_THREADS
        taken = bell_wait(bell, rings, count, seconds);
        Py_END_ALLOW_THREADS
    }
    PyMem_Free(rings);
    return PyErr_CheckSignals() < 0 ? NULL : PyBool_FromLong(taken);
}

static PyMethodDef bell_methods[] = {
    {"post", post, METH_NOARGS, NULL},
    {"wait", wait, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot bell_slots[] = {
    {Py_tp_new, bell_new},
    {Py_tp_dealloc, bell_dealloc},
    {Py_tp_methods, bell_methods},
    {0, NULL},
};

static PyType_Spec bell_spec = {
    .name = "shmtransport.core._native.Bell",
    .basicsize = sizeof(Bell),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = bell_slots,
};

int add_bell_type(PyObject *module)
{
    return make_type_once(&bell_type, &bell_spec) ? PyModule_AddObjectRef(module, "Bell", (PyObject *)bell_type) : -1;
}
