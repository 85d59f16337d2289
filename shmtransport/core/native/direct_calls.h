/* The calls of a client that need nothing but this core: what its files share. */
#ifndef SHMTRANSPORT_DIRECT_CALLS_H
#define SHMTRANSPORT_DIRECT_CALLS_H

#include "module.h"

#include "in_flight.h"

typedef struct {
    PyObject_HEAD
    struct in_flight flights;
    PyObject *ring, *ids;
    PyObject *patience, *bell;
    PyObject *call_back;                         /* called with a call that has ended and has callbacks */
    PyObject *acquire, *release;                 /* of the lock that a thread holds while it receives */
    PyObject *followers, *received_for;          /* those that wait for their replies: empty if no other thread does */
    PyObject *begin_receiving, *end_receiving;   /* called with a call, around a wait that blocks */
    unsigned long long largest_message;
    bool closed;
} DirectCalls;

/* Whether it may still be used; a garbage collection may have cleared it, and Python code may have closed it. */
static inline bool direct_is_usable(const DirectCalls *self)
{
    return !self->closed && self->ring != NULL;
}

/* Send a call's request: 1, 0 with nothing done, -1 with an error set and nothing sent. */
int direct_begin_call(DirectCalls *self, CallState *call, PyObject *arguments, PyObject *keywords);

/* Receive, look and block until the call is ready, something is left, or time is up: 0, or -1 with an error set. */
int direct_wait_for(DirectCalls *self, CallState *call, double seconds);

/* call(call, given, seconds): begin with the arguments and keywords in given, and wait; the result, and the call is marked
 * as handed out. None otherwise: there are errors, other threads or the whole path to see to; given has its item again
 * if nothing was sent. */
PyObject *direct_call(PyObject *object, PyObject *const *arguments, Py_ssize_t count);

/* begin(call, arguments, keywords): whether the request was sent. */
PyObject *direct_begin(PyObject *object, PyObject *const *arguments, Py_ssize_t count);

/* wait(call, seconds): wait for as long as this, or for less; whether the call is ready. PeerProtocolError if the connection
 * is to end with it. */
PyObject *direct_wait(PyObject *object, PyObject *const *arguments, Py_ssize_t count);

#endif
