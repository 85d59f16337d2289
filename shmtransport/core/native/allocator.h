/* Claims and releases byte ranges of a data area: integers only, no memory of that area, no Python.
 *
 * The rules are those of core/allocator.py, decision by decision: next-fit from the cursor, wrapping at the end,
 * stepping over held blocks; gaps that touch are joined; when nothing is held, the cursor returns to the start.
 *
 * Blocks are a list ordered by offset; a block that is no gap is held. A pointer to a held block stays valid until it
 * is released or the allocator ends. First-in-first-out use costs O(1), and no malloc once the list was that long.
 */
#ifndef SHMTRANSPORT_ALLOCATOR_H
#define SHMTRANSPORT_ALLOCATOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BLOCK_ALIGNMENT 64

struct block {
    int64_t offset; /* bytes from the area's start */
    int64_t nbytes; /* a multiple of the alignment */
    struct block *previous, *next;
    bool held;
};

struct allocator {
    int64_t capacity;
    int64_t held_count;
    struct block *first;
    struct block *cursor;
    struct block *spare; /* blocks that are in no list, linked by next */
};

/* For a capacity that is a positive multiple of the alignment; false without memory. */
bool allocator_begin(struct allocator *allocator, int64_t capacity);

void allocator_end(struct allocator *allocator);

/* Whether there is memory for one more block in the list; to be asked before a claim. */
bool allocator_prepare(struct allocator *allocator);

/* A block of at least nbytes > 0 bytes, or NULL if no gap is large enough. */
struct block *allocator_claim(struct allocator *allocator, int64_t nbytes);

/* For a held block of this allocator only. */
void allocator_release(struct allocator *allocator, struct block *block);

/* Whether a claim would find a gap. */
bool allocator_has_room(const struct allocator *allocator, int64_t nbytes);

int64_t allocator_largest_gap(const struct allocator *allocator);

#endif
