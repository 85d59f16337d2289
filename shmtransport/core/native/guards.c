#define _GNU_SOURCE /* MAP_ANONYMOUS */

#include "guards.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

struct guard {
    _Atomic uintptr_t start; /* 0: not in use; stored last, with release */
    _Atomic size_t nbytes;
    atomic_bool was_cut;
};

static struct guard guards[MOST_GUARDS];
static atomic_int used; /* no number from this one on has ever been in use */
static struct sigaction previous;
static uintptr_t page_bytes;

/* Put zeros from an address to its range's end; false if it is in no guarded range. */
static bool mend(uintptr_t address)
{
    int count = atomic_load_explicit(&used, memory_order_acquire);
    for (int number = 0; number < count; number++) {
        struct guard *guard = &guards[number];
        uintptr_t start = atomic_load_explicit(&guard->start, memory_order_acquire);
        size_t nbytes = atomic_load_explicit(&guard->nbytes, memory_order_acquire);
        if (start == 0 || address < start || address - start >= nbytes)
            continue;
        if (atomic_load_explicit(&guard->start, memory_order_relaxed) != start) /* it has become another range's */
            continue;
        uintptr_t page = address & ~(page_bytes - 1);
        void *mapped = mmap((void *)page, start + nbytes - page, PROT_READ | PROT_WRITE,
                            MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED)
            return false;
        atomic_store_explicit(&guard->was_cut, true, memory_order_release);
        return true;
    }
    return false;
}

/* What would have become of the signal without this file. */
static void pass_on(int number, siginfo_t *information, void *context)
{
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(number, information, context);
        return;
    }
    bool was_sent = information->si_code <= 0; /* by a process: returning would not raise it again */
    if (previous.sa_handler == SIG_IGN && was_sent)
        return;
    if (previous.sa_handler != SIG_IGN && previous.sa_handler != SIG_DFL) {
        previous.sa_handler(number);
        return;
    }
    struct sigaction by_default;
    memset(&by_default, 0, sizeof by_default);
    by_default.sa_handler = SIG_DFL;
    sigaction(number, &by_default, NULL);
    if (was_sent)
        raise(number); /* blocked until this handler returns */
}

static void on_bus_error(int number, siginfo_t *information, void *context)
{
    int error = errno;
    if (information->si_code != BUS_ADRERR || !mend((uintptr_t)information->si_addr))
        pass_on(number, information, context);
    errno = error;
}

static bool install(void)
{
    static bool is_installed;
    if (is_installed)
        return true;
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    page_bytes = (uintptr_t)sysconf(_SC_PAGESIZE);
    is_installed = sigaction(SIGBUS, NULL, &previous) == 0 && sigaction(SIGBUS, &action, NULL) == 0;
    return is_installed;
}

int guard_range(uintptr_t start, size_t nbytes)
{
    if (start == 0 || !install())
        return -1;
    int count = atomic_load_explicit(&used, memory_order_relaxed), number = 0;
    while (number < count && atomic_load_explicit(&guards[number].start, memory_order_relaxed) != 0)
        number++;
    if (number == MOST_GUARDS)
        return -1;
    atomic_store_explicit(&guards[number].was_cut, false, memory_order_relaxed);
    atomic_store_explicit(&guards[number].nbytes, nbytes, memory_order_release);
    atomic_store_explicit(&guards[number].start, start, memory_order_release);
    if (number == count)
        atomic_store_explicit(&used, count + 1, memory_order_release);
    return number;
}

void unguard_range(int number)
{
    atomic_store_explicit(&guards[number].start, 0, memory_order_release);
}

bool range_was_cut(int number)
{
    return atomic_load_explicit(&guards[number].was_cut, memory_order_acquire);
}
