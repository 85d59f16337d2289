#include "message_ring.h"

#include <string.h>

#include "layout.h"

_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "a cell is shared with another process: it must be lock-free");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "lengths are little-endian");

static cell_value *cell_of(const struct ring_area *area, enum cell cell)
{
    return (cell_value *)(area->memory + cell * CELL_BYTES);
}

static uint64_t record_bytes(uint64_t length)
{
    return (length + LENGTH_BYTES + RECORD_ALIGNMENT - 1) & -(uint64_t)RECORD_ALIGNMENT;
}

bool ring_area_fits(uintptr_t address, uint64_t nbytes)
{
    return address != 0 && address % sizeof(cell_value) == 0 && nbytes % RECORD_ALIGNMENT == 0
        && nbytes >= RECORDS_OFFSET + LARGEST_RECORDS * RECORD_ALIGNMENT;
}

struct ring_area ring_area_at(uintptr_t address, uint64_t nbytes)
{
    unsigned char *memory = (unsigned char *)address;
    return (struct ring_area){memory, memory + RECORDS_OFFSET, nbytes - RECORDS_OFFSET};
}

void message_ring_begin(struct message_ring *ring, struct ring_area own, struct ring_area peer)
{
    *ring = (struct message_ring){.own = own, .peer = peer};
    ring->largest_message = own.capacity / LARGEST_RECORDS - LENGTH_BYTES;
    if (ring->largest_message > UINT32_MAX)
        ring->largest_message = UINT32_MAX;
}

const cell_value *message_ring_peer_published(const struct message_ring *ring)
{
    return cell_of(&ring->peer, CELL_PUBLISHED);
}

bool message_ring_readable(const struct message_ring *ring)
{
    return atomic_load_explicit(message_ring_peer_published(ring), memory_order_acquire) != ring->consumed;
}

/* Copy bytes into a ring from a position on, around its end. */
static void copy_in(const struct ring_area *area, uint64_t start, const void *source, size_t nbytes)
{
    size_t first = area->capacity - start < nbytes ? area->capacity - start : nbytes;
    memcpy(area->records + start, source, first);
    memcpy(area->records, (const unsigned char *)source + first, nbytes - first);
}

static void copy_out(const struct ring_area *area, uint64_t start, void *target, size_t nbytes)
{
    size_t first = area->capacity - start < nbytes ? area->capacity - start : nbytes;
    memcpy(target, area->records + start, first);
    memcpy((unsigned char *)target + first, area->records, nbytes - first);
}

static bool has_room(const struct message_ring *ring, uint64_t needed)
{
    return ring->published + needed - ring->peer_consumed <= ring->own.capacity;
}

/* Learn how far the peer has read. */
static enum ring_outcome look_for_room(struct message_ring *ring, struct ring_finding *finding)
{
    uint64_t consumed = atomic_load_explicit(cell_of(&ring->peer, CELL_CONSUMED), memory_order_acquire);
    if (consumed < ring->peer_consumed || consumed > ring->published) {
        finding->figures[0] = consumed;
        return RING_BAD_CONSUMED;
    }
    ring->peer_consumed = consumed;
    return RING_DONE;
}

enum ring_outcome message_ring_write(struct message_ring *ring, const void *data, uint32_t length,
                                     struct ring_finding *finding)
{
    uint64_t needed = record_bytes(length);
    if (!has_room(ring, needed)) {
        enum ring_outcome outcome = look_for_room(ring, finding);
        if (outcome != RING_DONE)
            return outcome;
        if (!has_room(ring, needed))
            return RING_NOTHING;
    }
    uint64_t start = ring->published % ring->own.capacity;
    memcpy(ring->own.records + start, &length, LENGTH_BYTES); /* records are aligned: it is never cut in two */
    copy_in(&ring->own, (start + LENGTH_BYTES) % ring->own.capacity, data, length);
    ring->published += needed;
    atomic_store_explicit(cell_of(&ring->own, CELL_PUBLISHED), ring->published, memory_order_release);
    return RING_DONE;
}

