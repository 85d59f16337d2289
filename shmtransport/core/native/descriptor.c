#include "descriptor.h"

#define FIELDS 5

bool take_descriptor(struct unpacker *unpacker, struct descriptor *descriptor)
{
    struct token token;
    if (!unpack_kind(unpacker, &token, TOKEN_ARRAY) || token.count != FIELDS || !unpack_count(unpacker, &descriptor->offset)
        || !unpack_kind(unpacker, &token, TOKEN_ARRAY) || token.count > MAX_DIMENSIONS)
        return false;
    descriptor->dimensions = token.count;
    for (uint32_t index = 0; index < descriptor->dimensions; index++)
        if (!unpack_count(unpacker, &descriptor->shape[index]))
            return false;
    return unpack_kind(unpacker, &descriptor->dtype, TOKEN_TEXT)
        && utf8_characters(descriptor->dtype.bytes, descriptor->dtype.count) >= 0
        && unpack_count(unpacker, &descriptor->slot) && unpack_count(unpacker, &descriptor->sequence);
}
