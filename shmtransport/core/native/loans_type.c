/* The loans of one connection as Python sees them: Claim, and the base of native_twin.Loans, which finds out the
 * addresses.
 *
 * Where a tensor or a descriptor is made, a garbage collection may run Python code that uses the same loans: what was
 * looked at before is looked at again after that.
 */
#include "loans_type.h"

#include "mapping_type.h"
#include "tensors_type.h"
#include "waiting.h"

static PyTypeObject *claim_type, *loans_type; /* for as long as the process lives */

/* --- Claim --- */

static void claim_dealloc(PyObject *object)
{
    Claim *self = (Claim *)object;
    if (self->loan != NULL)
        loans_give_back(self->loan);
    Py_XDECREF(self->owner);
    free_object(object);
}

static PyMemberDef claim_members[] = {
    {"offset", T_LONGLONG, offsetof(Claim, offset), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot claim_slots[] = {
    {Py_tp_dealloc, claim_dealloc},
    {Py_tp_members, claim_members},
    {0, NULL},
};

static PyType_Spec claim_spec = {
    .name = "shmtransport.core._native.Claim",
    .basicsize = sizeof(Claim),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = claim_slots,
};

Claim *claim_copy(PyObject *owner, int64_t nbytes)
{
    Claim *claim = PyObject_New(Claim, claim_type);
    if (claim == NULL)
        return NULL;
    claim->owner = (Loans *)Py_NewRef(owner);
    claim->loan = loans_claim(claim->owner->loans, nbytes, true);
    claim->offset = claim->loan == NULL ? 0 : claim->loan->block->offset;
    return claim;
}

/* --- Loans --- */

static bool find_tensor_methods(Loans *self)
{
    PyObject *type = (PyObject *)self->library->type;
    return (self->is_neg = PyObject_GetAttrString(type, "is_neg")) != NULL
        && (self->is_conj = PyObject_GetAttrString(type, "is_conj")) != NULL
        && (self->untyped_storage = PyObject_GetAttrString(type, "untyped_storage")) != NULL
        && (self->storage_offset = PyObject_GetAttrString(type, "storage_offset")) != NULL;
}

static PyObject *loans_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"data_mapping", "data_offset", "data_bytes", "cells_mapping", "cells_offset", "slots",
                            "tensors",      "describe",    NULL};
    PyObject *data, *cells, *tensors, *describe;
    Py_ssize_t data_offset, data_bytes, cells_offset, slots;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OnnOnnOO", names, &data, &data_offset, &data_bytes, &cells,
                                     &cells_offset, &slots, &tensors, &describe))
        return NULL;
    struct mapping *data_mapping = mapping_with(data, data_offset, data_bytes, 1), *cells_mapping = NULL;
    if (data_mapping != NULL)
        cells_mapping = mapping_with(cells, cells_offset, slots, sizeof(uint64_t));
    const struct tensors *library = cells_mapping == NULL ? NULL : tensors_of(tensors);
    if (library == NULL)
        return NULL;
    if (data_bytes <= 0 || data_bytes % BLOCK_ALIGNMENT != 0)
        return refuse("bad_capacity", "(n)", data_bytes);
    if (slots <= 0 || slots > INT32_MAX)
        return refuse("outside_of_mapping", "(nn)", cells_offset, slots);
    Loans *self = (Loans *)PyType_GenericAlloc(type, 0);
    if (self == NULL)
        return NULL;
    self->tensors = Py_NewRef(tensors);
    self->describe = Py_NewRef(describe);
    self->library = library;
    self->loans = loans_make(data_mapping, (size_t)data_offset, (size_t)data_bytes, cells_mapping,
                             (size_t)cells_offset, (int32_t)slots);
    if (self->loans == NULL)
        PyErr_NoMemory();
    if (self->loans == NULL || !find_tensor_methods(self))
        Py_CLEAR(self);
    return (PyObject *)self;
}

static void loans_dealloc(PyObject *object)
{
    Loans *self = (Loans *)object;
    if (self->loans != NULL)
        loans_drop(self->loans);
    Py_XDECREF(self->tensors);
    Py_XDECREF(self->describe);
    Py_XDECREF(self->is_neg);
    Py_XDECREF(self->is_conj);
    Py_XDECREF(self->untyped_storage);
    Py_XDECREF(self->storage_offset);
    free_object(object);
}

