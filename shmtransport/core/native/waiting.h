/* Looking at a cell until it changes, without Python and without the GIL. */
#ifndef SHMTRANSPORT_WAITING_H
#define SHMTRANSPORT_WAITING_H

#include <stdbool.h>

#include "message_ring.h"

/* Now, in seconds of the clock that time.perf_counter shows. */
double clock_seconds(void);

/* Look until the cell has another value than seen, or the clock shows deadline; whether it has. It looks at least once.
 * What was stored before that other value is visible after this. */
bool look_until_changed(const cell_value *cell, uint64_t seen, double deadline);

#endif
