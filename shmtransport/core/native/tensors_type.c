#include "tensors_type.h"

typedef struct {
    PyObject_HEAD
    struct tensors tensors;
} Tensors;

static PyTypeObject *tensors_type; /* for as long as the process lives */

const struct tensors *tensors_of(PyObject *object)
{
    if (Py_IS_TYPE(object, tensors_type))
        return &((Tensors *)object)->tensors;
    PyErr_SetObject(PyExc_TypeError, object);
    return NULL;
}

static PyObject *tensors_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"type", "rows", "arrays", NULL};
    PyObject *tensor_type, *rows, *arrays;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O!O!O", names, &PyType_Type, &tensor_type, &PyTuple_Type,
                                     &rows, &arrays))
        return NULL;
    Tensors *self = (Tensors *)PyType_GenericAlloc(type, 0);
    if (self != NULL && tensors_prepare(&self->tensors, tensor_type, rows, arrays) < 0)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static void tensors_dealloc(PyObject *self)
{
    tensors_forget(&((Tensors *)self)->tensors);
    free_object(self);
}

static PyType_Slot tensors_slots[] = {
    {Py_tp_new, tensors_new},
    {Py_tp_dealloc, tensors_dealloc},
    {0, NULL},
};

static PyType_Spec tensors_spec = {
    .name = "shmtransport.core._native.Tensors",
    .basicsize = sizeof(Tensors),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = tensors_slots,
};

int add_tensors_type(PyObject *module)
{
    return make_type_once(&tensors_type, &tensors_spec) ? PyModule_AddObjectRef(module, "Tensors", (PyObject *)tensors_type) : -1;
}
