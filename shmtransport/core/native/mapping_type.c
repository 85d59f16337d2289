#define _DEFAULT_SOURCE

#include "mapping_type.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "guards.h"

typedef struct {
    PyObject_HEAD
    struct mapping *mapping;
} Mapping;

static PyTypeObject *mapping_type; /* for as long as the process lives */

struct mapping *mapping_with(PyObject *object, Py_ssize_t offset, Py_ssize_t count, size_t nbytes)
{
    if (!Py_IS_TYPE(object, mapping_type))
        PyErr_SetObject(PyExc_TypeError, object);
    else if (!mapping_has(((Mapping *)object)->mapping, offset, count, nbytes))
        refuse("outside_of_mapping", "(nn)", offset, count);
    else
        return ((Mapping *)object)->mapping;
    return NULL;
}

static PyObject *mapping_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"fd", "nbytes", "is_guarded", NULL};
    int fd, is_guarded;
    Py_ssize_t nbytes;
    struct stat file;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "inp", names, &fd, &nbytes, &is_guarded))
        return NULL;
    if (fstat(fd, &file) < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    if (nbytes <= 0 || file.st_size < nbytes)
        return refuse("file_too_small", "(Ln)", (long long)file.st_size, nbytes);
    Mapping *self = (Mapping *)PyType_GenericAlloc(type, 0);
    if (self != NULL && (self->mapping = mapping_make(fd, (size_t)nbytes, is_guarded)) == NULL) {
        PyErr_SetFromErrno(PyExc_OSError);
        Py_CLEAR(self);
    }
    return (PyObject *)self;
}

static void mapping_dealloc(PyObject *self)
{
    if (((Mapping *)self)->mapping != NULL)
        mapping_drop(((Mapping *)self)->mapping);
    free_object(self);
}

static PyObject *mapping_address(PyObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromVoidPtr(((Mapping *)self)->mapping->start);
}

static PyObject *mapping_cut(PyObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(mapping_was_cut(((Mapping *)self)->mapping));
}

/* As mmap.mmap's. */
static PyObject *mapping_madvise(PyObject *self, PyObject *parameters)
{
    const struct mapping *mapping = ((Mapping *)self)->mapping;
    int advice;
    Py_ssize_t start = 0, length = (Py_ssize_t)mapping->nbytes;
    if (!PyArg_ParseTuple(parameters, "i|nn", &advice, &start, &length))
        return NULL;
    if (!mapping_has(mapping, start, length, 1))
        return refuse("outside_of_mapping", "(nn)", start, length);
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = madvise(mapping->start + start, (size_t)length, advice);
    Py_END_ALLOW_THREADS
    return failed ? PyErr_SetFromErrno(PyExc_OSError) : Py_NewRef(Py_None);
}

static PyGetSetDef mapping_attributes[] = {
    {"address", mapping_address, NULL, NULL, NULL},
    {"was_cut", mapping_cut, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef mapping_methods[] = {
    {"madvise", mapping_madvise, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot mapping_slots[] = {
    {Py_tp_new, mapping_new},
    {Py_tp_dealloc, mapping_dealloc},
    {Py_tp_methods, mapping_methods},
    {Py_tp_getset, mapping_attributes},
    {0, NULL},
};

static PyType_Spec mapping_spec = {
    .name = "shmtransport.core._native.Mapping",
    .basicsize = sizeof(Mapping),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = mapping_slots,
};

int add_mapping_type(PyObject *module)
{
    return make_type_once(&mapping_type, &mapping_spec) ? PyModule_AddObjectRef(module, "Mapping", (PyObject *)mapping_type) : -1;
}
