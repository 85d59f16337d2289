/* Makes requests and replies: with Python's help, see core/codec.py's encode_request, or alone, where nothing in one
 * needs it. */
#ifndef SHMTRANSPORT_ENCODING_H
#define SHMTRANSPORT_ENCODING_H

#include "module.h"

#include "counters.h"
#include "loans_type.h"
#include "packer.h"

#define MOST_HELD 32 /* tensors of a message that is made alone */

struct encoder {
    struct packer packer;
    PyObject *loans;          /* NULL where pack exports all tensors */
    struct sent_tensors sent; /* those that were exported here */
    /* with Python's help: */
    PyObject *pack;
    PyObject *descriptors; /* a list */
    /* alone: */
    struct packer described;
    uint32_t held_count;
    struct {
        uint64_t slot, sequence;
    } held[MOST_HELD];
};

/* Make a message whose tensors this connection's loans hold: 1, and its bytes are the packer's; to be ended or undone.
 * 0 with nothing done where Python's help is needed, or something is refused; -1 with an error set. The keywords may be
 * NULL. */
int encode_request_alone(struct encoder *encoder, PyObject *loans, uint64_t call_id, PyObject *method,
                         PyObject *arguments, PyObject *keywords);
int encode_reply_alone(struct encoder *encoder, PyObject *loans, uint64_t call_id, PyObject *result);

/* Whether this can be a method's name. */
bool is_method_name(PyObject *method);

void encoder_end(struct encoder *encoder);

/* Take its tensors back, and end it. */
void encoder_undo(struct encoder *encoder);

#endif