static struct loans *loans_in(PyObject *self)
{
    return ((Loans *)self)->loans;
}

/* lend(shape, dtype): a tensor, or None without room, and for what memory/send_arena.py is to look at. */
static PyObject *loans_lend(PyObject *object, PyObject *const *arguments, Py_ssize_t count)
{
    Loans *self = (Loans *)object;
    struct extent extent;
    const struct dtype_row *row = count == 2 ? row_of_dtype(self->library, arguments[1]) : NULL;
    if (row == NULL || !read_extent(arguments[0], row->itemsize, &extent))
        Py_RETURN_NONE;
    struct loan *loan = loans_claim(self->loans, extent.nbytes, false);
    if (loan == NULL)
        Py_RETURN_NONE;
    return make_tensor_over(self->library, &loan->view, self->loans->data + loan->block->offset, row, &extent);
}

bool is_loans(PyObject *object)
{
    return PyObject_TypeCheck(object, loans_type);
}

bool loans_were_cut(PyObject *object)
{
    return mapping_was_cut(loans_in(object)->data_mapping);
}

/* export(tensor, out): append a tensor's descriptor to out, and hold it. How many bytes were copied in: 0 for a loan's.
 * None, with nothing done, without room, and for what memory/send_arena.py is to look at. */
static PyObject *loans_export(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    struct held result;
    if (count != 2 || !PyList_Check(arguments[1]))
        return PyErr_Format(PyExc_TypeError, "%zd", count);
    int done = export_tensor(self, arguments[0], arguments[1], &result);
    if (done <= 0)
        return done < 0 ? NULL : Py_NewRef(Py_None);
    return PyLong_FromLongLong(result.is_copy ? result.nbytes : 0);
}

/* claim(nbytes): a block to copy into, or None without room. */
static PyObject *loans_claim_method(PyObject *self, PyObject *argument)
{
    int overflow;
    long long nbytes = PyLong_AsLongLongAndOverflow(argument, &overflow);
    if (nbytes == -1 && PyErr_Occurred())
        return NULL;
    if (overflow > 0)
        Py_RETURN_NONE;
    if (nbytes <= 0)
        return refuse("empty_claim", "(O)", argument);
    Claim *claim = claim_copy(self, nbytes);
    if (claim == NULL || claim->loan != NULL)
        return (PyObject *)claim;
    Py_DECREF(claim);
    Py_RETURN_NONE;
}

/* give_back(claim): undo it, unless it is held or was given back already. */
static PyObject *loans_give_back_method(PyObject *Py_UNUSED(self), PyObject *argument)
{
    if (!Py_IS_TYPE(argument, claim_type))
        return PyErr_Format(PyExc_TypeError, "%R", argument);
    Claim *claim = (Claim *)argument;
    if (claim->loan != NULL)
        loans_give_back(claim->loan);
    claim->loan = NULL;
    Py_RETURN_NONE;
}

static PyObject *hold_claim(Loans *self, Claim *claim, int64_t offset, PyObject *shape, PyObject *name, PyObject *out)
{
    if (claim->owner != self || claim->loan == NULL)
        return refuse("block_not_held", "(L)", claim->offset);
    PyObject *held = hold_by_descriptor(self, claim->loan, NULL, offset, Py_NewRef(shape), name, out);
    if (held == Py_True)
        claim->loan = NULL;
    return held;
}

/* hold(what, offset, shape, dtype, out): hold the loan that begins at an address, or a claim, which is used up, by a
 * descriptor of what lies at an offset in the data area. True; False without a free slot; None without such a loan. */
static PyObject *loans_hold_method(PyObject *object, PyObject *parameters)
{
    Loans *self = (Loans *)object;
    long long offset;
    PyObject *what, *shape, *name, *out;
    if (!PyArg_ParseTuple(parameters, "OLO!UO!", &what, &offset, &PyTuple_Type, &shape, &name, &PyList_Type, &out))
        return NULL;
    if (Py_IS_TYPE(what, claim_type))
        return hold_claim(self, (Claim *)what, offset, shape, name, out);
    void *start = PyLong_AsVoidPtr(what);
    if (start == NULL && PyErr_Occurred())
        return NULL;
    struct loan *loan = loans_find(self->loans, start);
    if (loan == NULL)
        Py_RETURN_NONE;
    return hold_by_descriptor(self, loan, start, offset, Py_NewRef(shape), name, out);
}

