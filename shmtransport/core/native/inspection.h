/* A request or reply in a peer's bytes, looked at as a whole before anything is made of it. No Python.
 *
 * What is accepted is exactly what protocol/messages.py and values.unpack accept.
 */
#ifndef SHMTRANSPORT_INSPECTION_H
#define SHMTRANSPORT_INSPECTION_H

#include <stdbool.h>
#include <stdint.h>

#include "unpacker.h"

/* A whole message, as far as it is known without making anything. */
struct call {
    uint64_t tag, call_id;
    struct token method;       /* of a request */
    struct unpacker values;    /* where a request's arguments or a reply's result begin */
    struct unpacker tensors;   /* where the first descriptor begins */
    uint32_t tensor_count;
    bool has_arrays;           /* whether a tensor is to become an array */
};

/* Look at a message; false if it is not a valid request or reply. */
bool inspect_call(const char *bytes, size_t nbytes, struct call *call);

/* Of an extension: whether it names a tensor, and which. */
bool is_tensor(const struct token *token);
uint32_t tensor_index(const struct token *token);

/* Whether a token can be a dict's key. */
bool is_key(const struct token *token);

/* Go over a tuple's marker, if the next item is one. */
bool take_tuple_marker(struct unpacker *unpacker);

#endif
