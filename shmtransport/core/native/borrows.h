/* Views of what the peer has sent, and their releases: no Python.
 *
 * A borrow ends on any thread, without the GIL: one store into this process's own release table, after all reads of the
 * block. Which slots are held is private memory; what the peer says is checked against it.
 */
#ifndef SHMTRANSPORT_BORROWS_H
#define SHMTRANSPORT_BORROWS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "mapping.h"
#include "views.h"

struct borrows {
    atomic_size_t references; /* of Python's object, and of each borrow */
    struct mapping *data_mapping, *cells_mapping;
    unsigned char *data;
    uint64_t data_bytes;
    _Atomic uint64_t *cells; /* the release table in this process's own segment */
    uint64_t slots;
    atomic_size_t count;
    atomic_bool abandoned; /* in a forked child, where nothing is released */
    atomic_bool is_held[]; /* by slot: whether a borrow lives that will release it */
};

struct borrow {
    struct view view; /* first, so that a pointer to it is one to the borrow */
    struct borrows *owner;
    uint64_t slot, sequence;
};

/* With one reference, and none to the mappings' own; NULL without memory. */
struct borrows *borrows_make(struct mapping *data_mapping, size_t data_offset, size_t data_bytes,
                             struct mapping *cells_mapping, size_t cells_offset, size_t slots);

void borrows_drop(struct borrows *borrows);

/* Whether a descriptor's slot is in range and not held, and its sequence is one. */
bool borrow_is_possible(const struct borrows *borrows, uint64_t slot, uint64_t sequence);

/* Begin a borrow that is possible; NULL without memory. */
struct borrow *borrow_begin(struct borrows *borrows, uint64_t slot, uint64_t sequence);

#endif
