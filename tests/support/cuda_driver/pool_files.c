/* What a pool's memory is of: a memory file that the importing process maps as well, or private memory.
   The file has no name, so that a process that is killed leaves no litter. An import is checked before it is used. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pools.h"
#include "state.h"

static const uint64_t MAGIC = 0x6c6f6f7064756366;

enum { SHARED_BYTES = 8192 };
_Static_assert(sizeof(struct shared_pool) <= SHARED_BYTES, "the table is larger than its pages");

static bool map(struct pool *pool, size_t bytes, int flags)
{
    void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags | MAP_NORESERVE, pool->file, 0);
    if (base == MAP_FAILED)
        return false;
    pool->base = (uintptr_t)base;
    return true;
}

bool pool_map(struct pool *pool, bool exportable)
{
    pool->file = -1;
    if (!exportable)
        return map(pool, pool->size, MAP_PRIVATE | MAP_ANONYMOUS);
    pool->file = memfd_create("fake-cuda-pool", MFD_CLOEXEC);
    if (pool->file < 0)
        return false;
    size_t bytes = pool->size + SHARED_BYTES;
    if (ftruncate(pool->file, (off_t)bytes) != 0 || !map(pool, bytes, MAP_SHARED)) {
        close(pool->file);
        return false;
    }
    pool->shared = (struct shared_pool *)(pool->base + pool->size);
    pool->shared->size = pool->size;
    uuid_of(pool->device, &pool->shared->device);
    if (getrandom(&pool->shared->id, sizeof pool->shared->id, 0) != sizeof pool->shared->id)
        pool->shared->id = nanoseconds();
    pool->shared->magic = MAGIC;
    return true;
}

bool pool_map_import(struct pool *pool, int file)
{
    struct stat status;
    if (fstat(file, &status) != 0 || status.st_size <= SHARED_BYTES)
        return false;
    pool->file = fcntl(file, F_DUPFD_CLOEXEC, 3);
    pool->size = (size_t)status.st_size - SHARED_BYTES;
    if (pool->file < 0 || !map(pool, (size_t)status.st_size, MAP_SHARED))
        return false;
    pool->shared = (struct shared_pool *)(pool->base + pool->size);
    if (pool->shared->magic == MAGIC && pool->shared->size == pool->size)
        return true;
    pool_unmap(pool);
    return false;
}

void pool_unmap(struct pool *pool)
{
    munmap((void *)pool->base, pool->size + (pool->shared == NULL ? 0 : SHARED_BYTES));
    if (pool->file >= 0)
        close(pool->file);
}
