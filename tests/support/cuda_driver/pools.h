/* Memory pools: each is one mapping that device memory is taken from, of a file if it may be exported. */
#ifndef FAKE_CUDA_POOLS_H
#define FAKE_CUDA_POOLS_H

#include <stdatomic.h>

#include "ranges.h"
#include "streams.h"

enum { POOL_SLOTS = 496, ROUND = 512 };

/* The end of an exportable pool's file: which pool it is, and which allocations of it were exported and live. */
struct shared_pool {
    uint64_t magic;
    uint64_t id;
    uint64_t size;
    CUuuid device;
    struct {
        atomic_ullong serial; /* 0: free */
        atomic_uint imports;  /* by other processes, still open */
    } slots[POOL_SLOTS];
};

struct pool {
    struct object object;
    CUdevice device;
    bool imported;
    size_t size;
    uintptr_t base;
    int file; /* -1: it can't be exported */
    struct shared_pool *shared;
    struct range *blocks; /* in the order of their addresses, until their frees were carried out */
    size_t used, used_high;
    uint64_t threshold;
    int reuse[3];
    int access[MOST_DEVICES];
};

/* All of it with the lock held. */
struct pool *pool_create(CUdevice device, int handle_types, size_t size, bool hidden);
struct pool *pool_import(int file, CUresult *result);
struct pool *pool_of(CUdevice device);     /* the one that cuMemAllocAsync takes from */
struct pool *default_pool(CUdevice device);
CUresult pool_take(struct pool *pool, size_t size, struct stream *stream, CUdeviceptr *out);
void pool_insert(struct pool *pool, struct range *range);
void pool_reclaim(struct range *range); /* a free is carried out: poisons and gives back */

/* Of pool_files.c */
bool pool_map(struct pool *pool, bool exportable);
bool pool_map_import(struct pool *pool, int file);
void pool_unmap(struct pool *pool);

/* Of pool_sharing.c */
void release_import(struct range *range);
void release_export(struct range *range);

#endif
