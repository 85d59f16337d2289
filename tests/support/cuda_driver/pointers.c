/* What the driver knows of an address. An address it doesn't know is an error to cuPointerGetAttribute, and all zeros
   to cuPointerGetAttributes, as in CUDA. */
#include "calls.h"
#include "pools.h"

static void write_word(void *data, uint64_t value)
{
    *(uint64_t *)data = value;
}

static CUresult get(struct range *range, int attribute, uintptr_t address, void *data)
{
    bool in_device = range->kind == DEVICE_MEMORY;
    switch (attribute) {
    case 1: /* CONTEXT: none for memory of a pool */
        write_word(data, in_device && range->pool != default_pool(range->device) ? 0 : range->context);
        return CUDA_SUCCESS;
    case 2: /* MEMORY_TYPE */
        *(unsigned *)data = in_device ? 2 : 1;
        return CUDA_SUCCESS;
    case 3: /* DEVICE_POINTER */
        write_word(data, address);
        return CUDA_SUCCESS;
    case 4: /* HOST_POINTER */
        write_word(data, in_device ? 0 : address);
        return in_device ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
    case 6:  /* SYNC_MEMOPS */
    case 8:  /* IS_MANAGED */
    case 10: /* IS_LEGACY_CUDA_IPC_CAPABLE */
    case 15: /* IS_GPU_DIRECT_RDMA_CAPABLE */
        *(unsigned char *)data = 0;
        return CUDA_SUCCESS;
    case 7: /* BUFFER_ID */
        write_word(data, range->id);
        return CUDA_SUCCESS;
    case 9: /* DEVICE_ORDINAL */
        *(int *)data = range->device;
        return CUDA_SUCCESS;
    case 11: /* RANGE_START_ADDR */
        write_word(data, range->base);
        return CUDA_SUCCESS;
    case 12: /* RANGE_SIZE */
        write_word(data, range->size);
        return CUDA_SUCCESS;
    case 13: /* MAPPED */
        *(unsigned char *)data = 1;
        return CUDA_SUCCESS;
    case 14: /* ALLOWED_HANDLE_TYPES */
        write_word(data, in_device && range->imports == 0 && range->pool->file >= 0);
        return CUDA_SUCCESS;
    case 16: /* ACCESS_FLAGS */
        *(int *)data = ACCESS_READ_WRITE;
        return CUDA_SUCCESS;
    case 17: /* MEMPOOL_HANDLE */
        write_word(data, in_device ? range->pool->object.handle : 0);
        return CUDA_SUCCESS;
    default:
        return CUDA_ERROR_NOT_SUPPORTED;
    }
}

CUresult cuPointerGetAttribute(void *data, int attribute, CUdeviceptr pointer)
{
    ENTER(cuPointerGetAttribute, INITIALISED);
    lock();
    struct range *range = range_with((uintptr_t)pointer);
    CUresult result = CUDA_ERROR_INVALID_VALUE;
    if (range != NULL)
        result = get(range, attribute, (uintptr_t)pointer, data);
    unlock();
    return result;
}

static void write_unknown(int attribute, void *data)
{
    static const int narrow[] = {6, 8, 10, 13, 15, 21};
    for (size_t i = 0; i < sizeof narrow / sizeof *narrow; i++) {
        if (narrow[i] == attribute) {
            *(unsigned char *)data = 0;
            return;
        }
    }
    if (attribute == 2 || attribute == 16)
        *(int *)data = 0;
    else if (attribute == 9)
        *(int *)data = -2;
    else
        write_word(data, 0);
}

CUresult cuPointerGetAttributes(unsigned count, const int *attributes, void **data, CUdeviceptr pointer)
{
    ENTER(cuPointerGetAttributes, INITIALISED);
    lock();
    struct range *range = range_with((uintptr_t)pointer);
    for (unsigned i = 0; i < count; i++)
        if (range == NULL || get(range, attributes[i], (uintptr_t)pointer, data[i]) != CUDA_SUCCESS)
            write_unknown(attributes[i], data[i]);
    unlock();
    return CUDA_SUCCESS;
}
