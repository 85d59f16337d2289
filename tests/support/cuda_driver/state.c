/* The lock, the error that sticks, and the process's end.
   Once the process exits every call answers CUDA_ERROR_DEINITIALIZED and nothing waits, whatever is queued. */
#define _GNU_SOURCE
#include "state.h"

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#include "counters.h"

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
static atomic_bool closing;
static atomic_int sticky;

void lock(void)
{
    pthread_mutex_lock(&mutex);
}

void unlock(void)
{
    pthread_mutex_unlock(&mutex);
}

void changed(void)
{
    pthread_cond_broadcast(&condition);
}

void wait_change(void)
{
    pthread_cond_wait(&condition, &mutex);
}

bool is_closing(void)
{
    return atomic_load(&closing);
}

CUresult sticky_error(void)
{
    return atomic_load(&sticky);
}

bool is_lost(void)
{
    return is_closing() || sticky_error() != CUDA_SUCCESS;
}

void stick(CUresult error)
{
    atomic_store(&sticky, error);
    changed();
}

uint64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void sleep_us(unsigned long microseconds)
{
    struct timespec rest = {(time_t)(microseconds / 1000000), (long)(microseconds % 1000000) * 1000};
    while (nanosleep(&rest, &rest) != 0)
        continue;
}

__attribute__((destructor)) static void close_all(void)
{
    lock();
    write_report();
    atomic_store(&closing, true);
    changed();
    unlock();
}
