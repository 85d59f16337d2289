/* What a stream's thread does with each operation. A copy's source is read only now, FAKE_CUDA_DELAY_US after its turn
   came. Bytes are moved by the kernel, so that memory that is gone makes an error that sticks, not a crash. */
#define _GNU_SOURCE
#include "streams.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "pools.h"
#include "state.h"

bool copy_bytes(uintptr_t to, uintptr_t from, size_t size)
{
    while (size > 0) {
        struct iovec into = {(void *)to, size}, out_of = {(void *)from, size};
        ssize_t moved = process_vm_readv(getpid(), &into, 1, &out_of, 1, 0);
        if (moved < 0 && (errno == ENOSYS || errno == EPERM)) { /* a sandbox forbids the call */
            memmove((void *)to, (void *)from, size);
            return true;
        }
        if (moved <= 0)
            return false;
        to += (size_t)moved;
        from += (size_t)moved;
        size -= (size_t)moved;
    }
    return true;
}

bool fill_bytes(uintptr_t to, size_t size, uint32_t pattern, unsigned width)
{
    unsigned char block[4096];
    for (size_t i = 0; i < sizeof block; i++)
        block[i] = ((unsigned char *)&pattern)[i % width];
    bool filled = true;
    for (size_t done = 0; done < size && filled; done += sizeof block) {
        size_t part = size - done < sizeof block ? size - done : sizeof block;
        filled = copy_bytes(to + done, (uintptr_t)block, part);
    }
    return filled;
}

bool poison(uintptr_t to, size_t size, unsigned char byte)
{
    return fill_bytes(to, size, byte, 1);
}

static bool move(struct operation *operation)
{
    return operation->what == COPY ? copy_bytes(operation->to, operation->from, operation->size)
                                   : fill_bytes(operation->to, operation->size, operation->pattern, operation->width);
}

static void move_late(struct operation *operation)
{
    bool moved = !operation->poisons_late || poison(operation->to, operation->size, POISON_PENDING);
    while (settings.stall && !is_lost())
        wait_change();
    unsigned long delay = operation->is_late ? settings.delay_us : 0;
    bool lost = is_lost();
    unlock();
    if (!lost && delay > 0)
        sleep_us(delay);
    moved = moved && (lost || move(operation));
    lock();
    if (!moved)
        stick(CUDA_ERROR_ILLEGAL_ADDRESS);
}

void carry_out(struct operation *operation)
{
    switch (operation->what) {
    case MARK:
        break;
    case COPY:
    case FILL:
        move_late(operation);
        break;
    case RECORD:
        event_complete(operation->event, operation->ticket);
        break;
    case WAIT:
        event_await(operation->event, operation->ticket);
        break;
    case CALL:
        unlock();
        operation->function(operation->data);
        lock();
        break;
    case ALLOCATED:
        poison(operation->to, operation->size, POISON_NEW);
        break;
    case FREED:
        pool_reclaim(operation->range);
        break;
    }
}

void operation_free(struct operation *operation)
{
    if (operation->event != NULL)
        object_drop(&operation->event->object);
    free(operation);
}
