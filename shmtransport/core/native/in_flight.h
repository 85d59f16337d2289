/* The calls of a client that wait for their replies, and how a reply ends one. */
#ifndef SHMTRANSPORT_IN_FLIGHT_H
#define SHMTRANSPORT_IN_FLIGHT_H

#include "module.h"

#include "call_state.h"
#include "inspection.h"

struct in_flight {
    PyObject *pending; /* a dict: the calls by their ids */
    PyObject *loans, *borrows, *counters;
};

/* Keep these; false with an error set where one is not what it must be. */
bool in_flight_init(struct in_flight *flights, PyObject *pending, PyObject *loans, PyObject *borrows, PyObject *counters);
void in_flight_clear(struct in_flight *flights);

/* The call in flight of this number, if there is one: borrowed. */
CallState *in_flight_find(const struct in_flight *flights, PyObject *number);

/* Read a reply that was looked at and can be taken, and end its call: 1, with a reference to the call, or NULL if it was
 * given up; -1 with an error set, PeerProtocolError if the connection is to end with it. May run Python code. */
int in_flight_end(const struct in_flight *flights, const struct call *reply, PyObject *number, size_t nbytes, double started,
                  CallState **ended);

#endif
