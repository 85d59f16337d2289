/* Waiting for words in memory, and waking those who wait: Linux's futexes; no Python. */
#ifndef SHMTRANSPORT_FUTEX_H
#define SHMTRANSPORT_FUTEX_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MOST_FUTEX_WORDS 128 /* the kernel's limit for one wait */
#define LOOK_SECONDS 1e-3    /* how often to look at what can't be waited for */

/* A word, and the value at which a wait for it blocks. */
struct futex_word {
    const _Atomic uint32_t *word;
    uint32_t seen;
    bool is_private; /* in this process's own memory, not in a segment */
};

/* Wake all who wait for this word, in this process and, unless it is private, in others. */
void futex_wake(_Atomic uint32_t *word, bool is_private);

/* Block until one of at most MOST_FUTEX_WORDS words has another value than was seen or is woken, a signal comes, or time
 * is up; false in the last two cases. A wake-up may be late, of a post that was taken before: look again.
 *
 * Linux before 5.16, and a container that forbids futex_waitv, can wait for one word only: there the last one is waited
 * for, and the others are looked at every LOOK_SECONDS. */
bool futex_wait_any(const struct futex_word *words, size_t count, double seconds);

#endif
