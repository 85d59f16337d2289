/* The message ring of a segment, both directions: whole messages, in order; no Python. The bytes and the rules are those
 * of core/message_ring.py.
 *
 * All that the peer can write is read once into a local, checked, and then used. The order of memory is named at every
 * use:
 *
 *   published  stored with release after the record; loaded with acquire before the record is read
 *   consumed   stored with release after the record was copied; loaded with acquire before its room is written over
 *   wants room stored, then a sequentially consistent fence, then the writer looks for room again; its reader stores
 *              consumed, then fences, then loads it: one of the two sees the other
 *   sleeps     stored, then a sequentially consistent fence, then its owner looks for messages again; a writer stores
 *              published, then fences, then loads it: one of the two sees the other
 *   posts      added to with release, then the peer is woken; loaded with acquire
 *   ended      stored with release after the last message; loaded with acquire before published is
 */
#ifndef SHMTRANSPORT_MESSAGE_RING_H
#define SHMTRANSPORT_MESSAGE_RING_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "futex.h"

typedef _Atomic uint64_t cell_value;

struct ring_area {
    unsigned char *memory; /* the cells; aligned to 8 bytes */
    unsigned char *records;
    uint64_t capacity; /* bytes of records, a multiple of 8 */
};

struct message_ring {
    struct ring_area own, peer;
    uint64_t published;
    uint64_t peer_consumed;
    uint64_t consumed;
    uint64_t largest_message;
    uint32_t posts_seen; /* of the peer */
};

enum ring_outcome {
    RING_DONE,
    RING_NOTHING,       /* no message yet, or no room yet */
    RING_BAD_PUBLISHED, /* figures: what the peer says, what was read */
    RING_BAD_RECORD,    /* figures: its length, what is unread */
    RING_BAD_LENGTH,    /* figures: its length */
    RING_BAD_CONSUMED,  /* figures: what the peer says */
};

/* A message that was found and checked, or what is wrong. */
struct ring_finding {
    uint64_t figures[2];
    uint64_t start; /* of the record, in the ring */
    uint32_t length;
};

/* Whether this memory can be a message ring's: large enough, and aligned. */
bool ring_area_fits(uintptr_t address, uint64_t nbytes);

void message_ring_begin(struct message_ring *ring, struct ring_area own, struct ring_area peer);

struct ring_area ring_area_at(uintptr_t address, uint64_t nbytes);

bool message_ring_readable(const struct message_ring *ring);

/* Publish a message of at most largest_message bytes. */
enum ring_outcome message_ring_write(struct message_ring *ring, const void *data, uint32_t length,
                                     struct ring_finding *finding);

/* Find the next message; to be followed at once by message_ring_take, or by nothing. */
enum ring_outcome message_ring_find(const struct message_ring *ring, struct ring_finding *finding);

/* Copy a message that was found, of finding->length bytes, and give its room back. */
void message_ring_take(struct message_ring *ring, const struct ring_finding *finding, void *data);

/* Post the peer if it waits for room; to be called after messages were taken. */
void message_ring_tell_of_room(struct message_ring *ring);

void message_ring_want_room(struct message_ring *ring, bool wanted);

/* This side has found room: it wants none, whatever was said before. */
void message_ring_has_room(struct message_ring *ring);

/* Say whether this side waits to be woken; having said so, look for messages before waiting. */
void message_ring_sleep(struct message_ring *ring, bool sleeps);

/* Post the peer: wake it, or keep its next wait from blocking. */
void message_ring_post(struct message_ring *ring);

/* Post the peer if it waits to be woken; to be called after a message was published. */
void message_ring_wake_peer(struct message_ring *ring);

/* Whether the peer has posted since this was asked last. */
bool message_ring_take_post(struct message_ring *ring);

/* The word that changes when the peer posts. */
struct futex_word message_ring_peer_posts(const struct message_ring *ring);

/* Say that this side neither reads nor writes any longer, and post the peer. */
void message_ring_say_end(struct message_ring *ring);

bool message_ring_ended(const struct message_ring *ring);

/* The cell that changes when the peer publishes. */
const cell_value *message_ring_peer_published(const struct message_ring *ring);

#endif
