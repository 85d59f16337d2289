/* The calls on streams. A destroyed stream is CUDA_ERROR_INVALID_HANDLE; its queued work still runs. */
#include "calls.h"
#include "streams.h"

static CUresult create(CUstream *out, unsigned flags, int priority)
{
    if (flags > STREAM_NON_BLOCKING)
        return CUDA_ERROR_INVALID_VALUE;
    lock();
    struct stream *stream = stream_create(flags, priority < -5 ? -5 : priority > 0 ? 0 : priority);
    if (stream != NULL)
        *out = stream->object.handle;
    unlock();
    return stream == NULL ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream *out, unsigned flags)
{
    ENTER(cuStreamCreate, CURRENT_CONTEXT);
    return create(out, flags, 0);
}

CUresult cuStreamCreateWithPriority(CUstream *out, unsigned flags, int priority)
{
    ENTER(cuStreamCreateWithPriority, CURRENT_CONTEXT);
    return create(out, flags, priority);
}

CUresult cuStreamDestroy_v2(CUstream handle)
{
    ENTER(cuStreamDestroy, INITIALISED);
    lock();
    struct stream *stream = object_find(STREAM, handle);
    if (stream != NULL) {
        stream->retired = true;
        object_retire(&stream->object);
        changed();
    }
    unlock();
    return stream == NULL ? CUDA_ERROR_INVALID_HANDLE : CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream handle)
{
    ENTER(cuStreamSynchronize, CURRENT_CONTEXT);
    lock();
    struct stream *stream = stream_find(handle);
    CUresult result = CUDA_ERROR_INVALID_HANDLE;
    if (stream != NULL && stream->context->legacy == stream)
        result = stream_wait(stream, enqueue(stream, (struct operation){.what = MARK}));
    else if (stream != NULL)
        result = stream_wait(stream, stream->last == NULL ? 0 : stream->last->number);
    unlock();
    return result;
}

CUresult cuStreamQuery(CUstream handle)
{
    ENTER(cuStreamQuery, CURRENT_CONTEXT);
    lock();
    struct stream *stream = stream_find(handle);
    CUresult result = CUDA_ERROR_INVALID_HANDLE;
    if (stream != NULL) {
        bool is_legacy = stream->context->legacy == stream;
        bool busy = stream->first != NULL || (is_legacy && has_others_before(stream));
        result = busy ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
    }
    unlock();
    return result;
}

CUresult cuLaunchHostFunc(CUstream handle, CUhostFn function, void *data)
{
    ENTER(cuLaunchHostFunc, CURRENT_CONTEXT);
    if (function == NULL)
        return CUDA_ERROR_INVALID_VALUE;
    lock();
    struct stream *stream = stream_find(handle);
    if (stream != NULL)
        enqueue(stream, (struct operation){.what = CALL, .function = function, .data = data});
    unlock();
    return stream == NULL ? CUDA_ERROR_INVALID_HANDLE : CUDA_SUCCESS;
}

CUresult cuLaunchHostFunc_v2(CUstream stream, CUhostFn function, void *data, unsigned mode)
{
    return mode > 1 ? CUDA_ERROR_INVALID_VALUE : cuLaunchHostFunc(stream, function, data);
}

/* What a stream is */

static CUresult look(CUstream handle, struct stream *copy)
{
    lock();
    struct stream *stream = stream_find(handle);
    if (stream != NULL)
        *copy = *stream;
    unlock();
    return stream == NULL ? CUDA_ERROR_INVALID_HANDLE : CUDA_SUCCESS;
}

CUresult cuStreamGetFlags(CUstream handle, unsigned *flags)
{
    ENTER(cuStreamGetFlags, CURRENT_CONTEXT);
    struct stream stream = {0};
    CUresult result = look(handle, &stream);
    *flags = stream.flags;
    return result;
}

CUresult cuStreamGetPriority(CUstream handle, int *priority)
{
    ENTER(cuStreamGetPriority, CURRENT_CONTEXT);
    struct stream stream = {0};
    CUresult result = look(handle, &stream);
    *priority = stream.priority;
    return result;
}

CUresult cuStreamGetId(CUstream handle, unsigned long long *id)
{
    ENTER(cuStreamGetId, CURRENT_CONTEXT);
    struct stream stream = {0};
    CUresult result = look(handle, &stream);
    *id = stream.object.handle;
    return result;
}

CUresult cuStreamGetCtx(CUstream handle, CUcontext *context)
{
    ENTER(cuStreamGetCtx, CURRENT_CONTEXT);
    struct stream stream = {0};
    CUresult result = look(handle, &stream);
    *context = result == CUDA_SUCCESS ? stream.context->object.handle : 0;
    return result;
}

CUresult cuStreamGetCtx_v2(CUstream handle, CUcontext *context, uintptr_t *green)
{
    if (green != NULL)
        *green = 0;
    return cuStreamGetCtx(handle, context);
}

CUresult cuStreamGetDevice(CUstream handle, CUdevice *device)
{
    ENTER(cuStreamGetDevice, CURRENT_CONTEXT);
    struct stream stream = {0};
    CUresult result = look(handle, &stream);
    *device = result == CUDA_SUCCESS ? stream.context->device : -1;
    return result;
}

CUresult cuStreamIsCapturing(CUstream handle, int *status)
{
    ENTER(cuStreamIsCapturing, CURRENT_CONTEXT);
    struct stream stream = {0};
    *status = 0;
    return look(handle, &stream);
}
