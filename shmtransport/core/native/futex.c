#define _GNU_SOURCE

#include "futex.h"

#include <errno.h>
#include <limits.h>
#include <time.h>
#include <unistd.h>

#include <sys/syscall.h>

/* The kernel's own names for these are missing from older headers. */
#define WAIT 0
#define WAKE 1
#define PRIVATE 128
#define SIZE_32 2
#ifndef SYS_futex_waitv
#define SYS_futex_waitv 449 /* the same number on every machine */
#endif

#define LONGEST_SECONDS 3600.0 /* a caller waits again */

/* One word of futex_waitv, as the kernel lays it out. */
struct waiter {
    uint64_t value, address;
    uint32_t flags, reserved;
};

_Static_assert(sizeof(long) == 8 && sizeof(struct timespec) == 16, "system calls take 64-bit times here");

static atomic_bool has_no_waitv;

void futex_wake(_Atomic uint32_t *word, bool is_private)
{
    syscall(SYS_futex, word, is_private ? WAKE | PRIVATE : WAKE, INT_MAX, NULL, NULL, 0);
}

static struct timespec to_timespec(double seconds)
{
    double bounded = seconds < 0 ? 0 : seconds > LONGEST_SECONDS ? LONGEST_SECONDS : seconds;
    time_t whole = (time_t)bounded;
    return (struct timespec){whole, (long)((bounded - (double)whole) * 1e9)};
}

static bool has_changed(const struct futex_word *words, size_t count)
{
    for (size_t index = 0; index < count; index++)
        if (atomic_load_explicit(words[index].word, memory_order_acquire) != words[index].seen)
            return true;
    return false;
}

enum outcome { WOKEN, TIME_IS_UP, INTERRUPTED, NOT_POSSIBLE };

static enum outcome outcome_of(long result)
{
    if (result >= 0 || errno == EAGAIN)
        return WOKEN;
    if (errno == ETIMEDOUT)
        return TIME_IS_UP;
    return errno == ENOSYS || errno == EPERM ? NOT_POSSIBLE : INTERRUPTED;
}

static enum outcome wait_one(const struct futex_word *word, double seconds)
{
    struct timespec left = to_timespec(seconds);
    int operation = word->is_private ? WAIT | PRIVATE : WAIT;
    return outcome_of(syscall(SYS_futex, word->word, operation, word->seen, &left, NULL, 0));
}

/* Wait for the last word, and look at the others now and then. */
static enum outcome wait_and_look(const struct futex_word *words, size_t count, double seconds)
{
    enum outcome outcome = TIME_IS_UP;
    for (double left = seconds; left > 0 && outcome == TIME_IS_UP; left -= LOOK_SECONDS) {
        if (has_changed(words, count))
            return WOKEN;
        outcome = wait_one(&words[count - 1], left < LOOK_SECONDS ? left : LOOK_SECONDS);
    }
    return outcome;
}

static enum outcome wait_several(const struct futex_word *words, size_t count, double seconds)
{
    struct waiter waiters[MOST_FUTEX_WORDS];
    for (size_t index = 0; index < count; index++)
        waiters[index] = (struct waiter){
            .value = words[index].seen,
            .address = (uintptr_t)words[index].word,
            .flags = words[index].is_private ? SIZE_32 | PRIVATE : SIZE_32,
        };
    struct timespec now, left = to_timespec(seconds);
    clock_gettime(CLOCK_MONOTONIC, &now);
    struct timespec end = {now.tv_sec + left.tv_sec, now.tv_nsec + left.tv_nsec};
    if (end.tv_nsec >= 1000000000) {
        end.tv_sec++;
        end.tv_nsec -= 1000000000;
    }
    return outcome_of(syscall(SYS_futex_waitv, waiters, (unsigned)count, 0, &end, CLOCK_MONOTONIC));
}

bool futex_wait_any(const struct futex_word *words, size_t count, double seconds)
{
    if (count == 1)
        return wait_one(words, seconds) == WOKEN;
    if (!atomic_load_explicit(&has_no_waitv, memory_order_relaxed)) {
        enum outcome outcome = wait_several(words, count, seconds);
        if (outcome != NOT_POSSIBLE)
            return outcome == WOKEN;
        atomic_store_explicit(&has_no_waitv, true, memory_order_relaxed);
    }
    return wait_and_look(words, count, seconds) == WOKEN;
}
