/* What the whole process shares: one lock, one condition, the settings, and the error that sticks. */
#ifndef FAKE_CUDA_STATE_H
#define FAKE_CUDA_STATE_H

#include "cuda_types.h"

/* Everything but the entry points' counts is read and changed with this lock held. */
void lock(void);
void unlock(void);
void changed(void);     /* something others may wait for has happened */
void wait_change(void); /* releases the lock meanwhile */

bool is_closing(void);        /* the process is on its way out */
CUresult sticky_error(void);  /* what every call answers from now on, or CUDA_SUCCESS */
bool is_lost(void);           /* one of the two: nothing runs, and no call waits */
void stick(CUresult error);   /* the device is lost: nothing that is queued runs any more */
uint64_t nanoseconds(void);   /* a monotonic clock */
void sleep_us(unsigned long); /* call without the lock */

struct settings {
    int devices;
    int driver_version;
    char uuids[256];
    unsigned long delay_us;
    bool stall;
    size_t register_limit;
    size_t device_bytes;
    char sticky_function[64];
    char report[256];
};

extern struct settings settings;
bool set_setting(const char *name, const char *value); /* a name without FAKE_CUDA_; with the lock held */

#endif
