/* Events. A recording has a ticket, the event's count of recordings; it is done once that many have completed.
   The counts of an interprocess event lie in a page that both processes map. */
#ifndef FAKE_CUDA_EVENTS_H
#define FAKE_CUDA_EVENTS_H

#include <stdatomic.h>

#include "handles.h"

struct shared_event {
    uint64_t magic;
    uint64_t id; /* named in the handle as well, so that a stale handle opens nothing */
    unsigned flags;
    atomic_int recorder; /* the process that recorded last */
    atomic_ullong recorded, completed;
    atomic_ullong time_ns; /* of the last completion */
};

struct event {
    struct object object;
    unsigned flags;
    struct shared_event *shared;
    int file; /* what the page is of, -1: none, or another process made it */
    bool imported;
};

/* All with the lock held; event_await lets go of it meanwhile. */
uint64_t event_record(struct event *event);
uint64_t event_ticket(struct event *event); /* of the last recording, 0: there was none */
void event_complete(struct event *event, uint64_t ticket);
bool event_is_done(struct event *event, uint64_t ticket);
bool event_is_orphan(struct event *event); /* another process recorded it last, and has died */
void event_await(struct event *event, uint64_t ticket);
struct event *event_of(struct shared_event *shared, int file, bool imported);

/* Of ipc_events.c */
struct shared_event *share_event(int *file);
void close_event_file(struct event *event); /* its handle opens nothing from now on */
void unshare_event(struct event *event);
bool is_alive(int process);

#endif
