#include "patience.h"

#define LOOK_SECONDS 50e-6
#define MOST_FAILURES 8

double patience_seconds(struct patience *patience)
{
    if (patience->spin_seconds >= 0)
        return patience->spin_seconds;
    if (patience->to_pass == 0)
        return LOOK_SECONDS;
    patience->to_pass--;
    return 0;
}

void patience_learn(struct patience *patience, bool found)
{
    if (found)
        patience->failures = 0;
    else if (patience->failures < MOST_FAILURES)
        patience->failures++;
    patience->to_pass = found ? 0 : 1 << patience->failures;
}

/* --- as Python sees it --- */

typedef struct {
    PyObject_HEAD
    struct patience patience;
} Patience;

static PyTypeObject *patience_type; /* for as long as the process lives */

struct patience *patience_of(PyObject *object)
{
    if (Py_IS_TYPE(object, patience_type))
        return &((Patience *)object)->patience;
    PyErr_SetObject(PyExc_TypeError, object);
    return NULL;
}

static PyObject *patience_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"spin_s", NULL};
    PyObject *spin;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O", names, &spin))
        return NULL;
    double seconds = spin == Py_None ? -1 : PyFloat_AsDouble(spin);
    if (PyErr_Occurred())
        return NULL;
    Patience *self = (Patience *)PyType_GenericAlloc(type, 0);
    if (self != NULL)
        self->patience.spin_seconds = seconds;
    return (PyObject *)self;
}

static void patience_dealloc(PyObject *self)
{
    free_object(self);
}

static PyObject *patience_seconds_method(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    return PyFloat_FromDouble(patience_seconds(&((Patience *)self)->patience));
}

static PyObject *patience_learn_method(PyObject *self, PyObject *argument)
{
    int found = PyObject_IsTrue(argument);
    if (found < 0)
        return NULL;
    patience_learn(&((Patience *)self)->patience, found);
    Py_RETURN_NONE;
}

static PyMethodDef patience_methods[] = {
    {"seconds", patience_seconds_method, METH_NOARGS, NULL},
    {"learn", patience_learn_method, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot patience_slots[] = {
    {Py_tp_new, patience_new},
    {Py_tp_dealloc, patience_dealloc},
    {Py_tp_methods, patience_methods},
    {0, NULL},
};

static PyType_Spec patience_spec = {
    .name = "shmtransport.core._native.Patience",
    .basicsize = sizeof(Patience),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = patience_slots,
};

int add_patience_type(PyObject *module)
{
    return make_type_once(&patience_type, &patience_spec)
        ? PyModule_AddObjectRef(module, "Patience", (PyObject *)patience_type)
        : -1;
}
