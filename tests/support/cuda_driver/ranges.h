/* The memory that the driver knows: device memory, and pinned host memory. All of it with the lock held. */
#ifndef FAKE_CUDA_RANGES_H
#define FAKE_CUDA_RANGES_H

#include "contexts.h"
#include "maps.h"

struct pool;

enum range_kind { DEVICE_MEMORY, HOST_MEMORY, REGISTERED_MEMORY };

struct range {
    enum range_kind kind;
    uintptr_t base;
    size_t size;
    unsigned long long id;
    unsigned flags; /* of host memory */
    CUcontext context;
    CUdevice device;
    struct mapping mapping; /* what was there when it was registered */
    struct pool *pool;      /* of device memory */
    size_t room;            /* what it takes of the pool */
    unsigned imports;       /* how often it was imported; 0: it was allocated here */
    int slot;               /* of the pool's shared table, -1: it was never exported */
    struct range *next;
    struct range *next_in_pool;
};

struct range *range_add(enum range_kind kind, uintptr_t base, size_t size, struct context *context);
void range_take_out(struct range *range); /* the caller frees it */
struct range *range_at(enum range_kind kind, uintptr_t base);
struct range *range_with(uintptr_t address);
bool ranges_overlap(uintptr_t one, size_t one_size, uintptr_t other, size_t other_size);
/* The range that all these bytes are in, NULL if none of them is in any; an error if they leave a range. */
CUresult range_of(uintptr_t base, size_t size, struct range **found);
bool has_lost_memory(struct range *range); /* what was there when it was registered is unmapped */
bool overlaps_host_range(uintptr_t base, size_t size);

unsigned long long bytes_of_device(void);
unsigned long long bytes_imported(void);
unsigned long long bytes_registered(void);
unsigned long long bytes_of_host(void);
unsigned long long registrations_without_memory(void);

#endif
