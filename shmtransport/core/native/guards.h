/* Guarded memory: mappings of files that another process may cut short. No Python.
 *
 * To read or write behind the end of a mapped file is SIGBUS, which ends the process. A guarded range gets pages of zeros
 * there instead, from the one that was touched to the range's end, and is marked as cut. What lies before the cut stays.
 * Every other SIGBUS goes to the handler that was there before.
 *
 * Ranges are added by one thread at a time and removed by any; the handler may run on any thread meanwhile.
 */
#ifndef SHMTRANSPORT_GUARDS_H
#define SHMTRANSPORT_GUARDS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MOST_GUARDS 4096

/* Guard a range of whole pages; its number, or -1 where there are too many or the handler can't be installed. */
int guard_range(uintptr_t start, size_t nbytes);

/* To be called before the range is unmapped; a number that guard_range gave. */
void unguard_range(int number);

bool range_was_cut(int number);

#endif
