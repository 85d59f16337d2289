/* Looking at cells until one changes, without Python and without the GIL. */
#ifndef SHMTRANSPORT_WAITING_H
#define SHMTRANSPORT_WAITING_H

#include <stdatomic.h>
#include <stdbool.h>

#include "message_ring.h"

#define LONGEST_LOOK 0.01 /* seconds: Python's signal handlers wait for as long at most */

/* Now, in seconds of the clock that time.perf_counter shows. */
double clock_seconds(void);

/* Look until one of several cells has another value than was seen, or a byte that others write, if there is one, is not
 * 0, or the clock shows deadline; false in the last case. It looks at least once. What was stored before that other value
 * is visible after this. */
bool look_until_changed(const cell_value *const *cells, const uint64_t *seen, size_t count, const atomic_uchar *flag,
                        double deadline);

/* Where a slice of a look that ends at a deadline is to end, for Python's signal handlers to run. */
double look_slice_end(double now, double deadline);

#endif
