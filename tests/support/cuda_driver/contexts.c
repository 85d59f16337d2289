/* Primary and other contexts, and each thread's stack of them. cuCtxSynchronize waits for all the context's streams,
   and is counted. A primary context keeps its handle however often it is released and retained again. */
#include "contexts.h"

#include <stdlib.h>

#include "calls.h"
#include "counters.h"
#include "streams.h"

enum { DEEPEST = 64 };
static _Thread_local CUcontext stack[DEEPEST];
static _Thread_local int depth;
static struct context *primaries[MOST_DEVICES];

CUcontext current_context(void)
{
    return depth == 0 ? 0 : stack[depth - 1];
}

struct context *this_context(void)
{
    return object_find(CONTEXT, current_context());
}

static void destroy(struct object *object)
{
    free(object);
}

static struct context *create(CUdevice device, unsigned flags)
{
    struct context *context = calloc(1, sizeof *context);
    if (context == NULL)
        return NULL;
    object_publish(&context->object, CONTEXT, destroy, false);
    context->device = device;
    context->flags = flags;
    return context;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *out, CUdevice device)
{
    ENTER(cuDevicePrimaryCtxRetain, INITIALISED);
    if (!is_device(device))
        return CUDA_ERROR_INVALID_DEVICE;
    lock();
    struct context *context = primaries[device];
    if (context == NULL)
        context = primaries[device] = create(device, 0);
    if (context != NULL) {
        context->retained++;
        *out = context->object.handle;
    }
    unlock();
    return context == NULL ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device)
{
    ENTER(cuDevicePrimaryCtxRelease, INITIALISED);
    if (!is_device(device))
        return CUDA_ERROR_INVALID_DEVICE;
    lock();
    bool was = primaries[device] != NULL && primaries[device]->retained > 0;
    if (was)
        primaries[device]->retained--;
    unlock();
    return was ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active)
{
    ENTER(cuDevicePrimaryCtxGetState, INITIALISED);
    if (!is_device(device))
        return CUDA_ERROR_INVALID_DEVICE;
    lock();
    *flags = primaries[device] == NULL ? 0 : primaries[device]->flags;
    *active = primaries[device] != NULL && primaries[device]->retained > 0;
    unlock();
    return CUDA_SUCCESS;
}

CUresult cuCtxCreate_v2(CUcontext *out, unsigned flags, CUdevice device)
{
    ENTER(cuCtxCreate, INITIALISED);
    if (!is_device(device))
        return CUDA_ERROR_INVALID_DEVICE;
    if (depth == DEEPEST)
        return CUDA_ERROR_OUT_OF_MEMORY;
    lock();
    struct context *context = create(device, flags);
    if (context != NULL)
        *out = stack[depth++] = context->object.handle;
    unlock();
    return context == NULL ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult cuCtxCreate_v4(CUcontext *out, const void *parameters, unsigned flags, CUdevice device)
{
    return parameters == NULL ? cuCtxCreate_v2(out, flags, device) : CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuCtxDestroy_v2(CUcontext handle)
{
    ENTER(cuCtxDestroy, INITIALISED);
    lock();
    struct context *context = object_find(CONTEXT, handle);
    bool ours = context != NULL && context != primaries[context->device];
    if (ours)
        object_retire(&context->object);
    unlock();
    if (ours && current_context() == handle)
        depth--;
    return ours ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

static bool is_context(CUcontext handle)
{
    lock();
    bool is = object_find(CONTEXT, handle) != NULL;
    unlock();
    return is;
}

CUresult cuCtxPushCurrent_v2(CUcontext context)
{
    ENTER(cuCtxPushCurrent, INITIALISED);
    if (!is_context(context))
        return CUDA_ERROR_INVALID_CONTEXT;
    if (depth == DEEPEST)
        return CUDA_ERROR_OUT_OF_MEMORY;
    stack[depth++] = context;
    return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent_v2(CUcontext *out)
{
    ENTER(cuCtxPopCurrent, CURRENT_CONTEXT);
    depth--;
    if (out != NULL)
        *out = stack[depth];
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context)
{
    ENTER(cuCtxSetCurrent, INITIALISED);
    if (context != 0 && !is_context(context))
        return CUDA_ERROR_INVALID_CONTEXT;
    if (depth > 0)
        depth--;
    if (context != 0)
        stack[depth++] = context;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *out)
{
    ENTER(cuCtxGetCurrent, INITIALISED);
    *out = current_context();
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice_v2(CUdevice *device, CUcontext handle)
{
    ENTER(cuCtxGetDevice, INITIALISED);
    lock();
    struct context *context = handle == 0 ? this_context() : object_find(CONTEXT, handle);
    if (context != NULL)
        *device = context->device;
    unlock();
    return context == NULL ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device)
{
    return cuCtxGetDevice_v2(device, 0);
}

CUresult cuCtxGetId(CUcontext handle, unsigned long long *id)
{
    ENTER(cuCtxGetId, INITIALISED);
    if (handle == 0)
        handle = current_context();
    *id = handle;
    return is_context(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

CUresult cuCtxGetFlags(unsigned *flags)
{
    ENTER(cuCtxGetFlags, CURRENT_CONTEXT);
    *flags = 0;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetApiVersion(CUcontext context, unsigned *version)
{
    ENTER(cuCtxGetApiVersion, INITIALISED);
    *version = (unsigned)settings.driver_version;
    return context == 0 || is_context(context) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest)
{
    ENTER(cuCtxGetStreamPriorityRange, CURRENT_CONTEXT);
    if (least != NULL)
        *least = 0;
    if (greatest != NULL)
        *greatest = -5;
    return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize_v2(CUcontext handle)
{
    ENTER(cuCtxSynchronize, INITIALISED);
    lock();
    struct context *context = handle == 0 ? this_context() : object_find(CONTEXT, handle);
    CUresult result = CUDA_ERROR_INVALID_CONTEXT;
    if (context != NULL) {
        counters.context_synchronizations++;
        result = context_wait_idle(context);
    }
    unlock();
    return result;
}

CUresult cuCtxSynchronize(void)
{
    return cuCtxSynchronize_v2(0);
}
