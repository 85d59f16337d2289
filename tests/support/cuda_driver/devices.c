/* The devices: FAKE_CUDA_DEVICES of them, UUIDs from FAKE_CUDA_UUID (32 hexadecimal digits, several with commas).
   Without it a device's UUID follows from its number, so that two processes see the same device. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "calls.h"
#include "contexts.h"

static const struct {
    int attribute, value;
} attributes[] = {
    {1, 1024},    /* MAX_THREADS_PER_BLOCK */
    {10, 32},     /* WARP_SIZE */
    {15, 1},      /* GPU_OVERLAP */
    {16, 8},      /* MULTIPROCESSOR_COUNT */
    {19, 1},      /* CAN_MAP_HOST_MEMORY */
    {31, 1},      /* CONCURRENT_KERNELS */
    {34, 0},      /* PCI_DEVICE_ID */
    {40, 2},      /* ASYNC_ENGINE_COUNT */
    {41, 1},      /* UNIFIED_ADDRESSING */
    {75, 9},      /* COMPUTE_CAPABILITY_MAJOR */
    {76, 0},      /* COMPUTE_CAPABILITY_MINOR */
    {78, 1},      /* STREAM_PRIORITIES_SUPPORTED */
    {91, 1},      /* CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM */
    {99, 1},      /* HOST_REGISTER_SUPPORTED */
    {103, 1},     /* HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED */
    {113, 1},     /* READ_ONLY_HOST_REGISTER_SUPPORTED */
    {115, 1},     /* MEMORY_POOLS_SUPPORTED */
    {119, 1},     /* MEMPOOL_SUPPORTED_HANDLE_TYPES: file descriptors */
    {125, 1},     /* IPC_EVENT_SUPPORTED */
};

bool is_device(CUdevice device)
{
    return device >= 0 && device < settings.devices && device < MOST_DEVICES;
}

void uuid_of(CUdevice device, CUuuid *uuid)
{
    memset(uuid->bytes, 0, sizeof uuid->bytes);
    memcpy(uuid->bytes, "fake cuda", 9);
    uuid->bytes[15] = (char)device;
    const char *text = settings.uuids;
    for (int skipped = 0; skipped < device && text != NULL; skipped++) {
        text = strchr(text, ',');
        text = text == NULL ? NULL : text + 1;
    }
    for (size_t i = 0; text != NULL && *text != '\0' && *text != ',' && i < sizeof uuid->bytes; text++) {
        unsigned byte;
        if (*text != '-' && sscanf(text, "%2x", &byte) == 1) {
            uuid->bytes[i++] = (char)byte;
            text++;
        }
    }
}

CUdevice device_with(const CUuuid *uuid)
{
    for (CUdevice device = 0; is_device(device); device++) {
        CUuuid its;
        uuid_of(device, &its);
        if (memcmp(&its, uuid, sizeof its) == 0)
            return device;
    }
    return -1;
}

CUresult cuInit(unsigned flags)
{
    ENTER(cuInit, NOTHING);
    if (flags != 0)
        return CUDA_ERROR_INVALID_VALUE;
    if (settings.devices == 0)
        return CUDA_ERROR_NO_DEVICE;
    initialised();
    return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version)
{
    ENTER(cuDriverGetVersion, NOTHING);
    *version = settings.driver_version;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count)
{
    ENTER(cuDeviceGetCount, INITIALISED);
    *count = settings.devices < MOST_DEVICES ? settings.devices : MOST_DEVICES;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal)
{
    ENTER(cuDeviceGet, INITIALISED);
    *device = ordinal;
    return is_device(ordinal) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceGetName(char *name, int length, CUdevice device)
{
    ENTER(cuDeviceGetName, INITIALISED);
    if (!is_device(device))
        return CUDA_ERROR_INVALID_DEVICE;
    snprintf(name, (size_t)length, "Stand-in GPU %d", device);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device)
{
    ENTER(cuDeviceGetUuid, INITIALISED);
    if (!is_device(device))
        return CUDA_ERROR_INVALID_DEVICE;
    uuid_of(device, uuid);
    return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device)
{
    ENTER(cuDeviceTotalMem, INITIALISED);
    if (!is_device(device))
        return CUDA_ERROR_INVALID_DEVICE;
    *bytes = settings.device_bytes;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device)
{
    ENTER(cuDeviceGetAttribute, INITIALISED);
    if (!is_device(device))
        return CUDA_ERROR_INVALID_DEVICE;
    *value = 0;
    if (attribute == 33) /* PCI_BUS_ID */
        *value = device + 1;
    for (size_t i = 0; i < sizeof attributes / sizeof *attributes; i++)
        if (attributes[i].attribute == attribute)
            *value = attributes[i].value;
    return attribute > 0 && attribute < 200 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuDeviceComputeCapability(int *major, int *minor, CUdevice device)
{
    ENTER(cuDeviceComputeCapability, INITIALISED);
    *major = 9;
    *minor = 0;
    return is_device(device) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceGetPCIBusId_v2(char *text, int length, CUdevice device)
{
    ENTER(cuDeviceGetPCIBusId, INITIALISED);
    if (!is_device(device))
        return CUDA_ERROR_INVALID_DEVICE;
    snprintf(text, (size_t)length, "0000:%02X:00.0", (unsigned)device + 1);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetPCIBusId(char *text, int length, CUdevice device)
{
    return cuDeviceGetPCIBusId_v2(text, length, device);
}

CUresult cuDeviceCanAccessPeer(int *can, CUdevice device, CUdevice peer)
{
    ENTER(cuDeviceCanAccessPeer, INITIALISED);
    *can = device != peer;
    return is_device(device) && is_device(peer) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
