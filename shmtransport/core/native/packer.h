/* Writes MessagePack into memory that grows: the shortest form of each value, as msgspec does. No Python.
 *
 * Running out of memory is remembered, and all that follows is left out: the caller asks once, at the end.
 */
#ifndef SHMTRANSPORT_PACKER_H
#define SHMTRANSPORT_PACKER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PACKER_INLINE_BYTES 1024 /* a message of the usual size needs no malloc */

struct packer {
    unsigned char *bytes;
    size_t length, capacity;
    bool out_of_memory;
    unsigned char inline_bytes[PACKER_INLINE_BYTES];
};

void packer_begin(struct packer *packer);
void packer_end(struct packer *packer);

void pack_raw(struct packer *packer, const void *bytes, size_t nbytes);
void pack_byte(struct packer *packer, unsigned char byte);
void pack_nil(struct packer *packer);
void pack_bool(struct packer *packer, bool value);
void pack_unsigned(struct packer *packer, uint64_t value);
void pack_signed(struct packer *packer, int64_t value);
void pack_double(struct packer *packer, double value);

/* For at most PACK_LIMIT bytes or items. */
#define PACK_LIMIT UINT32_MAX
void pack_text(struct packer *packer, const char *utf8, size_t nbytes);
void pack_binary(struct packer *packer, const void *bytes, size_t nbytes);
void pack_extension(struct packer *packer, int8_t code, const void *bytes, size_t nbytes);
void pack_array(struct packer *packer, size_t items);
void pack_map(struct packer *packer, size_t items);

/* Give the array whose header begins at an offset another number of items; all of them have been packed. */
void repack_array(struct packer *packer, size_t start, size_t before, size_t items);

#endif
