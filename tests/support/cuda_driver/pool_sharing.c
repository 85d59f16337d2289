/* Pools and pointers that cross to another process. A pointer's 64 bytes name its pool, its place and its serial
   number; they are refused if anything was altered, if the pool is another, or if the exporter has freed it.
   An export that is freed while another process has it open is counted. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "calls.h"
#include "counters.h"
#include "pools.h"

struct pointer_data {
    uint64_t magic, pool, offset, size, serial;
    int32_t slot, unused;
    uint64_t zero, check;
};
_Static_assert(sizeof(struct pointer_data) == sizeof(CUmemPoolPtrExportData), "it must fill CUDA's bytes");

static const uint64_t MAGIC = 0x7274706475636966;

static uint64_t check_of(const struct pointer_data *data)
{
    uint64_t sum = 14695981039346656037u;
    for (size_t i = 0; i < offsetof(struct pointer_data, check); i++)
        sum = (sum ^ ((const unsigned char *)data)[i]) * 1099511628211u;
    return sum;
}

CUresult cuMemPoolExportToShareableHandle(void *out, CUmemoryPool handle, int type, unsigned long long flags)
{
    ENTER(cuMemPoolExportToShareableHandle, INITIALISED);
    lock();
    struct pool *pool = object_find(POOL, handle);
    int file = -1;
    bool valid = pool != NULL && pool->file >= 0 && !pool->imported && type == HANDLE_FILE_DESCRIPTOR && flags == 0;
    if (valid)
        file = fcntl(pool->file, F_DUPFD_CLOEXEC, 3);
    unlock();
    if (!valid)
        return CUDA_ERROR_INVALID_VALUE;
    *(int *)out = file;
    return file < 0 ? CUDA_ERROR_OPERATING_SYSTEM : CUDA_SUCCESS;
}

CUresult cuMemPoolImportFromShareableHandle(CUmemoryPool *out, void *handle, int type, unsigned long long flags)
{
    ENTER(cuMemPoolImportFromShareableHandle, INITIALISED);
    if (type != HANDLE_FILE_DESCRIPTOR || flags != 0)
        return CUDA_ERROR_INVALID_VALUE;
    CUresult result;
    lock();
    struct pool *pool = pool_import((int)(intptr_t)handle, &result);
    if (pool != NULL)
        *out = pool->object.handle;
    unlock();
    return result;
}

static bool take_slot(struct range *range)
{
    struct shared_pool *shared = range->pool->shared;
    for (int slot = 0; slot < POOL_SLOTS && range->slot < 0; slot++) {
        if (atomic_load(&shared->slots[slot].serial) != 0)
            continue;
        atomic_store(&shared->slots[slot].imports, 0);
        atomic_store(&shared->slots[slot].serial, range->id);
        range->slot = slot;
    }
    return range->slot >= 0;
}

CUresult cuMemPoolExportPointer(CUmemPoolPtrExportData *out, CUdeviceptr pointer)
{
    ENTER(cuMemPoolExportPointer, INITIALISED);
    lock();
    struct range *range = range_at(DEVICE_MEMORY, (uintptr_t)pointer);
    bool valid = range != NULL && range->imports == 0 && range->pool->file >= 0 && take_slot(range);
    if (valid) {
        struct pointer_data data = {.magic = MAGIC, .pool = range->pool->shared->id, .slot = range->slot};
        data.offset = range->base - range->pool->base;
        data.size = range->size;
        data.serial = range->id;
        data.check = check_of(&data);
        memcpy(out, &data, sizeof data);
    }
    unlock();
    return valid ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

static bool is_valid(const struct pointer_data *data, struct pool *pool)
{
    if (pool == NULL || pool->shared == NULL || data->magic != MAGIC || data->check != check_of(data))
        return false;
    if (data->pool != pool->shared->id || data->offset >= pool->size || data->size > pool->size - data->offset)
        return false;
    return data->slot >= 0 && data->slot < POOL_SLOTS && data->serial != 0 &&
           atomic_load(&pool->shared->slots[data->slot].serial) == data->serial;
}

static CUresult import(struct pool *pool, const struct pointer_data *data, CUdeviceptr *out)
{
    struct range *range = range_at(DEVICE_MEMORY, pool->base + data->offset);
    if (!pool->imported)
        return CUDA_ERROR_INVALID_VALUE;
    if (range == NULL) {
        range = range_add(DEVICE_MEMORY, pool->base + data->offset, data->size, this_context());
        if (range == NULL)
            return CUDA_ERROR_OUT_OF_MEMORY;
        range->room = data->size;
        range->id = data->serial;
        range->slot = data->slot;
        pool_insert(pool, range);
        atomic_fetch_add(&pool->shared->slots[data->slot].imports, 1);
    }
    range->imports++;
    *out = range->base;
    return CUDA_SUCCESS;
}

CUresult cuMemPoolImportPointer(CUdeviceptr *out, CUmemoryPool handle, const CUmemPoolPtrExportData *bytes)
{
    ENTER(cuMemPoolImportPointer, INITIALISED);
    struct pointer_data data;
    memcpy(&data, bytes, sizeof data);
    lock();
    struct pool *pool = object_find(POOL, handle);
    CUresult result = is_valid(&data, pool) ? import(pool, &data, out) : CUDA_ERROR_INVALID_VALUE;
    unlock();
    return result;
}

void release_import(struct range *range)
{
    struct shared_pool *shared = range->pool->shared;
    if (atomic_load(&shared->slots[range->slot].serial) == range->id)
        atomic_fetch_sub(&shared->slots[range->slot].imports, 1);
}

void release_export(struct range *range)
{
    if (range->slot < 0)
        return;
    struct shared_pool *shared = range->pool->shared;
    counters.freed_while_imported += atomic_load(&shared->slots[range->slot].imports) > 0;
    atomic_store(&shared->slots[range->slot].serial, 0);
}
