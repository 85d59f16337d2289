/* A mapped file that lives as long as whatever looks into it: no Python.
 *
 * References are counted without the GIL, since a tensor's memory may end on any thread, also after the interpreter.
 */
#ifndef SHMTRANSPORT_MAPPING_H
#define SHMTRANSPORT_MAPPING_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

struct mapping {
    atomic_size_t references;
    unsigned char *start;
    size_t nbytes;
    int guard; /* see guards.h; -1 if it has none */
};

/* Map a file's first bytes to read and write, with one reference; NULL with errno if that can't be done. */
struct mapping *mapping_make(int fd, size_t nbytes, bool is_guarded);

struct mapping *mapping_hold(struct mapping *mapping);

/* Give one reference back; the last one ends the mapping. */
void mapping_drop(struct mapping *mapping);

/* Whether the file was cut short, and this process has read or written beyond its new end. */
bool mapping_was_cut(const struct mapping *mapping);

/* Whether count items of nbytes bytes lie in it, from an offset on, aligned to their size. */
bool mapping_has(const struct mapping *mapping, ptrdiff_t offset, ptrdiff_t count, size_t nbytes);

#endif
