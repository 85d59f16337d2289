/* Pools are created, asked and destroyed. A destroyed pool's memory stays until its last allocation is freed. */
#include <string.h>

#include "calls.h"
#include "pools.h"

static CUresult create(CUmemoryPool *out, const CUmemPoolProps *properties)
{
    static const unsigned char zeros[sizeof properties->reserved];
    bool known = properties->handleTypes == HANDLE_NONE || properties->handleTypes == HANDLE_FILE_DESCRIPTOR;
    if (properties->allocType != ALLOCATION_PINNED || memcmp(properties->reserved, zeros, sizeof zeros) != 0 || !known)
        return CUDA_ERROR_INVALID_VALUE;
    if (properties->location.type != LOCATION_DEVICE)
        return CUDA_ERROR_NOT_SUPPORTED;
    if (!is_device(properties->location.id))
        return CUDA_ERROR_INVALID_DEVICE;
    lock();
    struct pool *pool = pool_create(properties->location.id, properties->handleTypes, properties->maxSize, false);
    if (pool != NULL)
        *out = pool->object.handle;
    unlock();
    return pool == NULL ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult cuMemPoolCreate(CUmemoryPool *out, const CUmemPoolProps *properties)
{
    ENTER(cuMemPoolCreate, INITIALISED);
    return out == NULL || properties == NULL ? CUDA_ERROR_INVALID_VALUE : create(out, properties);
}

CUresult cuMemPoolDestroy(CUmemoryPool handle)
{
    ENTER(cuMemPoolDestroy, INITIALISED);
    lock();
    struct pool *pool = object_find(POOL, handle);
    bool ours = pool != NULL && !pool->object.hidden;
    if (ours)
        object_retire(&pool->object);
    unlock();
    return ours ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemPoolTrimTo(CUmemoryPool handle, size_t keep)
{
    ENTER(cuMemPoolTrimTo, INITIALISED);
    (void)keep;
    lock();
    bool valid = object_find(POOL, handle) != NULL;
    unlock();
    return valid ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

static CUresult get(struct pool *pool, int attribute, void *value)
{
    switch (attribute) {
    case 1: /* REUSE_FOLLOW_EVENT_DEPENDENCIES, REUSE_ALLOW_OPPORTUNISTIC, REUSE_ALLOW_INTERNAL_DEPENDENCIES */
    case 2:
    case 3:
        *(int *)value = pool->reuse[attribute - 1];
        return CUDA_SUCCESS;
    case 4: /* RELEASE_THRESHOLD */
        *(uint64_t *)value = pool->threshold;
        return CUDA_SUCCESS;
    case 5: /* RESERVED_MEM_CURRENT, RESERVED_MEM_HIGH: as used */
    case 7: /* USED_MEM_CURRENT */
        *(uint64_t *)value = pool->used;
        return CUDA_SUCCESS;
    case 6:
    case 8: /* USED_MEM_HIGH */
        *(uint64_t *)value = pool->used_high;
        return CUDA_SUCCESS;
    case 9: /* ALLOCATION_TYPE */
        *(int *)value = ALLOCATION_PINNED;
        return CUDA_SUCCESS;
    case 10: /* EXPORT_HANDLE_TYPES */
        *(int *)value = pool->file >= 0 && !pool->imported ? HANDLE_FILE_DESCRIPTOR : HANDLE_NONE;
        return CUDA_SUCCESS;
    case 11: /* LOCATION_ID */
        *(int *)value = pool->device;
        return CUDA_SUCCESS;
    case 12: /* LOCATION_TYPE */
        *(int *)value = LOCATION_DEVICE;
        return CUDA_SUCCESS;
    case 13: /* MAX_POOL_SIZE */
        *(uint64_t *)value = pool->size;
        return CUDA_SUCCESS;
    default:
        return CUDA_ERROR_INVALID_VALUE;
    }
}

CUresult cuMemPoolGetAttribute(CUmemoryPool handle, int attribute, void *value)
{
    ENTER(cuMemPoolGetAttribute, INITIALISED);
    lock();
    struct pool *pool = object_find(POOL, handle);
    CUresult result = pool == NULL ? CUDA_ERROR_INVALID_VALUE : get(pool, attribute, value);
    unlock();
    return result;
}

static CUresult set(struct pool *pool, int attribute, const void *value)
{
    if (attribute >= 1 && attribute <= 3)
        pool->reuse[attribute - 1] = *(const int *)value;
    else if (attribute == 4)
        pool->threshold = *(const uint64_t *)value;
    else if ((attribute == 6 || attribute == 8) && *(const uint64_t *)value == 0)
        pool->used_high = pool->used;
    else
        return CUDA_ERROR_INVALID_VALUE;
    return CUDA_SUCCESS;
}

CUresult cuMemPoolSetAttribute(CUmemoryPool handle, int attribute, void *value)
{
    ENTER(cuMemPoolSetAttribute, INITIALISED);
    lock();
    struct pool *pool = object_find(POOL, handle);
    CUresult result = pool == NULL || value == NULL ? CUDA_ERROR_INVALID_VALUE : set(pool, attribute, value);
    unlock();
    return result;
}

static bool is_access(const CUmemAccessDesc *access, struct pool *pool)
{
    if (access->location.type != LOCATION_DEVICE || !is_device(access->location.id))
        return false;
    if (access->location.id == pool->device) /* its own device's access can't be taken away */
        return access->flags == ACCESS_READ_WRITE;
    return access->flags == ACCESS_NONE || access->flags == ACCESS_READ_WRITE;
}

CUresult cuMemPoolSetAccess(CUmemoryPool handle, const CUmemAccessDesc *accesses, size_t count)
{
    ENTER(cuMemPoolSetAccess, INITIALISED);
    lock();
    struct pool *pool = object_find(POOL, handle);
    bool valid = pool != NULL && accesses != NULL;
    for (size_t i = 0; valid && i < count; i++)
        valid = is_access(&accesses[i], pool);
    for (size_t i = 0; valid && i < count; i++)
        pool->access[accesses[i].location.id] = accesses[i].flags;
    unlock();
    return valid ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemPoolGetAccess(int *flags, CUmemoryPool handle, const CUmemLocation *location)
{
    ENTER(cuMemPoolGetAccess, INITIALISED);
    lock();
    struct pool *pool = object_find(POOL, handle);
    bool valid = pool != NULL && location->type == LOCATION_DEVICE && is_device(location->id);
    if (valid)
        *flags = pool->access[location->id];
    unlock();
    return valid ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
