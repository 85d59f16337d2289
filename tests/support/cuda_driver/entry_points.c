/* cuGetProcAddress: how cuda.bindings finds everything else. A name stands for its newest version that the caller's
   CUDA has; a name that the stand-in doesn't have is reported as not found, as an older driver would. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "calls.h"

static const struct {
    const char *name;
    int since;
    const char *suffix;
} versions[] = {
    {"cuCtxCreate", 12050, "_v4"},
    {"cuCtxCreate", 11040, "_v3"}, /* there is none here */
    {"cuCtxGetDevice", 13000, "_v2"},
    {"cuCtxSynchronize", 13000, "_v2"},
    {"cuEventElapsedTime", 12080, "_v2"},
    {"cuGetProcAddress", 12000, "_v2"},
    {"cuLaunchHostFunc", 13020, "_v2"},
    {"cuStreamGetCtx", 12050, "_v2"},
};
/* The versions of these that have no suffix came before any CUDA that is supported. */
static const char *const always_second[] = {
    "cuCtxCreate", "cuCtxDestroy", "cuCtxPopCurrent", "cuCtxPushCurrent", "cuDeviceGetUuid",
    "cuDevicePrimaryCtxRelease", "cuDeviceTotalMem", "cuEventDestroy", "cuMemAlloc", "cuMemAllocHost", "cuMemFree",
    "cuMemGetAddressRange", "cuMemGetInfo", "cuMemHostGetDevicePointer", "cuMemHostRegister", "cuMemcpyDtoD",
    "cuMemcpyDtoDAsync", "cuMemcpyDtoH", "cuMemcpyDtoHAsync", "cuMemcpyHtoD", "cuMemcpyHtoDAsync", "cuMemsetD16",
    "cuMemsetD32", "cuMemsetD8", "cuStreamDestroy",
};

static const char *suffix_of(const char *name, int version)
{
    for (size_t i = 0; i < sizeof versions / sizeof *versions; i++)
        if (strcmp(versions[i].name, name) == 0 && version >= versions[i].since)
            return versions[i].suffix;
    for (size_t i = 0; i < sizeof always_second / sizeof *always_second; i++)
        if (strcmp(always_second[i], name) == 0)
            return "_v2";
    return "";
}

static void *library(void)
{
    static void *handle;
    Dl_info info;
    if (handle == NULL && dladdr((void *)versions, &info) != 0)
        handle = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    return handle;
}

CUresult cuGetProcAddress_v2(const char *name, void **out, int version, uint64_t flags, int *status)
{
    char symbol[128];
    if (name == NULL || out == NULL || flags > 2)
        return CUDA_ERROR_INVALID_VALUE;
    snprintf(symbol, sizeof symbol, "%s%s", name, suffix_of(name, version));
    *out = strncmp(name, "cu", 2) == 0 && library() != NULL ? dlsym(library(), symbol) : NULL;
    if (status != NULL)
        *status = *out == NULL;
    return CUDA_SUCCESS;
}

CUresult cuGetProcAddress(const char *name, void **out, int version, uint64_t flags)
{
    CUresult result = cuGetProcAddress_v2(name, out, version, flags, NULL);
    return result == CUDA_SUCCESS && *out == NULL ? 500 : result;
}
