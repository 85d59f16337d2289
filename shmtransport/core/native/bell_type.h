/* A bell as Python sees it, and the blocking of a side that has told its peers. */
#ifndef SHMTRANSPORT_BELL_TYPE_H
#define SHMTRANSPORT_BELL_TYPE_H

#include "module.h"

#include "bell.h"

/* What an object of this type is; NULL with a TypeError for any other object. */
struct bell *bell_in(PyObject *object);

/* Say to the peers of at least one ring that this side sleeps, look at the rings once more, then block without the GIL until
 * there is a post, a signal comes, or time is up; 1 if it blocked, 0 if not, -1 with the error of a signal handler set. The
 * rings stay where they are meanwhile, and no other thread waits with this bell. */
int bell_sleep(struct bell *bell, struct message_ring *const *rings, size_t count, double seconds);

#endif
