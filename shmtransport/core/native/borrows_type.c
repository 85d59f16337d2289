/* The borrows of one connection as Python sees them: the base of native_twin.Borrows, which finds out the addresses. */
#include "borrows_type.h"

#include "borrows.h"
#include "mapping_type.h"
#include "tensors_type.h"

typedef struct {
    PyObject_HEAD
    struct borrows *borrows;
    PyObject *tensors; /* keeps what the next points to */
    const struct tensors *library;
} Borrows;

static PyTypeObject *borrows_type; /* for as long as the process lives */

static PyObject *borrows_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"data_mapping", "data_offset", "data_bytes", "cells_mapping", "cells_offset", "slots",
                            "tensors",      NULL};
    PyObject *data, *cells, *tensors;
    Py_ssize_t data_offset, data_bytes, cells_offset, slots;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OnnOnnO", names, &data, &data_offset, &data_bytes, &cells,
                                     &cells_offset, &slots, &tensors))
        return NULL;
    struct mapping *data_mapping = mapping_with(data, data_offset, data_bytes, 1), *cells_mapping = NULL;
    if (data_mapping != NULL)
        cells_mapping = mapping_with(cells, cells_offset, slots, sizeof(uint64_t));
    const struct tensors *library = cells_mapping == NULL ? NULL : tensors_of(tensors);
    if (library == NULL)
        return NULL;
    Borrows *self = (Borrows *)PyType_GenericAlloc(type, 0);
    if (self == NULL)
        return NULL;
    self->tensors = Py_NewRef(tensors);
    self->library = library;
    self->borrows = borrows_make(data_mapping, (size_t)data_offset, (size_t)data_bytes, cells_mapping,
                                 (size_t)cells_offset, (size_t)slots);
    if (self->borrows == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void borrows_dealloc(PyObject *object)
{
    Borrows *self = (Borrows *)object;
    if (self->borrows != NULL)
        borrows_drop(self->borrows);
    Py_XDECREF(self->tensors);
    free_object(object);
}

static Py_ssize_t borrows_length(PyObject *self)
{
    return (Py_ssize_t)atomic_load_explicit(&((Borrows *)self)->borrows->count, memory_order_relaxed);
}

static PyObject *borrows_abandon(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    atomic_store_explicit(&((Borrows *)self)->borrows->abandoned, true, memory_order_relaxed);
    Py_RETURN_NONE;
}

static bool read_count(PyObject *number, uint64_t *count)
{
    *count = PyLong_AsUnsignedLongLong(number);
    if (*count != (uint64_t)-1 || !PyErr_Occurred())
        return true;
    PyErr_Clear();
    return false;
}

static bool lies_in_data(const struct borrows *borrows, uint64_t offset, const struct dtype_row *row,
                         const struct extent *extent)
{
    return offset % (uint64_t)row->itemsize == 0 && offset <= borrows->data_bytes
        && (uint64_t)extent->nbytes <= borrows->data_bytes - offset;
}

static PyObject *borrow(Borrows *self, uint64_t offset, const struct dtype_row *row, const struct extent *extent,
                        uint64_t slot, uint64_t sequence)
{
    if (!borrow_is_possible(self->borrows, slot, sequence))
        Py_RETURN_NONE;
    struct borrow *borrow = borrow_begin(self->borrows, slot, sequence);
    if (borrow == NULL)
        return PyErr_NoMemory();
    return make_tensor_over(self->library, &borrow->view, self->borrows->data + offset, row, extent);
}

/* borrow(offset, shape, dtype, slot, sequence): a tensor, or None for what memory/receive_arena.py is to look at. */
static PyObject *borrows_borrow(PyObject *object, PyObject *const *arguments, Py_ssize_t count)
{
    Borrows *self = (Borrows *)object;
    struct extent extent;
    uint64_t offset, slot, sequence;
    if (count != 5 || !read_count(arguments[0], &offset) || !read_count(arguments[3], &slot)
        || !read_count(arguments[4], &sequence))
        Py_RETURN_NONE;
    const struct dtype_row *row = row_of_name(self->library, arguments[2]);
    if (row == NULL || !read_extent(arguments[1], row->itemsize, &extent)
        || !lies_in_data(self->borrows, offset, row, &extent))
        Py_RETURN_NONE;
    return borrow(self, offset, row, &extent, slot, sequence);
}

bool is_borrows(PyObject *object)
{
    return PyObject_TypeCheck(object, borrows_type);
}

bool borrows_were_cut(PyObject *object)
{
    return mapping_was_cut(((Borrows *)object)->borrows->data_mapping);
}

static bool extent_of(const struct descriptor *descriptor, int64_t itemsize, struct extent *extent)
{
    extent->dimensions = (int)descriptor->dimensions;
    extent->nbytes = itemsize;
    for (uint32_t index = 0; index < descriptor->dimensions; index++) {
        uint64_t size = descriptor->shape[index];
        if (size == 0 || (uint64_t)extent->nbytes > INT64_MAX / size)
            return false;
        extent->sizes[index] = (int64_t)size;
        extent->nbytes *= (int64_t)size;
    }
    return true;
}

static const struct dtype_row *row_and_extent(Borrows *self, const struct descriptor *descriptor, struct extent *extent)
{
    const struct dtype_row *row = row_of_text(self->library, descriptor->dtype.bytes, descriptor->dtype.count);
    if (row == NULL || !extent_of(descriptor, row->itemsize, extent)
        || !lies_in_data(self->borrows, descriptor->offset, row, extent))
        return NULL;
    return row;
}

const struct tensors *library_of(PyObject *object)
{
    return ((Borrows *)object)->library;
}

bool can_be_borrowed(PyObject *object, const struct descriptor *descriptor, bool as_array)
{
    Borrows *self = (Borrows *)object;
    struct extent extent;
    const struct dtype_row *row = row_and_extent(self, descriptor, &extent);
    return row != NULL && (!as_array || row->has_arrays)
        && borrow_is_possible(self->borrows, descriptor->slot, descriptor->sequence);
}

PyObject *borrow_described(PyObject *object, const struct descriptor *descriptor, uint64_t *nbytes)
{
    Borrows *self = (Borrows *)object;
    struct extent extent;
    const struct dtype_row *row = row_and_extent(self, descriptor, &extent);
    if (row == NULL)
        Py_RETURN_NONE;
    *nbytes += (uint64_t)extent.nbytes;
    return borrow(self, descriptor->offset, row, &extent, descriptor->slot, descriptor->sequence);
}

static PyMethodDef borrows_methods[] = {
    {"borrow", (PyCFunction)(void (*)(void))borrows_borrow, METH_FASTCALL, NULL},
    {"abandon", borrows_abandon, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot borrows_slots[] = {
    {Py_tp_new, borrows_new},
    {Py_tp_dealloc, borrows_dealloc},
    {Py_tp_methods, borrows_methods},
    {Py_sq_length, borrows_length},
    {0, NULL},
};

static PyType_Spec borrows_spec = {
    .name = "shmtransport.core._native.Borrows",
    .basicsize = sizeof(Borrows),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = borrows_slots,
};

int add_borrows_type(PyObject *module)
{
    return make_type_once(&borrows_type, &borrows_spec) ? PyModule_AddObjectRef(module, "Borrows", (PyObject *)borrows_type) : -1;
}
