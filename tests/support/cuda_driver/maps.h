/* What this process has mapped somewhere, as /proc/self/maps tells it. */
#ifndef FAKE_CUDA_MAPS_H
#define FAKE_CUDA_MAPS_H

#include "cuda_types.h"

struct mapping {
    bool whole; /* every byte is mapped, and may be read */
    bool writable;
    unsigned long device, inode; /* what the first byte is of: 0 for anonymous memory */
    unsigned long long offset;
};

struct mapping mapping_of(uintptr_t base, size_t size);

#endif
