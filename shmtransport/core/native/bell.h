/* What one side waits with: a word of its own, and those in which its peers count their posts; no Python. The rules are those
 * of core/bell.py. */
#ifndef SHMTRANSPORT_BELL_H
#define SHMTRANSPORT_BELL_H

#include "message_ring.h"

struct bell {
    _Atomic uint32_t posts; /* of this process: any thread's, any signal handler's */
    uint32_t seen;
};

/* Wake the thread that waits, or keep the next one from blocking. */
void bell_post(struct bell *bell);

/* Whether this process, or the peer of one of several rings, has posted since this was asked last. */
bool bell_take(struct bell *bell, struct message_ring *const *rings, size_t count);

/* Block until there is a post, a signal comes, or time is up, and take what there is: whether there was a post. It returns
 * early where there are more rings than can be waited for. */
bool bell_wait(struct bell *bell, struct message_ring *const *rings, size_t count, double seconds);

#endif
