/* Copies and fills. An asynchronous one poisons its destination when it is queued, or when its turn comes if work that
   is queued may still use those bytes; then it is carried out late. With pageable memory it is synchronous, and
   counted. A range that leaves a registration, or a read-only destination, is CUDA_ERROR_INVALID_VALUE. */
#include "calls.h"
#include "counters.h"
#include "streams.h"

enum route { ANY, HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE };

static bool takes(enum route route, struct range *to, struct range *from)
{
    bool into_host = to == NULL || to->kind != DEVICE_MEMORY;
    bool out_of_host = from == NULL || from->kind != DEVICE_MEMORY;
    if (to != NULL && to->kind == REGISTERED_MEMORY && to->flags & HOST_READ_ONLY)
        return false;
    switch (route) {
    case HOST_TO_DEVICE:
        return to != NULL && out_of_host;
    case DEVICE_TO_HOST:
        return from != NULL && into_host;
    case DEVICE_TO_DEVICE:
        return to != NULL && from != NULL;
    default:
        return true;
    }
}

static CUresult queue_copy(struct stream *stream, struct operation copy, struct range *to, bool pageable, bool async)
{
    copy.is_late = async;
    if (async && to != NULL) {
        copy.poisons_late = is_in_use(copy.to, copy.size) || has_others_before(stream);
        if (!copy.poisons_late && !poison(copy.to, copy.size, POISON_PENDING))
            return CUDA_ERROR_INVALID_VALUE;
    }
    if (async && pageable)
        counters.pageable_copies++;
    if (async && !pageable)
        counters.async_copies++;
    uint64_t number = enqueue(stream, copy);
    return async && !pageable ? CUDA_SUCCESS : stream_wait(stream, number);
}

static CUresult copy(enum route route, uintptr_t to, uintptr_t from, size_t size, CUstream handle, bool async)
{
    struct range *into = NULL, *out_of = NULL;
    struct stream *stream = stream_find(handle);
    if (stream == NULL)
        return CUDA_ERROR_INVALID_HANDLE;
    if (size == 0)
        return CUDA_SUCCESS;
    if (to == 0 || from == 0 || range_of(to, size, &into) != CUDA_SUCCESS)
        return CUDA_ERROR_INVALID_VALUE;
    if (range_of(from, size, &out_of) != CUDA_SUCCESS || !takes(route, into, out_of))
        return CUDA_ERROR_INVALID_VALUE;
    struct operation operation = {.what = COPY, .to = to, .from = from, .size = size};
    bool in_device = into != NULL && out_of != NULL && into->kind == DEVICE_MEMORY && out_of->kind == DEVICE_MEMORY;
    return queue_copy(stream, operation, into, into == NULL || out_of == NULL, async || in_device);
}

static CUresult fill(uintptr_t to, uint32_t pattern, unsigned width, size_t count, CUstream handle)
{
    struct range *into = NULL;
    struct stream *stream = stream_find(handle);
    if (stream == NULL)
        return CUDA_ERROR_INVALID_HANDLE;
    if (count == 0)
        return CUDA_SUCCESS;
    if (to % width != 0 || range_of(to, count * width, &into) != CUDA_SUCCESS || !takes(DEVICE_TO_DEVICE, into, into))
        return CUDA_ERROR_INVALID_VALUE;
    struct operation operation = {.what = FILL, .to = to, .size = count * width, .pattern = pattern, .width = width};
    return queue_copy(stream, operation, into, false, true);
}

#define COPY_CALL(function, symbol, route, to_type, from_type)                           \
    CUresult symbol(to_type to, from_type from, size_t size)                             \
    {                                                                                    \
        ENTER(function, CURRENT_CONTEXT);                                                \
        lock();                                                                          \
        CUresult result = copy(route, (uintptr_t)to, (uintptr_t)from, size, STREAM_LEGACY, false); \
        unlock();                                                                        \
        return result;                                                                   \
    }

#define COPY_ASYNC_CALL(function, symbol, route, to_type, from_type)                     \
    CUresult symbol(to_type to, from_type from, size_t size, CUstream stream)            \
    {                                                                                    \
        ENTER(function, CURRENT_CONTEXT);                                                \
        lock();                                                                          \
        CUresult result = copy(route, (uintptr_t)to, (uintptr_t)from, size, stream, true); \
        unlock();                                                                        \
        return result;                                                                   \
    }

COPY_CALL(cuMemcpy, cuMemcpy, ANY, CUdeviceptr, CUdeviceptr)
COPY_CALL(cuMemcpyHtoD, cuMemcpyHtoD_v2, HOST_TO_DEVICE, CUdeviceptr, const void *)
COPY_CALL(cuMemcpyDtoH, cuMemcpyDtoH_v2, DEVICE_TO_HOST, void *, CUdeviceptr)
COPY_CALL(cuMemcpyDtoD, cuMemcpyDtoD_v2, DEVICE_TO_DEVICE, CUdeviceptr, CUdeviceptr)
COPY_ASYNC_CALL(cuMemcpyAsync, cuMemcpyAsync, ANY, CUdeviceptr, CUdeviceptr)
COPY_ASYNC_CALL(cuMemcpyHtoDAsync, cuMemcpyHtoDAsync_v2, HOST_TO_DEVICE, CUdeviceptr, const void *)
COPY_ASYNC_CALL(cuMemcpyDtoHAsync, cuMemcpyDtoHAsync_v2, DEVICE_TO_HOST, void *, CUdeviceptr)
COPY_ASYNC_CALL(cuMemcpyDtoDAsync, cuMemcpyDtoDAsync_v2, DEVICE_TO_DEVICE, CUdeviceptr, CUdeviceptr)

#define FILL_CALL(function, symbol, type)                                                \
    CUresult symbol(CUdeviceptr to, type value, size_t count)                            \
    {                                                                                    \
        ENTER(function, CURRENT_CONTEXT);                                                \
        lock();                                                                          \
        CUresult result = fill((uintptr_t)to, value, sizeof(type), count, STREAM_LEGACY); \
        unlock();                                                                        \
        return result;                                                                   \
    }

#define FILL_ASYNC_CALL(function, symbol, type)                                          \
    CUresult symbol(CUdeviceptr to, type value, size_t count, CUstream stream)           \
    {                                                                                    \
        ENTER(function, CURRENT_CONTEXT);                                                \
        lock();                                                                          \
        CUresult result = fill((uintptr_t)to, value, sizeof(type), count, stream);       \
        unlock();                                                                        \
        return result;                                                                   \
    }

FILL_CALL(cuMemsetD8, cuMemsetD8_v2, unsigned char)
FILL_CALL(cuMemsetD16, cuMemsetD16_v2, unsigned short)
FILL_CALL(cuMemsetD32, cuMemsetD32_v2, unsigned int)
FILL_ASYNC_CALL(cuMemsetD8Async, cuMemsetD8Async, unsigned char)
FILL_ASYNC_CALL(cuMemsetD16Async, cuMemsetD16Async, unsigned short)
FILL_ASYNC_CALL(cuMemsetD32Async, cuMemsetD32Async, unsigned int)
