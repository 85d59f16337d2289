/* The gate of every entry point, in this order: counted, failed on request, refused for good after an error that
   sticks, refused before cuInit or without a current context. */
#define _GNU_SOURCE
#include "calls.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "contexts.h"

struct fault {
    char name[64];
    CUresult code;
    unsigned long long only; /* which call, from 1; 0: each */
};

enum { MOST_FAULTS = 32 };
static struct fault faults[MOST_FAULTS];
static size_t fault_count;
static struct call *calls;
static pthread_mutex_t own = PTHREAD_MUTEX_INITIALIZER; /* of the two lists above: calls are counted without the lock */
static atomic_bool is_initialised;

bool set_faults(const char *text)
{
    char copy[1024];
    if (strlen(text) >= sizeof copy)
        return false;
    strcpy(copy, text);
    pthread_mutex_lock(&own);
    fault_count = 0;
    char *rest = NULL;
    for (char *item = strtok_r(copy, ",", &rest); item != NULL; item = strtok_r(NULL, ",", &rest)) {
        char *equals = strchr(item, '=');
        if (equals == NULL || fault_count == MOST_FAULTS || (size_t)(equals - item) >= sizeof faults[0].name)
            continue;
        *equals = '\0';
        if (equals - item > 3 && strcmp(equals - 3, "_v2") == 0) /* calls are named without their version */
            equals[-3] = '\0';
        char *at = NULL;
        struct fault *fault = &faults[fault_count++];
        strcpy(fault->name, item);
        fault->code = (CUresult)strtol(equals + 1, &at, 10);
        fault->only = *at == '@' ? strtoull(at + 1, NULL, 10) : 0;
    }
    pthread_mutex_unlock(&own);
    return true;
}

static CUresult fault_of(struct call *call, unsigned long long number)
{
    CUresult code = CUDA_SUCCESS;
    pthread_mutex_lock(&own);
    if (!atomic_load(&call->known)) {
        call->next = calls;
        calls = call;
        atomic_store(&call->known, true);
    }
    for (size_t i = 0; i < fault_count && code == CUDA_SUCCESS; i++)
        if (strcmp(faults[i].name, call->name) == 0 && (faults[i].only == 0 || faults[i].only == number))
            code = faults[i].code;
    pthread_mutex_unlock(&own);
    return code;
}

void initialised(void)
{
    atomic_store(&is_initialised, true);
}

CUresult enter(struct call *call, enum needs needs)
{
    unsigned long long number = atomic_fetch_add(&call->count, 1) + 1;
    CUresult code = fault_of(call, number);
    if (code != CUDA_SUCCESS)
        return code;
    if (needs == NOTHING)
        return CUDA_SUCCESS;
    if (is_closing())
        return CUDA_ERROR_DEINITIALIZED;
    if (!atomic_load(&is_initialised))
        return CUDA_ERROR_NOT_INITIALIZED;
    if (strcmp(settings.sticky_function, call->name) == 0) {
        lock();
        stick(CUDA_ERROR_ILLEGAL_ADDRESS);
        unlock();
    }
    if (sticky_error() != CUDA_SUCCESS)
        return sticky_error();
    return needs == CURRENT_CONTEXT && current_context() == 0 ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS;
}

void each_call(void (*visit)(const char *name, unsigned long long count, void *data), void *data)
{
    pthread_mutex_lock(&own);
    for (struct call *call = calls; call != NULL; call = call->next)
        visit(call->name, atomic_load(&call->count), data);
    pthread_mutex_unlock(&own);
}

unsigned long long calls_of(const char *name)
{
    unsigned long long count = 0;
    pthread_mutex_lock(&own);
    for (struct call *call = calls; call != NULL; call = call->next) /* one name may have several versions */
        if (strcmp(call->name, name) == 0)
            count += atomic_load(&call->count);
    pthread_mutex_unlock(&own);
    return count;
}
