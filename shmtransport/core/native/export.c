/* Exporting tensors: those of loans in place, plain ones by a copy, and all others not at all.
 *
 * Where a tensor or a descriptor is made, a garbage collection may run Python code that uses the same loans, and so may
 * a method of a tensor where a mode of torch is active: what was looked at before is looked at again after that.
 */
#include "loans_type.h"

#include <string.h>

#define LONG_COPY (256 << 10) /* bytes: from here on Python copies, which lets other threads run meanwhile */

static PyObject *shape_of(int dimensions, const int64_t *sizes)
{
    PyObject *shape = PyTuple_New(dimensions);
    for (int index = 0; shape != NULL && index < dimensions; index++) {
        PyObject *size = PyLong_FromLongLong(sizes[index]);
        if (size == NULL || PyTuple_SetItem(shape, index, size) < 0)
            Py_CLEAR(shape);
    }
    return shape;
}

/* Whether a tensor's loan has ended, and a look for a free slot has freed it. */
static bool is_gone(const struct loans *loans, const struct loan *loan, const void *start)
{
    return start != NULL && loans_find(loans, start) != loan;
}

/* Whether the next hold still gets this slot and sequence. */
static bool is_next(const struct loans *loans, int32_t slot, uint64_t sequence)
{
    return loans->sequence + 1 == sequence && loans->free_count > 0
        && loans->free_slots[loans->free_count - 1] == slot;
}

static PyObject *hold_shape(Loans *self, struct loan *loan, const void *start, int64_t offset, PyObject *shape,
                            PyObject *name, PyObject *out)
{
    struct loans *loans = self->loans;
    for (;;) {
        int32_t slot = loans_next_slot(loans);
        uint64_t sequence = loans->sequence + 1;
        if (is_gone(loans, loan, start))
            Py_RETURN_NONE;
        if (slot == NO_SLOT)
            Py_RETURN_FALSE;
        PyObject *descriptor = PyObject_CallFunction(self->describe, "LOOiK", (long long)offset, shape, name, (int)slot,
                                                     (unsigned long long)sequence);
        if (descriptor == NULL)
            return NULL;
        bool is_current = is_next(loans, slot, sequence) && !is_gone(loans, loan, start);
        int failed = is_current ? PyList_Append(out, descriptor) : 0;
        Py_DECREF(descriptor);
        if (failed)
            return NULL;
        if (is_current) {
            loans_hold(loans, loan, slot);
            Py_RETURN_TRUE;
        }
    } /* an inner call was faster */
}

PyObject *hold_by_descriptor(Loans *self, struct loan *loan, const void *start, int64_t offset, PyObject *shape,
                             PyObject *name, PyObject *out)
{
    PyObject *held = shape == NULL ? NULL : hold_shape(self, loan, start, offset, shape, name, out);
    Py_XDECREF(shape);
    return held;
}

/* Whether a method of a tensor says yes; -1 with an error set. */
static int says_yes(PyObject *method, PyObject *tensor)
{
    PyObject *answer = PyObject_CallFunctionObjArgs(method, tensor, NULL);
    int yes = answer == NULL ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    return yes;
}

static bool is_contiguous(const struct dl_tensor *tensor)
{
    int64_t expected = 1;
    for (int index = tensor->dimensions - 1; index >= 0; index--) {
        if (tensor->shape[index] <= 0 || (tensor->shape[index] != 1 && tensor->strides[index] != expected)
            || expected > INT64_MAX / tensor->shape[index])
            return false;
        expected *= tensor->shape[index];
    }
    return true;
}

/* Describe a tensor of plain, contiguous elements in this process's memory; false for any other, without an error. */
static bool describe(Loans *self, PyObject *object, struct dl_tensor *tensor, const struct dtype_row **row,
                     int64_t *nbytes)
{
    if (!Py_IS_TYPE(object, self->library->type))
        return false;
    if (self->library->exchange->describe(object, tensor) != 0) {
        PyErr_Clear();
        return false;
    }
    *row = row_described(self->library, tensor->dtype);
    if (*row == NULL || tensor->device_type != DL_CPU || tensor->dimensions > MAX_DIMENSIONS
        || tensor->byte_offset != 0 || tensor->data == NULL || !is_contiguous(tensor))
        return false;
    *nbytes = (*row)->itemsize;
    for (int index = 0; index < tensor->dimensions; index++)
        if (__builtin_mul_overflow(*nbytes, tensor->shape[index], nbytes))
            return false;
    return true;
}

/* Whether the elements of a tensor are what its bytes say; -1 with an error set. */
static int is_plain(Loans *self, PyObject *tensor, const struct dtype_row *row)
{
    int is_lazy = says_yes(self->is_neg, tensor);
    if (is_lazy == 0 && row->described.code == DL_COMPLEX)
        is_lazy = says_yes(self->is_conj, tensor);
    return is_lazy < 0 ? -1 : !is_lazy;
}

