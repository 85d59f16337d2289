#define _POSIX_C_SOURCE 200809L

#include "waiting.h"

#include <time.h>

#define LOOKS_BETWEEN_CLOCKS 16 /* a look at the clock takes about as long as these */

/* Tell the core that this is a loop that waits: it draws less power, and leaves more to its other thread. */
static inline void pause_core(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

double clock_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

double look_slice_end(double now, double deadline)
{
    return now + LONGEST_LOOK < deadline ? now + LONGEST_LOOK : deadline;
}

static bool has_changed(const cell_value *const *cells, const uint64_t *seen, size_t count)
{
    for (size_t index = 0; index < count; index++)
        if (atomic_load_explicit(cells[index], memory_order_acquire) != seen[index])
            return true;
    return false;
}

bool look_until_changed(const cell_value *const *cells, const uint64_t *seen, size_t count, const atomic_uchar *flag,
                        double deadline)
{
    do {
        for (int look = 0; look < LOOKS_BETWEEN_CLOCKS; look++) {
            if (has_changed(cells, seen, count)
                || (flag != NULL && atomic_load_explicit(flag, memory_order_acquire) != 0))
                return true;
            pause_core();
        }
    } while (clock_seconds() < deadline);
    return false;
}
