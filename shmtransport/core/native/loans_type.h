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

/* A tensor of a message, held by its descriptor. */
struct held {
    int64_t offset, nbytes;
    const struct dtype_row *row;
    int dimensions;
    int64_t sizes[MAX_DIMENSIONS];
    int32_t slot;
    uint64_t sequence;
    bool is_copy; /* it was copied in */
};

/* Hold a tensor for a message: 1. Without room, and for what only Python knows how to send, 0 with nothing done; -1 with
 * an error set. The first argument must be one that is_loans is true of. */
int hold_tensor(PyObject *loans, PyObject *tensor, struct held *held);

/* Take back what was held for a message that is not sent. */
void end_held(PyObject *loans, uint64_t slot, uint64_t sequence);

/* As hold_tensor, and append the descriptor to a list. */
int export_tensor(PyObject *loans, PyObject *tensor, PyObject *out, struct held *held);

/* Whether the segment that it lends from has been cut short. */
bool loans_were_cut(PyObject *loans);

#endif