/* What a method returns as an integer; -1 with an error set. */
static long long ask(PyObject *method, PyObject *object)
{
    PyObject *answer = method == NULL ? NULL : PyObject_CallFunctionObjArgs(method, object, NULL);
    long long number = answer == NULL ? -1 : PyLong_AsLongLong(answer);
    Py_XDECREF(answer);
    return number;
}

/* Whether a tensor's storage, which may have been freed or cut, holds all of it; -1 with an error set. */
static int is_in_storage(Loans *self, PyObject *tensor, int64_t itemsize, int64_t nbytes)
{
    long long offset = ask(self->storage_offset, tensor), size = -1;
    PyObject *storage = offset < 0 ? NULL : PyObject_CallFunctionObjArgs(self->untyped_storage, tensor, NULL);
    PyObject *answer = storage == NULL ? NULL : PyObject_CallMethod(storage, "nbytes", NULL);
    if (answer != NULL)
        size = PyLong_AsLongLong(answer);
    Py_XDECREF(answer);
    Py_XDECREF(storage);
    if (PyErr_Occurred())
        return -1;
    return offset >= 0 && size >= nbytes && offset <= (size - nbytes) / itemsize;
}

/* A tensor that is being looked at, and what is known of it. */
struct found {
    struct dl_tensor tensor;
    const struct dtype_row *row;
    int64_t nbytes;
};

/* Find a plain tensor that can be sent as it is: 1; 0 for any other; -1 with an error set. What was found is true until
 * the next piece of Python code. */
static int find_plain(Loans *self, PyObject *object, struct found *found)
{
    if (!describe(self, object, &found->tensor, &found->row, &found->nbytes))
        return 0;
    int is_sent = is_plain(self, object, found->row);
    if (is_sent == 1 && loans_find(self->loans, found->tensor.data) == NULL)
        is_sent = is_in_storage(self, object, found->row->itemsize, found->nbytes);
    if (is_sent <= 0)
        return is_sent;
    int64_t looked_at = found->nbytes;
    return describe(self, object, &found->tensor, &found->row, &found->nbytes) /* again: a mode of torch may run Python */
        && found->nbytes == looked_at;
}

/* The loan to hold: that of the tensor, or of a copy of it that is made here; NULL where there is none. */
static struct loan *loan_to_hold(struct loans *loans, const struct found *found)
{
    const void *data = found->tensor.data;
    struct loan *loan = loans_find(loans, data);
    if (loan != NULL)
        return found->nbytes > loan->block->nbytes ? NULL : loan;
    if (found->nbytes >= LONG_COPY || loans_contain(loans, data)) /* the latter: it does not begin where its loan does */
        return NULL;
    loan = loans_claim(loans, found->nbytes, true);
    if (loan != NULL)
        memcpy(loans->data + loan->block->offset, data, (size_t)found->nbytes);
    return loan;
}

int hold_tensor(PyObject *object, PyObject *exported, struct held *held)
{
    Loans *self = (Loans *)object;
    struct loans *loans = self->loans;
    struct found found;
    int is_plain = find_plain(self, exported, &found);
    if (is_plain <= 0)
        return is_plain;
    if (loans_next_slot(loans) == NO_SLOT) /* first: that look may free a loan */
        return 0;
    struct loan *loan = loan_to_hold(loans, &found);
    if (loan == NULL)
        return 0;
    int32_t slot = loans->free_slots[loans->free_count - 1]; /* a claim may have freed others */
    loans_hold(loans, loan, slot);
    held->offset = loan->block->offset;
    held->nbytes = found.nbytes;
    held->row = found.row;
    held->dimensions = found.tensor.dimensions;
    memcpy(held->sizes, found.tensor.shape, (size_t)held->dimensions * sizeof *held->sizes);
    held->slot = slot;
    held->sequence = loans->sequence;
    held->is_copy = loan->is_copy;
    return 1;
}

void end_held(PyObject *loans, uint64_t slot, uint64_t sequence)
{
    loans_end_hold(((Loans *)loans)->loans, slot, sequence);
}

int export_tensor(PyObject *object, PyObject *exported, PyObject *out, struct held *held)
{
    int is_held = hold_tensor(object, exported, held);
    if (is_held <= 0)
        return is_held;
    PyObject *shape = shape_of(held->dimensions, held->sizes), *descriptor = NULL;
    if (shape != NULL)
        descriptor = PyObject_CallFunction(((Loans *)object)->describe, "LNOiK", (long long)held->offset, shape,
                                           held->row->name, (int)held->slot, (unsigned long long)held->sequence);
    int failed = descriptor == NULL || PyList_Append(out, descriptor) < 0;
    Py_XDECREF(descriptor);
    if (failed)
        end_held(object, (uint64_t)held->slot, held->sequence);
    return failed ? -1 : 1;
}
