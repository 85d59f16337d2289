/* One tensor in a message: memory/descriptor.py's TensorDescriptor, as far as it can be read without knowing an arena. */
#ifndef SHMTRANSPORT_DESCRIPTOR_H
#define SHMTRANSPORT_DESCRIPTOR_H

#include <stdbool.h>
#include <stdint.h>

#include "layout.h"
#include "unpacker.h"

struct descriptor {
    uint64_t offset, slot, sequence;
    uint64_t shape[MAX_DIMENSIONS];
    uint32_t dimensions;
    struct token dtype; /* a text */
};

/* Read the next value as a descriptor, all of whose integers are below 2**63; false if it is none. */
bool take_descriptor(struct unpacker *unpacker, struct descriptor *descriptor);

#endif
