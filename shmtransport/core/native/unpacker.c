#include "unpacker.h"

#include <string.h>

static size_t bytes_left(const struct unpacker *unpacker)
{
    return (size_t)(unpacker->end - unpacker->at);
}

/* The next nbytes bytes as one number, the highest first. */
static bool take_number(struct unpacker *unpacker, size_t nbytes, uint64_t *number)
{
    if (bytes_left(unpacker) < nbytes)
        return false;
    *number = 0;
    for (size_t index = 0; index < nbytes; index++)
        *number = *number << 8 | unpacker->at[index];
    unpacker->at += nbytes;
    return true;
}

static bool take_bytes(struct unpacker *unpacker, struct token *token, uint64_t nbytes)
{
    if (nbytes > bytes_left(unpacker))
        return false;
    token->bytes = unpacker->at;
    token->count = (uint32_t)nbytes;
    unpacker->at += nbytes;
    return true;
}

static bool take_items(const struct unpacker *unpacker, struct token *token, uint64_t count)
{
    size_t bytes_each = token->kind == TOKEN_MAP ? 2 : 1;
    token->count = (uint32_t)count;
    return count <= bytes_left(unpacker) / bytes_each;
}

static bool take_unsigned(struct unpacker *unpacker, struct token *token, size_t nbytes)
{
    token->kind = TOKEN_UNSIGNED;
    return take_number(unpacker, nbytes, &token->number);
}

static bool take_signed(struct unpacker *unpacker, struct token *token, size_t nbytes)
{
    if (!take_number(unpacker, nbytes, &token->number))
        return false;
    uint64_t sign = (uint64_t)1 << (8 * nbytes - 1);
    token->kind = token->number & sign ? TOKEN_NEGATIVE : TOKEN_UNSIGNED;
    if (token->kind == TOKEN_NEGATIVE)
        token->number |= ~(sign - 1); /* the sign, as far as it goes */
    return true;
}

static bool take_real(struct unpacker *unpacker, struct token *token, size_t nbytes)
{
    uint64_t bits;
    token->kind = TOKEN_DOUBLE;
    if (!take_number(unpacker, nbytes, &bits))
        return false;
    if (nbytes == 8) {
        memcpy(&token->real, &bits, 8);
    } else {
        float single;
        uint32_t single_bits = (uint32_t)bits;
        memcpy(&single, &single_bits, 4);
        token->real = single;
    }
    return true;
}

/* A token whose count stands in the nbytes bytes after its first. */
static bool take_counted(struct unpacker *unpacker, struct token *token, enum token_kind kind, size_t nbytes)
{
    uint64_t count, code;
    token->kind = kind;
    if (!take_number(unpacker, nbytes, &count))
        return false;
    if (kind == TOKEN_ARRAY || kind == TOKEN_MAP)
        return take_items(unpacker, token, count);
    if (kind == TOKEN_EXTENSION) {
        if (!take_number(unpacker, 1, &code))
            return false;
        token->code = (int8_t)code;
    }
    return take_bytes(unpacker, token, count);
}

static bool take_fixed_extension(struct unpacker *unpacker, struct token *token, uint64_t nbytes)
{
    uint64_t code;
    token->kind = TOKEN_EXTENSION;
    if (!take_number(unpacker, 1, &code))
        return false;
    token->code = (int8_t)code;
    return take_bytes(unpacker, token, nbytes);
}

static bool simple_token(struct token *token, enum token_kind kind)
{
    token->kind = kind;
    return true;
}

