/* The queues and their threads. Work runs in the order of its stream; the legacy default stream and the streams that
   are not NON_BLOCKING wait for each other, as in CUDA. Once an error sticks or the process ends nothing runs. */
#define _GNU_SOURCE
#include "streams.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>

#include "state.h"

static struct stream *streams;
static uint64_t last_number;

static bool is_legacy(struct stream *stream)
{
    return stream->context->legacy == stream;
}

static bool precedes(struct stream *other, struct stream *stream, uint64_t number)
{
    if (other == stream || other->context != stream->context || other->first == NULL || other->first->number > number)
        return false;
    return (is_legacy(other) || is_legacy(stream)) && !((other->flags | stream->flags) & STREAM_NON_BLOCKING);
}

static bool may_run(struct stream *stream, uint64_t number)
{
    for (struct stream *other = streams; other != NULL; other = other->next)
        if (precedes(other, stream, number))
            return false;
    return true;
}

static void *work(void *argument)
{
    struct stream *stream = argument;
    lock();
    for (;;) {
        struct operation *operation = stream->first;
        if (is_closing() || (operation == NULL && stream->retired))
            break;
        if (operation == NULL || sticky_error() != CUDA_SUCCESS || !may_run(stream, operation->number)) {
            wait_change();
            continue;
        }
        carry_out(operation);
        if (is_lost())
            continue;
        stream->first = operation->next;
        if (stream->first == NULL)
            stream->last = NULL;
        stream->finished = operation->number;
        operation_free(operation);
        changed();
    }
    if (!is_closing())
        object_drop(&stream->object);
    unlock();
    return NULL;
}

static void start_thread(struct stream *stream)
{
    pthread_t thread;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the program's own threads' */
    if (pthread_create(&thread, NULL, work, stream) != 0)
        abort();
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_detach(thread);
    object_hold(&stream->object);
    stream->works = true;
}

uint64_t enqueue(struct stream *stream, struct operation operation)
{
    struct operation *queued = malloc(sizeof *queued);
    if (queued == NULL)
        abort();
    *queued = operation;
    queued->number = ++last_number;
    queued->next = NULL;
    if (stream->last == NULL)
        stream->first = queued;
    else
        stream->last->next = queued;
    stream->last = queued;
    if (!stream->works)
        start_thread(stream);
    changed();
    return queued->number;
}

CUresult stream_wait(struct stream *stream, uint64_t number)
{
    object_hold(&stream->object);
    while (stream->finished < number && !is_lost())
        wait_change();
    object_drop(&stream->object);
    return is_closing() ? CUDA_ERROR_DEINITIALIZED : sticky_error();
}

CUresult context_wait_idle(struct context *context)
{
    uint64_t upto = last_number;
    struct stream *busy;
    do {
        busy = streams;
        while (busy != NULL && (busy->context != context || busy->first == NULL || busy->first->number > upto))
            busy = busy->next;
        if (busy != NULL)
            wait_change();
    } while (busy != NULL && !is_lost());
    return is_closing() ? CUDA_ERROR_DEINITIALIZED : sticky_error();
}

bool has_others_before(struct stream *stream)
{
    for (struct operation *queued = stream->first; queued != NULL; queued = queued->next)
        if (queued->what == WAIT || queued->what == CALL)
            return true;
    return !may_run(stream, last_number + 1);
}

bool is_in_use(uintptr_t base, size_t size)
{
    for (struct stream *stream = streams; stream != NULL; stream = stream->next)
        for (struct operation *queued = stream->first; queued != NULL; queued = queued->next)
            if ((queued->what == COPY || queued->what == FILL || queued->what == ALLOCATED) &&
                (ranges_overlap(base, size, queued->to, queued->size) ||
                 ranges_overlap(base, size, queued->from, queued->what == COPY ? queued->size : 0)))
                return true;
    return false;
}

/* Streams' handles */

static void destroy(struct object *object)
{
    struct stream *stream = (struct stream *)object;
    struct stream **place = &streams;
    while (*place != stream)
        place = &(*place)->next;
    *place = stream->next;
    object_drop(&stream->context->object);
    free(stream);
}

static struct stream *create(unsigned flags, int priority, bool hidden)
{
    struct context *context = this_context();
    struct stream *stream = context == NULL ? NULL : calloc(1, sizeof *stream);
    if (stream == NULL)
        return NULL;
    object_publish(&stream->object, STREAM, destroy, hidden);
    object_hold(&context->object);
    stream->context = context;
    stream->flags = flags;
    stream->priority = priority;
    stream->next = streams;
    return streams = stream;
}

struct stream *stream_create(unsigned flags, int priority)
{
    return create(flags, priority, false);
}

struct stream *stream_find(CUstream handle)
{
    static _Thread_local struct stream *own;
    struct context *context = this_context();
    if (handle > STREAM_PER_THREAD)
        return object_find(STREAM, handle);
    if (context == NULL)
        return NULL;
    if (handle == STREAM_PER_THREAD) {
        if (own == NULL || own->context != context)
            own = create(0, 0, true);
        return own;
    }
    if (context->legacy == NULL)
        context->legacy = create(0, 0, true);
    return context->legacy;
}
