/* Pools: the first room that is large enough is taken. Memory is new (0xCD) when its allocation's turn comes in the
   stream, and free again (0xDD) only when its free was carried out: until then a call that needs the room waits. */
#include "pools.h"

#include <stdlib.h>

#include "state.h"

enum { GRANULARITY = 2 << 20 };
static struct pool *defaults[MOST_DEVICES];

static void destroy(struct object *object)
{
    struct pool *pool = (struct pool *)object;
    pool_unmap(pool);
    free(pool);
}

static struct pool *publish(struct pool *pool, bool hidden)
{
    pool->reuse[0] = pool->reuse[1] = pool->reuse[2] = 1;
    pool->access[pool->device] = ACCESS_READ_WRITE;
    object_publish(&pool->object, POOL, destroy, hidden);
    return pool;
}

struct pool *pool_create(CUdevice device, int handle_types, size_t size, bool hidden)
{
    struct pool *pool = calloc(1, sizeof *pool);
    if (pool == NULL)
        return NULL;
    if (size == 0 || size > settings.device_bytes)
        size = settings.device_bytes;
    pool->device = device;
    pool->size = (size + GRANULARITY - 1) / GRANULARITY * GRANULARITY;
    if (!pool_map(pool, handle_types != HANDLE_NONE)) {
        free(pool);
        return NULL;
    }
    return publish(pool, hidden);
}

struct pool *pool_import(int file, CUresult *result)
{
    struct pool *pool = calloc(1, sizeof *pool);
    *result = CUDA_ERROR_INVALID_VALUE;
    if (pool == NULL || !pool_map_import(pool, file)) {
        free(pool);
        return NULL;
    }
    pool->imported = true;
    pool->device = device_with(&pool->shared->device);
    if (pool->device < 0) {
        *result = CUDA_ERROR_INVALID_DEVICE;
        pool_unmap(pool);
        free(pool);
        return NULL;
    }
    *result = CUDA_SUCCESS;
    return publish(pool, false);
}

struct pool *default_pool(CUdevice device)
{
    if (defaults[device] == NULL)
        defaults[device] = pool_create(device, HANDLE_NONE, 0, true);
    return defaults[device];
}

void pool_insert(struct pool *pool, struct range *range)
{
    struct range **place = &pool->blocks;
    while (*place != NULL && (*place)->base < range->base)
        place = &(*place)->next_in_pool;
    range->next_in_pool = *place;
    *place = range;
    range->pool = pool;
    range->device = pool->device;
    object_hold(&pool->object);
    pool->used += range->room;
    if (pool->used > pool->used_high)
        pool->used_high = pool->used;
}

static uintptr_t find_room(struct pool *pool, size_t room)
{
    uintptr_t at = pool->base;
    for (struct range *block = pool->blocks; block != NULL && block->base - at < room; block = block->next_in_pool)
        at = block->base + block->room;
    return pool->base + pool->size - at < room ? 0 : at;
}

static bool is_freeing(struct pool *pool)
{
    for (struct range *block = pool->blocks; block != NULL; block = block->next_in_pool)
        if (range_at(DEVICE_MEMORY, block->base) != block)
            return true;
    return false;
}

CUresult pool_take(struct pool *pool, size_t size, struct stream *stream, CUdeviceptr *out)
{
    size_t room = (size + ROUND - 1) / ROUND * ROUND;
    if (size == 0 || room < size || pool->imported)
        return CUDA_ERROR_INVALID_VALUE;
    uintptr_t at;
    while ((at = find_room(pool, room)) == 0 || bytes_of_device() + room > settings.device_bytes) {
        if (!is_freeing(pool) || settings.stall || is_lost())
            return CUDA_ERROR_OUT_OF_MEMORY;
        wait_change();
    }
    struct range *range = range_add(DEVICE_MEMORY, at, size, this_context());
    if (range == NULL || !poison(at, size, POISON_NEW))
        return CUDA_ERROR_OUT_OF_MEMORY;
    range->room = room;
    pool_insert(pool, range);
    if (stream != NULL)
        enqueue(stream, (struct operation){.what = ALLOCATED, .to = at, .size = size});
    *out = at;
    return CUDA_SUCCESS;
}

void pool_reclaim(struct range *range)
{
    struct pool *pool = range->pool;
    if (range->imports > 0)
        release_import(range);
    else
        poison(range->base, range->size, POISON_FREED);
    struct range **place = &pool->blocks;
    while (*place != range)
        place = &(*place)->next_in_pool;
    *place = range->next_in_pool;
    pool->used -= range->room;
    free(range);
    object_drop(&pool->object);
    changed();
}
