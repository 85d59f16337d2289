#include "inspection.h"

#include "descriptor.h"
#include "layout.h"

#define REQUEST_FIELDS 6 /* tag, call_id, method, arguments, keywords, tensors */
#define REPLY_FIELDS 4   /* tag, call_id, result, tensors */

bool is_tensor(const struct token *token)
{
    return (token->code == EXTENSION_TENSOR || token->code == EXTENSION_ARRAY) && token->count == 2;
}

uint32_t tensor_index(const struct token *token)
{
    return (uint32_t)token->bytes[0] | (uint32_t)token->bytes[1] << 8;
}

bool is_key(const struct token *token)
{
    if (token->kind == TOKEN_TEXT)
        return utf8_characters(token->bytes, token->count) >= 0;
    return token->kind == TOKEN_UNSIGNED || token->kind == TOKEN_NEGATIVE;
}

/* Which tensors the values name. */
struct named {
    uint32_t count; /* larger than every index */
    bool has_arrays;
};

static bool check_value(struct unpacker *unpacker, int depth, struct named *named);

static bool check_items(struct unpacker *unpacker, uint32_t count, int depth, struct named *named)
{
    for (; count > 0; count--)
        if (!check_value(unpacker, depth, named))
            return false;
    return true;
}

bool take_tuple_marker(struct unpacker *unpacker)
{
    struct unpacker ahead = *unpacker;
    struct token token;
    if (!unpack_kind(&ahead, &token, TOKEN_EXTENSION) || token.code != EXTENSION_TUPLE)
        return false;
    *unpacker = ahead;
    return true;
}

static bool check_map(struct unpacker *unpacker, uint32_t count, int depth, struct named *named, bool only_text)
{
    struct token key;
    for (; count > 0; count--)
        if (!unpack_token(unpacker, &key) || !is_key(&key) || (only_text && key.kind != TOKEN_TEXT)
            || !check_value(unpacker, depth, named))
            return false;
    return true;
}

/* Go over a value, and note the tensors in it. */
static bool check_value(struct unpacker *unpacker, int depth, struct named *named)
{
    struct token token;
    if (!unpack_token(unpacker, &token))
        return false;
    switch (token.kind) {
    case TOKEN_TEXT:
        return utf8_characters(token.bytes, token.count) >= 0;
    case TOKEN_EXTENSION:
        if (depth > MAX_DEPTH || !is_tensor(&token))
            return false;
        if (tensor_index(&token) >= named->count)
            named->count = tensor_index(&token) + 1;
        named->has_arrays |= token.code == EXTENSION_ARRAY;
        return true;
    case TOKEN_ARRAY:
        if (depth > MAX_DEPTH)
            return false;
        if (token.count > 0 && take_tuple_marker(unpacker))
            token.count--;
        return check_items(unpacker, token.count, depth + 1, named);
    case TOKEN_MAP:
        return depth <= MAX_DEPTH && check_map(unpacker, token.count, depth + 1, named, false);
    default:
        return true;
    }
}

static bool take_name(struct unpacker *unpacker, struct token *name)
{
    if (!unpack_kind(unpacker, name, TOKEN_TEXT))
        return false;
    int64_t characters = utf8_characters(name->bytes, name->count);
    return characters >= 0 && characters <= MAX_NAME_CHARACTERS;
}

static bool check_arguments(struct unpacker *unpacker, struct named *named)
{
    struct token token;
    return unpack_kind(unpacker, &token, TOKEN_ARRAY) && check_items(unpacker, token.count, ARGUMENT_DEPTH, named)
        && unpack_kind(unpacker, &token, TOKEN_MAP) && check_map(unpacker, token.count, ARGUMENT_DEPTH, named, true);
}

/* Whether the bytes after the preamble are a valid request or reply. */
static bool check_call(struct unpacker *unpacker, struct call *call)
{
    struct token token;
    struct descriptor descriptor;
    struct named named = {0};
    if (!unpack_kind(unpacker, &token, TOKEN_ARRAY) || !unpack_count(unpacker, &call->tag))
        return false;
    bool is_request = call->tag == TAG_REQUEST;
    if (!is_request && call->tag != TAG_REPLY)
        return false;
    if (token.count != (is_request ? REQUEST_FIELDS : REPLY_FIELDS) || !unpack_count(unpacker, &call->call_id)
        || (is_request && !take_name(unpacker, &call->method)))
        return false;
    call->values = *unpacker;
    if (!(is_request ? check_arguments(unpacker, &named) : check_value(unpacker, 0, &named)))
        return false;
    if (!unpack_kind(unpacker, &token, TOKEN_ARRAY) || token.count > MAX_TENSORS || token.count < named.count)
        return false;
    call->tensor_count = token.count;
    call->has_arrays = named.has_arrays;
    call->tensors = *unpacker;
    for (uint32_t index = 0; index < call->tensor_count; index++)
        if (!take_descriptor(unpacker, &descriptor))
            return false;
    return unpacker->at == unpacker->end;
}

bool inspect_call(const char *bytes, size_t nbytes, struct call *call)
{
    if (nbytes < 2 || (unsigned char)bytes[0] != MAGIC_BYTE || bytes[1] != FORMAT_VERSION)
        return false;
    struct unpacker unpacker = {(const unsigned char *)bytes + 2, (const unsigned char *)bytes + nbytes};
    *call = (struct call){0};
    return check_call(&unpacker, call);
}
