/* A message ring as Python sees it. */
#ifndef SHMTRANSPORT_MESSAGE_RING_TYPE_H
#define SHMTRANSPORT_MESSAGE_RING_TYPE_H

#include "module.h"

#include "message_ring.h"

/* What an object of this type, or of one derived from it, is; NULL with a TypeError for any other object. */
struct message_ring *ring_in(PyObject *object);

bool ring_is_readable(PyObject *ring);

/* The next message, borrowed, which stays with the ring; NULL if there is none, and for an invalid one, which ring.read is
 * to look at. */
PyObject *ring_next(PyObject *ring);

/* The message that ring_next has returned, with no Python code run since then: it is the caller's now. */
PyObject *ring_take_next(PyObject *ring);

#endif