enum ring_outcome message_ring_find(const struct message_ring *ring, struct ring_finding *finding)
{
    uint64_t published = atomic_load_explicit(message_ring_peer_published(ring), memory_order_acquire);
    uint64_t unread = published - ring->consumed;
    if (unread == 0)
        return RING_NOTHING;
    if (unread > ring->peer.capacity || unread % RECORD_ALIGNMENT != 0) {
        finding->figures[0] = published;
        finding->figures[1] = ring->consumed;
        return RING_BAD_PUBLISHED;
    }
    uint64_t start = ring->consumed % ring->peer.capacity;
    const _Atomic uint32_t *at = (const _Atomic uint32_t *)(ring->peer.records + start);
    uint32_t length = atomic_load_explicit(at, memory_order_relaxed); /* once, whatever the compiler makes of it */
    finding->figures[0] = length;
    finding->figures[1] = unread;
    if (record_bytes(length) > unread)
        return RING_BAD_RECORD;
    if (length > ring->largest_message)
        return RING_BAD_LENGTH;
    finding->start = start;
    finding->length = length;
    return RING_DONE;
}

void message_ring_take(struct message_ring *ring, const struct ring_finding *finding, void *data)
{
    copy_out(&ring->peer, (finding->start + LENGTH_BYTES) % ring->peer.capacity, data, finding->length);
    ring->consumed += record_bytes(finding->length);
    atomic_store_explicit(cell_of(&ring->own, CELL_CONSUMED), ring->consumed, memory_order_release);
}

void message_ring_tell_of_room(struct message_ring *ring)
{
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(cell_of(&ring->peer, CELL_WANTS_ROOM), memory_order_relaxed) != 0)
        message_ring_post(ring);
}

void message_ring_want_room(struct message_ring *ring, bool wanted)
{
    atomic_store_explicit(cell_of(&ring->own, CELL_WANTS_ROOM), wanted, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
}

void message_ring_sleep(struct message_ring *ring, bool sleeps)
{
    atomic_store_explicit(cell_of(&ring->own, CELL_SLEEPS), sleeps, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
}

/* The count of posts in an area: the low half of its cell, which is what the kernel can wait for. */
static _Atomic uint32_t *posts_in(const struct ring_area *area)
{
    return (_Atomic uint32_t *)cell_of(area, CELL_POSTS);
}

void message_ring_post(struct message_ring *ring)
{
    atomic_fetch_add_explicit(posts_in(&ring->own), 1, memory_order_release);
    futex_wake(posts_in(&ring->own), false);
}

void message_ring_wake_peer(struct message_ring *ring)
{
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(cell_of(&ring->peer, CELL_SLEEPS), memory_order_relaxed) != 0)
        message_ring_post(ring);
}

bool message_ring_take_post(struct message_ring *ring)
{
    uint32_t posts = atomic_load_explicit(posts_in(&ring->peer), memory_order_acquire);
    bool taken = posts != ring->posts_seen;
    ring->posts_seen = posts;
    return taken;
}

struct futex_word message_ring_peer_posts(const struct message_ring *ring)
{
    return (struct futex_word){posts_in(&ring->peer), ring->posts_seen, false};
}

void message_ring_has_room(struct message_ring *ring)
{
    if (atomic_load_explicit(cell_of(&ring->own, CELL_WANTS_ROOM), memory_order_relaxed) != 0)
        message_ring_want_room(ring, false);
}

void message_ring_say_end(struct message_ring *ring)
{
    atomic_store_explicit(cell_of(&ring->own, CELL_ENDED), 1, memory_order_release);
    message_ring_post(ring);
}

bool message_ring_ended(const struct message_ring *ring)
{
    return atomic_load_explicit(cell_of(&ring->peer, CELL_ENDED), memory_order_acquire) != 0
        && !message_ring_readable(ring);
}
