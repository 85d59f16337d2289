/* Device memory: allocated and freed at once, or in the order of a stream. cuMemFree waits for all that is queued;
   what is freed is refused by every call from then on, whenever the free is carried out. */
#include "calls.h"
#include "pools.h"

static struct pool *current[MOST_DEVICES]; /* set by cuDeviceSetMemPool */

struct pool *pool_of(CUdevice device)
{
    return current[device] != NULL ? current[device] : default_pool(device);
}

static CUresult take(struct pool *pool, size_t size, struct stream *stream, CUdeviceptr *out)
{
    return pool == NULL ? CUDA_ERROR_OUT_OF_MEMORY : pool_take(pool, size, stream, out);
}

CUresult cuMemAlloc_v2(CUdeviceptr *out, size_t size)
{
    ENTER(cuMemAlloc, CURRENT_CONTEXT);
    lock();
    struct context *context = this_context();
    CUresult result = CUDA_ERROR_INVALID_CONTEXT;
    if (context != NULL)
        result = take(default_pool(context->device), size, NULL, out);
    unlock();
    return result;
}

CUresult cuMemAllocAsync(CUdeviceptr *out, size_t size, CUstream handle)
{
    ENTER(cuMemAllocAsync, CURRENT_CONTEXT);
    lock();
    struct stream *stream = stream_find(handle);
    CUresult result = CUDA_ERROR_INVALID_HANDLE;
    if (stream != NULL)
        result = take(pool_of(stream->context->device), size, stream, out);
    unlock();
    return result;
}

CUresult cuMemAllocFromPoolAsync(CUdeviceptr *out, size_t size, CUmemoryPool from, CUstream handle)
{
    ENTER(cuMemAllocFromPoolAsync, CURRENT_CONTEXT);
    lock();
    struct stream *stream = stream_find(handle);
    struct pool *pool = object_find(POOL, from);
    CUresult result = stream == NULL ? CUDA_ERROR_INVALID_HANDLE : CUDA_ERROR_INVALID_VALUE;
    if (stream != NULL && pool != NULL)
        result = take(pool, size, stream, out);
    unlock();
    return result;
}

/* NULL with CUDA_SUCCESS: an import that is still open once more. */
static struct range *let_go(CUdeviceptr pointer, CUresult *result)
{
    struct range *range = range_at(DEVICE_MEMORY, (uintptr_t)pointer);
    *result = range == NULL ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
    if (range == NULL)
        return NULL;
    if (range->imports > 1) {
        range->imports--;
        return NULL;
    }
    range_take_out(range);
    if (range->imports == 0)
        release_export(range);
    return range;
}

CUresult cuMemFree_v2(CUdeviceptr pointer)
{
    ENTER(cuMemFree, CURRENT_CONTEXT);
    CUresult result = CUDA_SUCCESS;
    lock();
    struct range *range = let_go(pointer, &result);
    if (range != NULL && !settings.stall && this_context() != NULL)
        result = context_wait_idle(this_context());
    if (range != NULL)
        pool_reclaim(range);
    unlock();
    return result;
}

CUresult cuMemFreeAsync(CUdeviceptr pointer, CUstream handle)
{
    ENTER(cuMemFreeAsync, CURRENT_CONTEXT);
    CUresult result = CUDA_ERROR_INVALID_HANDLE;
    lock();
    struct stream *stream = stream_find(handle);
    struct range *range = stream == NULL ? NULL : let_go(pointer, &result);
    if (range != NULL)
        enqueue(stream, (struct operation){.what = FREED, .range = range});
    unlock();
    return result;
}

CUresult cuMemGetInfo_v2(size_t *free, size_t *total)
{
    ENTER(cuMemGetInfo, CURRENT_CONTEXT);
    lock();
    *total = settings.device_bytes;
    *free = *total - bytes_of_device();
    unlock();
    return CUDA_SUCCESS;
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr pointer)
{
    ENTER(cuMemGetAddressRange, CURRENT_CONTEXT);
    lock();
    struct range *range = range_with((uintptr_t)pointer);
    if (range != NULL && base != NULL)
        *base = range->base;
    if (range != NULL && size != NULL)
        *size = range->size;
    unlock();
    return range == NULL ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

/* A device's pools */

CUresult cuDeviceGetDefaultMemPool(CUmemoryPool *out, CUdevice device)
{
    ENTER(cuDeviceGetDefaultMemPool, INITIALISED);
    if (!is_device(device))
        return CUDA_ERROR_INVALID_DEVICE;
    lock();
    struct pool *pool = default_pool(device);
    if (pool != NULL)
        *out = pool->object.handle;
    unlock();
    return pool == NULL ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult cuDeviceGetMemPool(CUmemoryPool *out, CUdevice device)
{
    ENTER(cuDeviceGetMemPool, INITIALISED);
    if (!is_device(device))
        return CUDA_ERROR_INVALID_DEVICE;
    lock();
    struct pool *pool = pool_of(device);
    if (pool != NULL)
        *out = pool->object.handle;
    unlock();
    return pool == NULL ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult cuDeviceSetMemPool(CUdevice device, CUmemoryPool handle)
{
    ENTER(cuDeviceSetMemPool, INITIALISED);
    if (!is_device(device))
        return CUDA_ERROR_INVALID_DEVICE;
    lock();
    struct pool *pool = object_find(POOL, handle);
    bool fits = pool != NULL && !pool->imported && pool->device == device;
    if (fits) {
        object_hold(&pool->object);
        if (current[device] != NULL)
            object_drop(&current[device]->object);
        current[device] = pool;
    }
    unlock();
    return fits ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
