/* Events: created, recorded, waited for. Flags that CUDA doesn't know are refused, and so are destroyed events.
   An interprocess event must not take times. What a process recorded that has died since counts as done. */
#define _GNU_SOURCE
#include "events.h"

#include <stdlib.h>
#include <unistd.h>

#include "calls.h"
#include "counters.h"
#include "streams.h"

enum { POLL_US = 100, POLLS_PER_LOOK = 20 };

uint64_t event_record(struct event *event)
{
    atomic_store(&event->shared->recorder, getpid());
    return atomic_fetch_add(&event->shared->recorded, 1) + 1;
}

uint64_t event_ticket(struct event *event)
{
    return atomic_load(&event->shared->recorded);
}

void event_complete(struct event *event, uint64_t ticket)
{
    unsigned long long before = atomic_load(&event->shared->completed);
    atomic_store(&event->shared->time_ns, nanoseconds());
    while (before < ticket && !atomic_compare_exchange_weak(&event->shared->completed, &before, ticket))
        continue;
    changed();
}

bool event_is_done(struct event *event, uint64_t ticket)
{
    return atomic_load(&event->shared->completed) >= ticket;
}

bool event_is_orphan(struct event *event)
{
    int recorder = atomic_load(&event->shared->recorder);
    return event->flags & EVENT_INTERPROCESS && recorder != 0 && recorder != getpid() && !is_alive(recorder);
}

void event_await(struct event *event, uint64_t ticket)
{
    object_hold(&event->object);
    for (unsigned looks = 1; !event_is_done(event, ticket) && !is_lost(); looks++) {
        if (!(event->flags & EVENT_INTERPROCESS)) {
            wait_change();
            continue;
        }
        if (looks % POLLS_PER_LOOK == 0 && event_is_orphan(event))
            break;
        unlock();
        sleep_us(POLL_US);
        lock();
    }
    object_drop(&event->object);
}

static void destroy(struct object *object)
{
    struct event *event = (struct event *)object;
    if (event->flags & EVENT_INTERPROCESS)
        unshare_event(event);
    else
        free(event->shared);
    free(event);
}

struct event *event_of(struct shared_event *shared, int file, bool imported)
{
    struct event *event = calloc(1, sizeof *event);
    if (event == NULL)
        return NULL;
    event->flags = shared->flags;
    event->shared = shared;
    event->file = file;
    event->imported = imported;
    object_publish(&event->object, EVENT, destroy, false);
    return event;
}

CUresult cuEventCreate(CUevent *out, unsigned flags)
{
    ENTER(cuEventCreate, CURRENT_CONTEXT);
    bool interprocess = flags & EVENT_INTERPROCESS;
    if (flags > (EVENT_BLOCKING_SYNC | EVENT_DISABLE_TIMING | EVENT_INTERPROCESS))
        return CUDA_ERROR_INVALID_VALUE;
    if (interprocess && !(flags & EVENT_DISABLE_TIMING))
        return CUDA_ERROR_INVALID_VALUE;
    int file = -1;
    struct shared_event *shared = interprocess ? share_event(&file) : calloc(1, sizeof *shared);
    if (shared == NULL)
        return CUDA_ERROR_OUT_OF_MEMORY;
    shared->flags = flags;
    lock();
    *out = event_of(shared, file, false)->object.handle;
    unlock();
    return CUDA_SUCCESS;
}

CUresult cuEventDestroy_v2(CUevent handle)
{
    ENTER(cuEventDestroy, INITIALISED);
    lock();
    struct event *event = object_find(EVENT, handle);
    if (event != NULL) {
        close_event_file(event);
        object_retire(&event->object);
    }
    unlock();
    return event == NULL ? CUDA_ERROR_INVALID_HANDLE : CUDA_SUCCESS;
}

static CUresult record(CUevent handle, CUstream onto)
{
    lock();
    struct event *event = object_find(EVENT, handle);
    struct stream *stream = stream_find(onto);
    bool valid = event != NULL && stream != NULL;
    if (valid) {
        object_hold(&event->object);
        enqueue(stream, (struct operation){.what = RECORD, .event = event, .ticket = event_record(event)});
    }
    unlock();
    return valid ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuEventRecord(CUevent event, CUstream stream)
{
    ENTER(cuEventRecord, CURRENT_CONTEXT);
    return record(event, stream);
}

CUresult cuEventRecordWithFlags(CUevent event, CUstream stream, unsigned flags)
{
    ENTER(cuEventRecordWithFlags, CURRENT_CONTEXT);
    return flags == 0 ? record(event, stream) : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuStreamWaitEvent(CUstream waiting, CUevent handle, unsigned flags)
{
    ENTER(cuStreamWaitEvent, CURRENT_CONTEXT);
    if (flags != 0)
        return CUDA_ERROR_INVALID_VALUE;
    lock();
    struct event *event = object_find(EVENT, handle);
    struct stream *stream = stream_find(waiting);
    bool valid = event != NULL && stream != NULL;
    if (valid) {
        counters.event_waits++;
        object_hold(&event->object);
        enqueue(stream, (struct operation){.what = WAIT, .event = event, .ticket = event_ticket(event)});
    }
    unlock();
    return valid ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuEventQuery(CUevent handle)
{
    ENTER(cuEventQuery, INITIALISED);
    lock();
    struct event *event = object_find(EVENT, handle);
    CUresult result = CUDA_ERROR_INVALID_HANDLE;
    if (event != NULL) {
        bool done = event_is_done(event, event_ticket(event)) || event_is_orphan(event);
        result = done ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
    }
    unlock();
    return result;
}

CUresult cuEventSynchronize(CUevent handle)
{
    ENTER(cuEventSynchronize, INITIALISED);
    lock();
    struct event *event = object_find(EVENT, handle);
    if (event != NULL)
        event_await(event, event_ticket(event));
    unlock();
    if (event == NULL)
        return CUDA_ERROR_INVALID_HANDLE;
    return is_closing() ? CUDA_ERROR_DEINITIALIZED : sticky_error();
}

CUresult cuEventElapsedTime_v2(float *milliseconds, CUevent from, CUevent to)
{
    ENTER(cuEventElapsedTime, INITIALISED);
    lock();
    CUresult result = CUDA_SUCCESS;
    struct event *events[] = {object_find(EVENT, from), object_find(EVENT, to)};
    for (int i = 0; i < 2 && result == CUDA_SUCCESS; i++) {
        if (events[i] == NULL || events[i]->flags & EVENT_DISABLE_TIMING || event_ticket(events[i]) == 0)
            result = CUDA_ERROR_INVALID_HANDLE;
        else if (!event_is_done(events[i], event_ticket(events[i])))
            result = CUDA_ERROR_NOT_READY;
    }
    if (result == CUDA_SUCCESS)
        *milliseconds = (float)((double)(int64_t)(events[1]->shared->time_ns - events[0]->shared->time_ns) / 1e6);
    unlock();
    return result;
}

CUresult cuEventElapsedTime(float *milliseconds, CUevent from, CUevent to)
{
    return cuEventElapsedTime_v2(milliseconds, from, to);
}
