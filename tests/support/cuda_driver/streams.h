/* Streams: each is a queue that a thread of its own works off, in order. All of it with the lock held. */
#ifndef FAKE_CUDA_STREAMS_H
#define FAKE_CUDA_STREAMS_H

#include "contexts.h"
#include "events.h"
#include "ranges.h"

enum what { MARK, COPY, FILL, RECORD, WAIT, CALL, ALLOCATED, FREED };

struct operation {
    enum what what;
    uint64_t number;   /* of all that was ever queued in this process */
    bool poisons_late; /* what it will write is poisoned only when its turn comes */
    bool is_late;      /* waits for FAKE_CUDA_DELAY_US before it is carried out */
    uintptr_t to, from;
    size_t size;
    unsigned width; /* of the pattern of a fill, in bytes */
    uint32_t pattern;
    struct event *event; /* holds it */
    uint64_t ticket;
    CUhostFn function;
    void *data;
    struct range *range;
    struct operation *next;
};

struct stream {
    struct object object;
    struct context *context;
    unsigned flags;
    int priority;
    bool retired, works;
    struct operation *first, *last;
    uint64_t finished; /* the number of the last operation that is done */
    struct stream *next;
};

struct stream *stream_find(CUstream handle); /* default streams as well; NULL: destroyed, or never was one */
struct stream *stream_create(unsigned flags, int priority);
uint64_t enqueue(struct stream *stream, struct operation operation);
CUresult stream_wait(struct stream *stream, uint64_t number);
CUresult context_wait_idle(struct context *context);
bool has_others_before(struct stream *stream); /* what is queued now may be waiting for more than copies */
bool is_in_use(uintptr_t base, size_t size);   /* by anything queued in any stream */

/* Of operations.c */
void carry_out(struct operation *operation); /* lets go of the lock meanwhile */
void operation_free(struct operation *operation);
bool copy_bytes(uintptr_t to, uintptr_t from, size_t size); /* false: something of it is not mapped */
bool fill_bytes(uintptr_t to, size_t size, uint32_t pattern, unsigned width);
bool poison(uintptr_t to, size_t size, unsigned char byte);

enum { POISON_PENDING = 0xDB, POISON_NEW = 0xCD, POISON_FREED = 0xDD };

#endif
