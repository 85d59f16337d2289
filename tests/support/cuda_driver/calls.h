/* What every entry point does first: it is counted, may be made to fail, and may need a current context. */
#ifndef FAKE_CUDA_CALLS_H
#define FAKE_CUDA_CALLS_H

#include <stdatomic.h>

#include "state.h"

struct call {
    const char *name; /* without _v2 and the like */
    atomic_ullong count;
    atomic_bool known;
    struct call *next;
};

enum needs { NOTHING, INITIALISED, CURRENT_CONTEXT };

CUresult enter(struct call *call, enum needs needs);
unsigned long long calls_of(const char *name);
void each_call(void (*visit)(const char *name, unsigned long long count, void *data), void *data);
bool set_faults(const char *text); /* "name=code,name=code@n": the text of FAKE_CUDA_FAIL */
void initialised(void);

#define ENTER(function, needs)                            \
    do {                                                  \
        static struct call call_ = {.name = #function};   \
        CUresult refused_ = enter(&call_, needs);         \
        if (refused_ != CUDA_SUCCESS)                     \
            return refused_;                              \
    } while (0)

#endif
