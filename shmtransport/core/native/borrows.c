#include "borrows.h"

#include <stdlib.h>

struct borrows *borrows_make(struct mapping *data_mapping, size_t data_offset, size_t data_bytes,
                             struct mapping *cells_mapping, size_t cells_offset, size_t slots)
{
    struct borrows *borrows = calloc(1, sizeof *borrows + slots * sizeof *borrows->is_held);
    if (borrows == NULL)
        return NULL;
    atomic_init(&borrows->references, 1);
    borrows->data_mapping = mapping_hold(data_mapping);
    borrows->cells_mapping = mapping_hold(cells_mapping);
    borrows->data = data_mapping->start + data_offset;
    borrows->data_bytes = data_bytes;
    borrows->cells = (_Atomic uint64_t *)(void *)(cells_mapping->start + cells_offset);
    borrows->slots = slots;
    return borrows;
}

void borrows_drop(struct borrows *borrows)
{
    if (atomic_fetch_sub_explicit(&borrows->references, 1, memory_order_acq_rel) != 1)
        return;
    mapping_drop(borrows->data_mapping);
    mapping_drop(borrows->cells_mapping);
    free(borrows);
}

static void end_borrow(struct view *view)
{
    struct borrow *borrow = (struct borrow *)view;
    struct borrows *borrows = borrow->owner;
    /* First: once it is released, the peer may send another descriptor with this slot. */
    atomic_store_explicit(&borrows->is_held[borrow->slot], false, memory_order_relaxed);
    if (!atomic_load_explicit(&borrows->abandoned, memory_order_relaxed)) /* the release: after the reads of the block */
        atomic_store_explicit(&borrows->cells[borrow->slot], borrow->sequence, memory_order_release);
    atomic_fetch_sub_explicit(&borrows->count, 1, memory_order_relaxed);
    free(borrow);
    borrows_drop(borrows);
}

bool borrow_is_possible(const struct borrows *borrows, uint64_t slot, uint64_t sequence)
{
    return slot < borrows->slots && sequence != 0
        && !atomic_load_explicit(&borrows->is_held[slot], memory_order_relaxed);
}

struct borrow *borrow_begin(struct borrows *borrows, uint64_t slot, uint64_t sequence)
{
    struct borrow *borrow = malloc(sizeof *borrow);
    if (borrow == NULL)
        return NULL;
    borrow->view.ended = end_borrow;
    borrow->view.ended_early = NULL;
    borrow->owner = borrows;
    borrow->slot = slot;
    borrow->sequence = sequence;
    atomic_fetch_add_explicit(&borrows->references, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&borrows->count, 1, memory_order_relaxed);
    atomic_store_explicit(&borrows->is_held[slot], true, memory_order_relaxed);
    return borrow;
}