/* The tokens whose first byte is 0xc0 to 0xdf. */
static bool unpack_marked(struct unpacker *unpacker, struct token *token, unsigned char first)
{
    switch (first) {
    case 0xc0:
        return simple_token(token, TOKEN_NIL);
    case 0xc2:
        return simple_token(token, TOKEN_FALSE);
    case 0xc3:
        return simple_token(token, TOKEN_TRUE);
    case 0xc4:
    case 0xc5:
    case 0xc6:
        return take_counted(unpacker, token, TOKEN_BINARY, (size_t)1 << (first - 0xc4));
    case 0xc7:
    case 0xc8:
    case 0xc9:
        return take_counted(unpacker, token, TOKEN_EXTENSION, (size_t)1 << (first - 0xc7));
    case 0xca:
        return take_real(unpacker, token, 4);
    case 0xcb:
        return take_real(unpacker, token, 8);
    case 0xcc:
    case 0xcd:
    case 0xce:
    case 0xcf:
        return take_unsigned(unpacker, token, (size_t)1 << (first - 0xcc));
    case 0xd0:
    case 0xd1:
    case 0xd2:
    case 0xd3:
        return take_signed(unpacker, token, (size_t)1 << (first - 0xd0));
    case 0xd4:
    case 0xd5:
    case 0xd6:
    case 0xd7:
    case 0xd8:
        return take_fixed_extension(unpacker, token, (uint64_t)1 << (first - 0xd4));
    case 0xd9:
    case 0xda:
    case 0xdb:
        return take_counted(unpacker, token, TOKEN_TEXT, (size_t)1 << (first - 0xd9));
    case 0xdc:
    case 0xdd:
        return take_counted(unpacker, token, TOKEN_ARRAY, (size_t)2 << (first - 0xdc));
    case 0xde:
    case 0xdf:
        return take_counted(unpacker, token, TOKEN_MAP, (size_t)2 << (first - 0xde));
    default: /* 0xc1, which MessagePack never uses */
        return false;
    }
}

bool unpack_token(struct unpacker *unpacker, struct token *token)
{
    if (unpacker->at == unpacker->end)
        return false;
    unsigned char first = *unpacker->at++;
    if (first < 0x80) {
        token->number = first;
        return simple_token(token, TOKEN_UNSIGNED);
    }
    if (first >= 0xe0) {
        token->number = ~(uint64_t)0xff | first;
        return simple_token(token, TOKEN_NEGATIVE);
    }
    if (first >= 0xc0)
        return unpack_marked(unpacker, token, first);
    if (first >= 0xa0) {
        token->kind = TOKEN_TEXT;
        return take_bytes(unpacker, token, first & 0x1f);
    }
    token->kind = first >= 0x90 ? TOKEN_ARRAY : TOKEN_MAP;
    return take_items(unpacker, token, first & 0x0f);
}

/* How many bytes follow the first of a character, and what the second may be; -1 if it begins none. */
static int followers(unsigned char first, unsigned char *least, unsigned char *most)
{
    *least = 0x80;
    *most = 0xbf;
    if (first >= 0xc2 && first <= 0xdf)
        return 1;
    if (first >= 0xe0 && first <= 0xef) {
        if (first == 0xe0)
            *least = 0xa0;
        if (first == 0xed)
            *most = 0x9f;
        return 2;
    }
    if (first >= 0xf0 && first <= 0xf4) {
        if (first == 0xf0)
            *least = 0x90;
        if (first == 0xf4)
            *most = 0x8f;
        return 3;
    }
    return -1;
}

int64_t utf8_characters(const unsigned char *bytes, size_t nbytes)
{
    int64_t characters = 0;
    for (size_t index = 0; index < nbytes; characters++) {
        unsigned char first = bytes[index++], least, most;
        if (first < 0x80)
            continue;
        int count = followers(first, &least, &most);
        if (count < 0 || nbytes - index < (size_t)count)
            return -1;
        for (; count > 0; count--, least = 0x80, most = 0xbf) {
            if (bytes[index] < least || bytes[index] > most)
                return -1;
            index++;
        }
    }
    return characters;
}

bool unpack_kind(struct unpacker *unpacker, struct token *token, enum token_kind kind)
{
    return unpack_token(unpacker, token) && token->kind == kind;
}

bool unpack_count(struct unpacker *unpacker, uint64_t *count)
{
    struct token token;
    if (!unpack_kind(unpacker, &token, TOKEN_UNSIGNED) || token.number > INT64_MAX)
        return false;
    *count = token.number;
    return true;
}
