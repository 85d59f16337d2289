#define _GNU_SOURCE

#include "mapping.h"

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "guards.h"

struct mapping *mapping_make(int fd, size_t nbytes, bool is_guarded)
{
    struct mapping *mapping = malloc(sizeof *mapping);
    if (mapping == NULL) {
        errno = ENOMEM;
        return NULL;
    }
    void *start = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (start == MAP_FAILED) {
        free(mapping);
        return NULL;
    }
    atomic_init(&mapping->references, 1);
    mapping->start = start;
    mapping->nbytes = nbytes;
    mapping->guard = is_guarded ? guard_range((uintptr_t)start, nbytes) : -1;
    return mapping;
}

struct mapping *mapping_hold(struct mapping *mapping)
{
    atomic_fetch_add_explicit(&mapping->references, 1, memory_order_relaxed);
    return mapping;
}

void mapping_drop(struct mapping *mapping)
{
    /* release: what this thread did in the mapping comes before its end; acquire: so does what the others did */
    if (atomic_fetch_sub_explicit(&mapping->references, 1, memory_order_acq_rel) != 1)
        return;
    if (mapping->guard >= 0)
        unguard_range(mapping->guard); /* what is mapped there next is none of the guard's business */
    munmap(mapping->start, mapping->nbytes);
    free(mapping);
}

bool mapping_has(const struct mapping *mapping, ptrdiff_t offset, ptrdiff_t count, size_t nbytes)
{
    return offset >= 0 && count >= 0 && (size_t)offset <= mapping->nbytes && (size_t)offset % nbytes == 0
        && (size_t)count <= (mapping->nbytes - (size_t)offset) / nbytes;
}

bool mapping_was_cut(const struct mapping *mapping)
{
    return mapping->guard >= 0 && range_was_cut(mapping->guard);
}
