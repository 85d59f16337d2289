#include "packer.h"

#include <stdlib.h>
#include <string.h>

void packer_begin(struct packer *packer)
{
    packer->bytes = packer->inline_bytes;
    packer->length = 0;
    packer->capacity = PACKER_INLINE_BYTES;
    packer->out_of_memory = false;
}

void packer_end(struct packer *packer)
{
    if (packer->bytes != packer->inline_bytes)
        free(packer->bytes);
}

static bool grow(struct packer *packer, size_t nbytes)
{
    const size_t most = SIZE_MAX / 4;
    if (packer->length > most || nbytes > most - packer->length)
        return false;
    size_t capacity = 2 * (packer->length + nbytes);
    bool is_inline = packer->bytes == packer->inline_bytes;
    unsigned char *bytes = realloc(is_inline ? NULL : packer->bytes, capacity);
    if (bytes == NULL)
        return false;
    if (is_inline)
        memcpy(bytes, packer->inline_bytes, packer->length);
    packer->bytes = bytes;
    packer->capacity = capacity;
    return true;
}

/* Room for nbytes more; NULL without memory. */
static unsigned char *reserve(struct packer *packer, size_t nbytes)
{
    if (packer->out_of_memory)
        return NULL;
    if (nbytes > packer->capacity - packer->length && !grow(packer, nbytes)) {
        packer->out_of_memory = true;
        return NULL;
    }
    unsigned char *place = packer->bytes + packer->length;
    packer->length += nbytes;
    return place;
}

void pack_raw(struct packer *packer, const void *bytes, size_t nbytes)
{
    unsigned char *place = reserve(packer, nbytes);
    if (place != NULL && nbytes != 0)
        memcpy(place, bytes, nbytes);
}

void pack_byte(struct packer *packer, unsigned char byte)
{
    unsigned char *place = reserve(packer, 1);
    if (place != NULL)
        *place = byte;
}

/* A first byte, then the lowest value_bytes bytes of a value, the highest of them first. */
static void pack_sized(struct packer *packer, unsigned char first, uint64_t value, int value_bytes)
{
    unsigned char *place = reserve(packer, 1 + (size_t)value_bytes);
    if (place == NULL)
        return;
    place[0] = first;
    for (int index = value_bytes; index > 0; index--, value >>= 8)
        place[index] = (unsigned char)value;
}

void pack_nil(struct packer *packer)
{
    pack_byte(packer, 0xc0);
}

void pack_bool(struct packer *packer, bool value)
{
    pack_byte(packer, value ? 0xc3 : 0xc2);
}

void pack_unsigned(struct packer *packer, uint64_t value)
{
    if (value < 0x80)
        pack_byte(packer, (unsigned char)value);
    else if (value <= UINT8_MAX)
        pack_sized(packer, 0xcc, value, 1);
    else if (value <= UINT16_MAX)
        pack_sized(packer, 0xcd, value, 2);
    else if (value <= UINT32_MAX)
        pack_sized(packer, 0xce, value, 4);
    else
        pack_sized(packer, 0xcf, value, 8);
}

void pack_signed(struct packer *packer, int64_t value)
{
    if (value >= 0)
        pack_unsigned(packer, (uint64_t)value);
    else if (value >= -32)
        pack_byte(packer, (unsigned char)value);
    else if (value >= INT8_MIN)
        pack_sized(packer, 0xd0, (uint64_t)value, 1);
    else if (value >= INT16_MIN)
        pack_sized(packer, 0xd1, (uint64_t)value, 2);
    else if (value >= INT32_MIN)
        pack_sized(packer, 0xd2, (uint64_t)value, 4);
    else
        pack_sized(packer, 0xd3, (uint64_t)value, 8);
}

void pack_double(struct packer *packer, double value)
{
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    pack_sized(packer, 0xcb, bits, 8);
}

void pack_text(struct packer *packer, const char *utf8, size_t nbytes)
{
    if (nbytes < 32)
        pack_byte(packer, (unsigned char)(0xa0 | nbytes));
    else if (nbytes <= UINT8_MAX)
        pack_sized(packer, 0xd9, nbytes, 1);
    else if (nbytes <= UINT16_MAX)
        pack_sized(packer, 0xda, nbytes, 2);
    else
        pack_sized(packer, 0xdb, nbytes, 4);
    pack_raw(packer, utf8, nbytes);
}

void pack_binary(struct packer *packer, const void *bytes, size_t nbytes)
{
    if (nbytes <= UINT8_MAX)
        pack_sized(packer, 0xc4, nbytes, 1);
    else if (nbytes <= UINT16_MAX)
        pack_sized(packer, 0xc5, nbytes, 2);
    else
        pack_sized(packer, 0xc6, nbytes, 4);
    pack_raw(packer, bytes, nbytes);
}

void pack_extension(struct packer *packer, int8_t code, const void *bytes, size_t nbytes)
{
    switch (nbytes) {
    case 1:
        pack_byte(packer, 0xd4);
        break;
    case 2:
        pack_byte(packer, 0xd5);
        break;
    case 4:
        pack_byte(packer, 0xd6);
        break;
    case 8:
        pack_byte(packer, 0xd7);
        break;
    case 16:
        pack_byte(packer, 0xd8);
        break;
    default:
        if (nbytes <= UINT8_MAX)
            pack_sized(packer, 0xc7, nbytes, 1);
        else if (nbytes <= UINT16_MAX)
            pack_sized(packer, 0xc8, nbytes, 2);
        else
            pack_sized(packer, 0xc9, nbytes, 4);
    }
    pack_byte(packer, (unsigned char)code);
    pack_raw(packer, bytes, nbytes);
}

void pack_array(struct packer *packer, size_t items)
{
    if (items < 16)
        pack_byte(packer, (unsigned char)(0x90 | items));
    else if (items <= UINT16_MAX)
        pack_sized(packer, 0xdc, items, 2);
    else
        pack_sized(packer, 0xdd, items, 4);
}

void pack_map(struct packer *packer, size_t items)
{
    if (items < 16)
        pack_byte(packer, (unsigned char)(0x80 | items));
    else if (items <= UINT16_MAX)
        pack_sized(packer, 0xde, items, 2);
    else
        pack_sized(packer, 0xdf, items, 4);
}

static size_t header_bytes(size_t items)
{
    return items < 16 ? 1 : items <= UINT16_MAX ? 3 : 5;
}


void repack_array(struct packer *packer, size_t start, size_t before, size_t items)
{
    size_t old_bytes = header_bytes(before), new_bytes = header_bytes(items);
    if (reserve(packer, new_bytes) == NULL) /* more than the content moves on by */
        return;
    size_t whole = packer->length - new_bytes, content = whole - start - old_bytes;
    memmove(packer->bytes + start + new_bytes, packer->bytes + start + old_bytes, content);
    packer->length = start;
    pack_array(packer, items);
    packer->length = start + new_bytes + content;
}
