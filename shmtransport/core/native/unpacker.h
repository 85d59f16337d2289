/* Reads MessagePack from a peer's bytes, one token at a time, never beyond their end. No Python.
 *
 * The bytes are private memory: a message was copied out of its ring, or came by a socket.
 */
#ifndef SHMTRANSPORT_UNPACKER_H
#define SHMTRANSPORT_UNPACKER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct unpacker {
    const unsigned char *at, *end;
};

enum token_kind {
    TOKEN_NIL,
    TOKEN_FALSE,
    TOKEN_TRUE,
    TOKEN_UNSIGNED, /* number: not negative, however it was written */
    TOKEN_NEGATIVE, /* number: its two's complement */
    TOKEN_DOUBLE,
    TOKEN_TEXT,   /* bytes, count: not known to be UTF-8 */
    TOKEN_BINARY, /* bytes, count */
    TOKEN_ARRAY,  /* count items follow */
    TOKEN_MAP,    /* count pairs of key and value follow */
    TOKEN_EXTENSION, /* code, bytes, count */
};

struct token {
    enum token_kind kind;
    uint64_t number;
    double real;
    const unsigned char *bytes;
    uint32_t count;
    int8_t code;
};

/* The next token; false if what is there is none, or goes beyond the end. An array's and a map's items have at least one
 * byte each, so that a count is never larger than what is left. */
bool unpack_token(struct unpacker *unpacker, struct token *token);

/* The next token, which must be of this kind. */
bool unpack_kind(struct unpacker *unpacker, struct token *token, enum token_kind kind);

/* The next token, which must be an integer from 0 to 2**63 - 1. */
bool unpack_count(struct unpacker *unpacker, uint64_t *count);

/* How many characters UTF-8 has, or -1 if it is not valid: overlong, a surrogate, beyond U+10FFFF, or cut. */
int64_t utf8_characters(const unsigned char *bytes, size_t nbytes);

#endif
