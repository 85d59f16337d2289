/* Pinned host memory: registered, or allocated by the driver. Refused: flags that CUDA doesn't know, memory that isn't
   mapped, memory that can't be written unless READ_ONLY is said, and bytes that are registered already.
   Memory that is unmapped before it is unregistered, or unregistered while a queued copy needs it, is counted. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/mman.h>

#include "calls.h"
#include "counters.h"
#include "streams.h"

enum { REGISTER_FLAGS = HOST_PORTABLE | HOST_DEVICEMAP | HOST_IOMEMORY | HOST_READ_ONLY };
enum { ALLOC_FLAGS = HOST_PORTABLE | HOST_DEVICEMAP | HOST_WRITE_COMBINED };

static CUresult register_memory(uintptr_t base, size_t size, unsigned flags)
{
    if (base == 0 || size == 0 || base + size < base || flags & ~(unsigned)REGISTER_FLAGS)
        return CUDA_ERROR_INVALID_VALUE;
    if (overlaps_host_range(base, size))
        return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    if (size > settings.register_limit)
        return CUDA_ERROR_OUT_OF_MEMORY;
    struct mapping mapping = mapping_of(base, size);
    if (!mapping.whole || (!mapping.writable && !(flags & HOST_READ_ONLY)))
        return CUDA_ERROR_INVALID_VALUE;
    struct range *range = range_add(REGISTERED_MEMORY, base, size, this_context());
    if (range == NULL)
        return CUDA_ERROR_OUT_OF_MEMORY;
    range->flags = flags;
    range->mapping = mapping;
    return CUDA_SUCCESS;
}

CUresult cuMemHostRegister_v2(void *memory, size_t size, unsigned flags)
{
    ENTER(cuMemHostRegister, CURRENT_CONTEXT);
    lock();
    CUresult result = register_memory((uintptr_t)memory, size, flags);
    unlock();
    return result;
}

CUresult cuMemHostUnregister(void *memory)
{
    ENTER(cuMemHostUnregister, CURRENT_CONTEXT);
    lock();
    struct range *range = range_at(REGISTERED_MEMORY, (uintptr_t)memory);
    if (range != NULL) {
        range_take_out(range);
        counters.unmapped_while_registered += has_lost_memory(range);
        counters.unregistered_in_use += is_in_use(range->base, range->size);
        free(range);
    }
    unlock();
    return range == NULL ? CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED : CUDA_SUCCESS;
}

static CUresult allocate(void **out, size_t size, unsigned flags)
{
    if (size == 0 || flags & ~(unsigned)ALLOC_FLAGS)
        return CUDA_ERROR_INVALID_VALUE;
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return CUDA_ERROR_OUT_OF_MEMORY;
    poison((uintptr_t)memory, size, POISON_NEW);
    lock();
    struct range *range = range_add(HOST_MEMORY, (uintptr_t)memory, size, this_context());
    if (range != NULL)
        range->flags = flags;
    unlock();
    *out = memory;
    return range == NULL ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult cuMemHostAlloc(void **out, size_t size, unsigned flags)
{
    ENTER(cuMemHostAlloc, CURRENT_CONTEXT);
    return allocate(out, size, flags);
}

CUresult cuMemAllocHost_v2(void **out, size_t size)
{
    ENTER(cuMemAllocHost, CURRENT_CONTEXT);
    return allocate(out, size, 0);
}

CUresult cuMemFreeHost(void *memory)
{
    ENTER(cuMemFreeHost, CURRENT_CONTEXT);
    lock();
    struct range *range = range_at(HOST_MEMORY, (uintptr_t)memory);
    if (range != NULL) {
        range_take_out(range);
        while (is_in_use(range->base, range->size) && !settings.stall && !is_lost())
            wait_change();
        if (!is_in_use(range->base, range->size))
            munmap(memory, range->size);
        free(range);
    }
    unlock();
    return range == NULL ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *out, void *memory, unsigned flags)
{
    ENTER(cuMemHostGetDevicePointer, CURRENT_CONTEXT);
    lock();
    struct range *range = range_with((uintptr_t)memory);
    bool is_host = range != NULL && range->kind != DEVICE_MEMORY;
    unlock();
    if (flags != 0 || !is_host)
        return CUDA_ERROR_INVALID_VALUE;
    *out = (uintptr_t)memory;
    return CUDA_SUCCESS;
}

CUresult cuMemHostGetFlags(unsigned *flags, void *memory)
{
    ENTER(cuMemHostGetFlags, CURRENT_CONTEXT);
    lock();
    struct range *range = range_with((uintptr_t)memory);
    bool is_host = range != NULL && range->kind != DEVICE_MEMORY;
    if (is_host)
        *flags = range->flags;
    unlock();
    return is_host ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