static PyObject *loans_has(PyObject *self, PyObject *argument)
{
    void *start = PyLong_AsVoidPtr(argument);
    if (start == NULL && PyErr_Occurred())
        return NULL;
    return PyBool_FromLong(loans_find(loans_in(self), start) != NULL);
}

static PyObject *loans_end_hold_method(PyObject *self, PyObject *parameters)
{
    unsigned long long slot, sequence;
    if (!PyArg_ParseTuple(parameters, "KK", &slot, &sequence))
        return NULL;
    loans_end_hold(loans_in(self), slot, sequence);
    Py_RETURN_NONE;
}

static PyObject *loans_collect_method(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    loans_collect(loans_in(self));
    Py_RETURN_NONE;
}

static PyObject *loans_has_room(PyObject *self, PyObject *argument)
{
    int overflow;
    long long nbytes = PyLong_AsLongLongAndOverflow(argument, &overflow);
    if (nbytes == -1 && PyErr_Occurred())
        return NULL;
    return PyBool_FromLong(overflow == 0 && allocator_has_room(&loans_in(self)->allocator, nbytes));
}

static PyObject *loans_largest_gap(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    return PyLong_FromLongLong(allocator_largest_gap(&loans_in(self)->allocator));
}

static PyObject *loans_oldest_s(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    const struct loans *loans = loans_in(self);
    return PyFloat_FromDouble(loans->oldest == NO_SLOT ? 0.0 : clock_seconds() - loans->holds[loans->oldest].since);
}

static PyObject *loans_capacity(PyObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(loans_in(self)->allocator.capacity);
}

static PyObject *loans_blocks(PyObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(loans_in(self)->allocator.held_count);
}

static PyObject *loans_held_by_peer(PyObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(loans_in(self)->held_count);
}

static PyObject *loans_has_slot(PyObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(loans_in(self)->free_count > 0);
}

static PyObject *loans_know_tensors(PyObject *Py_UNUSED(self), void *Py_UNUSED(closure))
{
    Py_RETURN_TRUE;
}

static PyGetSetDef loans_attributes[] = {
    {"knows_tensors", loans_know_tensors, NULL, NULL, NULL},
    {"capacity", loans_capacity, NULL, NULL, NULL},
    {"blocks", loans_blocks, NULL, NULL, NULL},
    {"held_by_peer", loans_held_by_peer, NULL, NULL, NULL},
    {"has_slot", loans_has_slot, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef loans_methods[] = {
    {"lend", (PyCFunction)(void (*)(void))loans_lend, METH_FASTCALL, NULL},
    {"export", (PyCFunction)(void (*)(void))loans_export, METH_FASTCALL, NULL},
    {"give_back", loans_give_back_method, METH_O, NULL},
    {"hold", loans_hold_method, METH_VARARGS, NULL},
    {"claim", loans_claim_method, METH_O, NULL},
    {"has", loans_has, METH_O, NULL},
    {"end_hold", loans_end_hold_method, METH_VARARGS, NULL},
    {"collect", loans_collect_method, METH_NOARGS, NULL},
    {"has_room", loans_has_room, METH_O, NULL},
    {"largest_gap", loans_largest_gap, METH_NOARGS, NULL},
    {"oldest_s", loans_oldest_s, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot loans_slots[] = {
    {Py_tp_new, loans_new},
    {Py_tp_dealloc, loans_dealloc},
    {Py_tp_methods, loans_methods},
    {Py_tp_getset, loans_attributes},
    {0, NULL},
};

static PyType_Spec loans_spec = {
    .name = "shmtransport.core._native.Loans",
    .basicsize = sizeof(Loans),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = loans_slots,
};

int add_loans_types(PyObject *module)
{
    if (!make_type_once(&claim_type, &claim_spec) || !make_type_once(&loans_type, &loans_spec))
        return -1;
    return PyModule_AddObjectRef(module, "Loans", (PyObject *)loans_type);
}
