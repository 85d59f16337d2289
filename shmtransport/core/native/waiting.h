/* Looking at a cell until it changes, without Python and without the GIL. */
#ifndef SHMTRANSPORT_WAITING_H
#define SHMTRANSPORT_WAITING_H

#include <stdatomic.h>
#include <stdbool.h>

#include "message_ring.h"

/* Now, in seconds of the clock that time.perf_counter shows. */
double clock_seconds(void);

/* Look until the cell has another value than seen, or the clock shows deadline; whether it has. It looks at least once.
 * What was stored before that other value is visible after this. */
bool look_until_changed(const cell_value *cell, uint64_t seen, double deadline);

/* As look_until_changed, or until a flag is set; whether one of both is so. */
bool look_until_changed_or(const cell_value *cell, uint64_t seen, const atomic_bool *flag, double deadline);

/* As look_until_changed, for any of several cells, or until a byte that others write is not 0. */
bool look_until_any_changed(const cell_value *const *cells, const uint64_t *seen, size_t count,
                            const atomic_uchar *flag, double deadline);

#endif
