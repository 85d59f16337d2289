/* A connection's loans as Python sees them, and for the encoding of its messages. */
#ifndef SHMTRANSPORT_LOANS_TYPE_H
#define SHMTRANSPORT_LOANS_TYPE_H

#include "module.h"

#include "loans.h"
#include "tensors_type.h"

typedef struct {
    PyObject_HEAD
    struct loans *loans;
    PyObject *tensors; /* keeps what the next points to */
    const struct tensors *library;
    PyObject *describe; /* makes a descriptor of (offset, shape, dtype, slot, sequence) */
    PyObject *is_neg, *is_conj, *untyped_storage, *storage_offset; /* methods of its tensors */
} Loans;

/* A block to copy into, until it is held or dropped. */
typedef struct {
    PyObject_HEAD
    Loans *owner;
    struct loan *loan; /* NULL once it is held */
    long long offset;
} Claim;

/* A block to copy into; one without a loan where there is no room; NULL with an error set. */
Claim *claim_copy(PyObject *owner, int64_t nbytes);

/* Hold a loan by a descriptor, which is appended to a list: True; False without a free slot; None if the loan has ended and
 * is gone. Takes the shape over. start is where a tensor's loan begins, and NULL for a copy, which cannot end meanwhile. */
PyObject *hold_by_descriptor(Loans *self, struct loan *loan, const void *start, int64_t offset, PyObject *shape,
                             PyObject *name, PyObject *out);

bool is_loans(PyObject *object);

struct exported {
    int64_t nbytes;
    bool is_copy; /* it was copied in */
};

/* Append a tensor's descriptor to a list, hold it, and tell what was done: 1. Without room, and for what only Python
 * knows how to send, 0 with nothing done; -1 with an error set. The first argument must be one that is_loans is true of. */
int export_tensor(PyObject *loans, PyObject *tensor, PyObject *out, struct exported *result);

#endif
