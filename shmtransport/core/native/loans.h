/* What this process has lent and sent of its own segment: no Python, and but for one function no other thread's business.
 *
 * The rules are those of core/loans.py, decision by decision. A loan ends on any thread, without the GIL: it is put on a
 * list that the owner looks at when it needs room. Everything else is done under the GIL.
 */
#ifndef SHMTRANSPORT_LOANS_H
#define SHMTRANSPORT_LOANS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "allocator.h"
#include "mapping.h"
#include "views.h"

#define LOAN_BUCKETS 1024 /* a power of two */
#define FEW_HELD 8        /* as in core/loans.py */
#define NO_SLOT (-1)

/* A claimed block. It is free again once it has ended and every hold of it has. */
struct loan {
    struct view view; /* first, so that a pointer to it is one to the loan; unused for a copy */
    struct loans *owner;
    struct block *block;
    uint64_t holds;
    bool ended;
    bool is_copy;            /* no local tensor looks into it */
    struct loan *next_ended; /* in the list of those whose end has not been looked at */
    struct loan *next_beside; /* in its bucket */
};

/* What a descriptor that was sent holds, by its slot. */
struct hold {
    struct loan *loan; /* NULL if the slot is free */
    uint64_t sequence;
    double since;
    int32_t before, behind; /* by age; NO_SLOT at the ends */
};

struct loans {
    atomic_size_t references; /* of Python's object, and of each loan with a tensor */
    _Atomic(struct loan *) ended;
    struct mapping *data_mapping, *cells_mapping;
    unsigned char *data;
    const _Atomic uint64_t *cells; /* the release table in the peer's segment */
    struct allocator allocator;
    uint64_t sequence; /* the last one that was given out */
    uint64_t held_count;
    int32_t oldest, youngest;
    int32_t slots, free_count;
    int32_t *free_slots;
    struct hold *holds;
    struct loan *buckets[LOAN_BUCKETS];
};

/* With one reference; NULL without memory. The data's size is a positive multiple of the allocator's alignment. */
struct loans *loans_make(struct mapping *data_mapping, size_t data_offset, size_t data_bytes,
                         struct mapping *cells_mapping, size_t cells_offset, int32_t slots);

void loans_drop(struct loans *loans);

/* Claim a block, after looking at what has ended; NULL without room or memory. A loan is to be put over a tensor; a copy
 * is to be held, or given back. */
struct loan *loans_claim(struct loans *loans, int64_t nbytes, bool is_copy);
void loans_give_back(struct loan *loan);

/* Whether an address lies in the data area. */
bool loans_contain(const struct loans *loans, const void *address);

/* The loan that begins at an address, or NULL. */
struct loan *loans_find(const struct loans *loans, const void *start);

/* The slot that the next hold takes, after looking at what has ended; NO_SLOT if there is none. */
int32_t loans_next_slot(struct loans *loans);

/* Hold a loan by the slot that loans_next_slot gave, and the next sequence. */
void loans_hold(struct loans *loans, struct loan *loan, int32_t slot);

/* End a hold, unless it has ended. */
void loans_end_hold(struct loans *loans, uint64_t slot, uint64_t sequence);

/* Free all that has ended. */
void loans_collect(struct loans *loans);

#endif
