/* Events that cross to another process. The page with an event's counts is of a memory file without a name, which the
   handle names as /proc/<process>/fd/<number>. A handle is refused in the process that made it, and when it is stale or
   was altered. The page holds atomic numbers only, so that a process that is killed leaves nothing locked. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "calls.h"
#include "events.h"

struct event_handle {
    uint64_t magic, id;
    int32_t process, file;
    uint64_t unused[4], check;
};
_Static_assert(sizeof(struct event_handle) == sizeof(CUipcEventHandle), "it must fill CUDA's bytes");

static const uint64_t MAGIC = 0x746e657664756366;

static uint64_t check_of(const struct event_handle *handle)
{
    uint64_t sum = 14695981039346656037u;
    for (size_t i = 0; i < offsetof(struct event_handle, check); i++)
        sum = (sum ^ ((const unsigned char *)handle)[i]) * 1099511628211u;
    return sum;
}

static struct shared_event *map(int file)
{
    void *page = mmap(NULL, sizeof(struct shared_event), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    return page == MAP_FAILED ? NULL : page;
}

struct shared_event *share_event(int *out)
{
    int file = memfd_create("fake-cuda-event", MFD_CLOEXEC);
    if (file < 0)
        return NULL;
    struct shared_event *shared = ftruncate(file, sizeof *shared) == 0 ? map(file) : NULL;
    if (shared == NULL) {
        close(file);
        return NULL;
    }
    if (getrandom(&shared->id, sizeof shared->id, 0) != sizeof shared->id)
        shared->id = nanoseconds();
    shared->magic = MAGIC;
    *out = file;
    return shared;
}

void close_event_file(struct event *event)
{
    if (event->file >= 0)
        close(event->file);
    event->file = -1;
}

void unshare_event(struct event *event)
{
    close_event_file(event);
    munmap(event->shared, sizeof *event->shared);
}

bool is_alive(int process)
{
    char path[32], line[512];
    snprintf(path, sizeof path, "/proc/%d/stat", process);
    FILE *file = fopen(path, "r");
    if (file == NULL)
        return false;
    const char *name_end = fgets(line, sizeof line, file) == NULL ? NULL : strrchr(line, ')');
    fclose(file);
    return name_end != NULL && strchr("ZX", name_end[2]) == NULL;
}

CUresult cuIpcGetEventHandle(CUipcEventHandle *out, CUevent handle)
{
    ENTER(cuIpcGetEventHandle, CURRENT_CONTEXT);
    lock();
    struct event *event = object_find(EVENT, handle);
    CUresult result = CUDA_SUCCESS;
    if (event == NULL)
        result = CUDA_ERROR_INVALID_HANDLE;
    else if (event->file < 0)
        result = CUDA_ERROR_INVALID_VALUE;
    if (result == CUDA_SUCCESS) {
        struct event_handle bytes = {MAGIC, event->shared->id, getpid(), event->file, {0}, 0};
        bytes.check = check_of(&bytes);
        memcpy(out, &bytes, sizeof bytes);
    }
    unlock();
    return result;
}

static struct shared_event *open_page(const struct event_handle *handle)
{
    char path[64];
    struct stat status;
    snprintf(path, sizeof path, "/proc/%d/fd/%d", handle->process, handle->file);
    int file = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
    if (file < 0)
        return NULL;
    bool fits = fstat(file, &status) == 0 && status.st_size == sizeof(struct shared_event);
    struct shared_event *shared = fits ? map(file) : NULL;
    close(file);
    if (shared != NULL && (shared->magic != MAGIC || shared->id != handle->id)) {
        munmap(shared, sizeof *shared);
        shared = NULL;
    }
    return shared;
}

CUresult cuIpcOpenEventHandle(CUevent *out, CUipcEventHandle bytes)
{
    ENTER(cuIpcOpenEventHandle, CURRENT_CONTEXT);
    struct event_handle handle;
    memcpy(&handle, &bytes, sizeof handle);
    if (handle.magic != MAGIC || handle.check != check_of(&handle))
        return CUDA_ERROR_INVALID_HANDLE;
    if (handle.process == getpid())
        return CUDA_ERROR_INVALID_CONTEXT;
    struct shared_event *shared = open_page(&handle);
    if (shared == NULL)
        return CUDA_ERROR_INVALID_HANDLE;
    lock();
    *out = event_of(shared, -1, true)->object.handle;
    unlock();
    return CUDA_SUCCESS;
}
