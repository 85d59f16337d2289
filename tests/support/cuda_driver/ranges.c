/* The list of ranges. A range leaves it when it is freed or unregistered, though queued work may still use it. */
#include "ranges.h"

#include <stdlib.h>

static struct range *ranges;
static unsigned long long last_id;

struct range *range_add(enum range_kind kind, uintptr_t base, size_t size, struct context *context)
{
    struct range *range = calloc(1, sizeof *range);
    if (range == NULL)
        return NULL;
    range->kind = kind;
    range->base = base;
    range->size = size;
    range->id = ++last_id;
    range->slot = -1;
    if (context != NULL) {
        range->context = context->object.handle;
        range->device = context->device;
    }
    range->next = ranges;
    return ranges = range;
}

void range_take_out(struct range *range)
{
    struct range **place = &ranges;
    while (*place != range)
        place = &(*place)->next;
    *place = range->next;
}

struct range *range_at(enum range_kind kind, uintptr_t base)
{
    struct range *range = ranges;
    while (range != NULL && (range->kind != kind || range->base != base))
        range = range->next;
    return range;
}

struct range *range_with(uintptr_t address)
{
    struct range *range = ranges;
    while (range != NULL && address - range->base >= range->size)
        range = range->next;
    return range;
}

bool ranges_overlap(uintptr_t one, size_t one_size, uintptr_t other, size_t other_size)
{
    return one < other + other_size && other < one + one_size;
}

CUresult range_of(uintptr_t base, size_t size, struct range **found)
{
    *found = NULL;
    if (base + size < base)
        return CUDA_ERROR_INVALID_VALUE;
    for (struct range *range = ranges; range != NULL; range = range->next) {
        if (!ranges_overlap(base, size, range->base, range->size))
            continue;
        if (base < range->base || base + size > range->base + range->size)
            return CUDA_ERROR_INVALID_VALUE;
        *found = range;
    }
    return CUDA_SUCCESS;
}

bool overlaps_host_range(uintptr_t base, size_t size)
{
    for (struct range *range = ranges; range != NULL; range = range->next)
        if (range->kind != DEVICE_MEMORY && ranges_overlap(base, size, range->base, range->size))
            return true;
    return false;
}

static unsigned long long bytes_of(enum range_kind kind, bool imported)
{
    unsigned long long bytes = 0;
    for (struct range *range = ranges; range != NULL; range = range->next)
        if (range->kind == kind && (range->imports > 0) == imported)
            bytes += range->size;
    return bytes;
}

unsigned long long bytes_of_device(void)
{
    return bytes_of(DEVICE_MEMORY, false);
}

unsigned long long bytes_imported(void)
{
    return bytes_of(DEVICE_MEMORY, true);
}

unsigned long long bytes_registered(void)
{
    return bytes_of(REGISTERED_MEMORY, false);
}

unsigned long long bytes_of_host(void)
{
    return bytes_of(HOST_MEMORY, false);
}

bool has_lost_memory(struct range *range)
{
    struct mapping was = range->mapping, now = mapping_of(range->base, range->size);
    return !now.whole || now.device != was.device || now.inode != was.inode || now.offset != was.offset;
}

unsigned long long registrations_without_memory(void)
{
    unsigned long long gone = 0;
    for (struct range *range = ranges; range != NULL; range = range->next)
        gone += range->kind == REGISTERED_MEMORY && has_lost_memory(range);
    return gone;
}
