#include "allocator.h"

#include <stdlib.h>

static struct block *take_spare(struct allocator *allocator)
{
    struct block *block = allocator->spare;
    allocator->spare = block->next;
    return block;
}

static void make_spare(struct allocator *allocator, struct block *block)
{
    block->next = allocator->spare;
    allocator->spare = block;
}

static void free_list(struct block *block)
{
    while (block != NULL) {
        struct block *next = block->next;
        free(block);
        block = next;
    }
}

bool allocator_prepare(struct allocator *allocator)
{
    if (allocator->spare == NULL) {
        struct block *block = malloc(sizeof *block);
        if (block == NULL)
            return false;
        make_spare(allocator, block);
    }
    return true;
}

bool allocator_begin(struct allocator *allocator, int64_t capacity)
{
    *allocator = (struct allocator){.capacity = capacity};
    if (!allocator_prepare(allocator))
        return false;
    struct block *gap = take_spare(allocator);
    *gap = (struct block){.nbytes = capacity};
    allocator->first = allocator->cursor = gap;
    return true;
}

void allocator_end(struct allocator *allocator)
{
    free_list(allocator->first);
    free_list(allocator->spare);
    *allocator = (struct allocator){0};
}

static int64_t round_up(int64_t nbytes)
{
    return (nbytes + BLOCK_ALIGNMENT - 1) & -(int64_t)BLOCK_ALIGNMENT;
}

static struct block *next_around(const struct allocator *allocator, const struct block *block)
{
    return block->next != NULL ? block->next : allocator->first;
}

/* The next gap from the cursor on that is large enough. */
static struct block *find(const struct allocator *allocator, int64_t needed)
{
    struct block *block = allocator->cursor;
    do {
        if (!block->held && block->nbytes >= needed)
            return block;
        block = next_around(allocator, block);
    } while (block != allocator->cursor);
    return NULL;
}

/* Put a new block, the beginning of a gap, into the list before what is left of that gap. */
static struct block *split(struct allocator *allocator, struct block *gap, int64_t needed)
{
    struct block *block = take_spare(allocator);
    *block = (struct block){.offset = gap->offset, .nbytes = needed, .previous = gap->previous, .next = gap};
    if (block->previous != NULL)
        block->previous->next = block;
    else
        allocator->first = block;
    gap->previous = block;
    gap->offset += needed;
    gap->nbytes -= needed;
    return block;
}

struct block *allocator_claim(struct allocator *allocator, int64_t nbytes)
{
    if (nbytes > allocator->capacity)
        return NULL;
    int64_t needed = round_up(nbytes);
    struct block *block = find(allocator, needed);
    if (block == NULL)
        return NULL;
    if (block->nbytes > needed)
        block = split(allocator, block, needed);
    block->held = true;
    allocator->held_count++;
    allocator->cursor = next_around(allocator, block);
    return block;
}

/* Let a block grow over the gap that follows it; the cursor stays where it was, if that was in either. */
static void join_next(struct allocator *allocator, struct block *block)
{
    struct block *gap = block->next;
    block->nbytes += gap->nbytes;
    block->next = gap->next;
    if (gap->next != NULL)
        gap->next->previous = block;
    if (allocator->cursor == gap)
        allocator->cursor = block;
    make_spare(allocator, gap);
}

void allocator_release(struct allocator *allocator, struct block *block)
{
    block->held = false;
    allocator->held_count--;
    if (block->next != NULL && !block->next->held)
        join_next(allocator, block);
    if (block->previous != NULL && !block->previous->held)
        join_next(allocator, block->previous);
    if (allocator->held_count == 0)
        allocator->cursor = allocator->first;
}

bool allocator_has_room(const struct allocator *allocator, int64_t nbytes)
{
    return nbytes <= allocator->capacity && find(allocator, round_up(nbytes)) != NULL;
}

int64_t allocator_largest_gap(const struct allocator *allocator)
{
    int64_t largest = 0;
    for (const struct block *block = allocator->first; block != NULL; block = block->next)
        if (!block->held && block->nbytes > largest)
            largest = block->nbytes;
    return largest;
}
