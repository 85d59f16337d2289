/* How long to look for a message before blocking: core/patience.py's rule. */
#ifndef SHMTRANSPORT_PATIENCE_H
#define SHMTRANSPORT_PATIENCE_H

#include "module.h"

struct patience {
    double spin_seconds; /* negative: to find out */
    int failures, to_pass;
};

/* What an object of this type decides by; NULL with a TypeError for any other object. */
struct patience *patience_of(PyObject *object);

/* How long to look before the wait that begins now. */
double patience_seconds(struct patience *patience);

/* Say whether a look has found something. */
void patience_learn(struct patience *patience, bool found);

#endif
