#include "loans.h"

#include <stdlib.h>

#include "waiting.h"

static struct loan **bucket_of(const struct loans *loans, int64_t offset)
{
    size_t index = (size_t)(offset / BLOCK_ALIGNMENT) & (LOAN_BUCKETS - 1);
    return (struct loan **)&loans->buckets[index];
}

void loans_give_back(struct loan *loan)
{
    struct loans *loans = loan->owner;
    if (!loan->is_copy) {
        struct loan **link = bucket_of(loans, loan->block->offset);
        while (*link != loan)
            link = &(*link)->next_beside;
        *link = loan->next_beside;
    }
    allocator_release(&loans->allocator, loan->block);
    free(loan);
}

static bool make_tables(struct loans *loans, int32_t slots)
{
    loans->free_slots = calloc((size_t)slots, sizeof *loans->free_slots);
    loans->holds = calloc((size_t)slots, sizeof *loans->holds);
    if (loans->free_slots == NULL || loans->holds == NULL)
        return false;
    for (int32_t slot = 0; slot < slots; slot++)
        loans->free_slots[slot] = slots - 1 - slot;
    loans->slots = loans->free_count = slots;
    loans->oldest = loans->youngest = NO_SLOT;
    return true;
}

struct loans *loans_make(struct mapping *data_mapping, size_t data_offset, size_t data_bytes,
                         struct mapping *cells_mapping, size_t cells_offset, int32_t slots)
{
    struct loans *loans = calloc(1, sizeof *loans);
    if (loans == NULL)
        return NULL;
    if (!make_tables(loans, slots) || !allocator_begin(&loans->allocator, (int64_t)data_bytes)) {
        free(loans->free_slots);
        free(loans->holds);
        free(loans);
        return NULL;
    }
    atomic_init(&loans->references, 1);
    loans->data_mapping = mapping_hold(data_mapping);
    loans->cells_mapping = mapping_hold(cells_mapping);
    loans->data = data_mapping->start + data_offset;
    loans->cells = (const _Atomic uint64_t *)(const void *)(cells_mapping->start + cells_offset);
    return loans;
}

static void collect_ended(struct loans *loans)
{
    struct loan *loan = atomic_exchange_explicit(&loans->ended, NULL, memory_order_acquire), *in_order = NULL;
    while (loan != NULL) { /* the last to end is the first of the list */
        struct loan *next = loan->next_ended;
        loan->next_ended = in_order;
        in_order = loan;
        loan = next;
    }
    while (in_order != NULL) {
        loan = in_order;
        in_order = loan->next_ended;
        loan->ended = true;
        if (loan->holds == 0)
            loans_give_back(loan);
    }
}

/* Once no tensor looks into it any longer, and Python's object is gone: what the peer still holds no longer matters. */
static void end_loans(struct loans *loans)
{
    collect_ended(loans);
    for (int32_t slot = loans->oldest; slot != NO_SLOT; slot = loans->holds[slot].behind) {
        struct loan *loan = loans->holds[slot].loan;
        if (--loan->holds == 0)
            loans_give_back(loan);
    }
    allocator_end(&loans->allocator);
    mapping_drop(loans->data_mapping);
    mapping_drop(loans->cells_mapping);
    free(loans->free_slots);
    free(loans->holds);
    free(loans);
}

void loans_drop(struct loans *loans)
{
    if (atomic_fetch_sub_explicit(&loans->references, 1, memory_order_acq_rel) == 1)
        end_loans(loans);
}

/* On any thread: the reads and writes of the block come before what the owner does once it finds it there. */
static void end_loan(struct view *view)
{
    struct loan *loan = (struct loan *)view, *first;
    struct loans *loans = loan->owner;
    first = atomic_load_explicit(&loans->ended, memory_order_relaxed);
    do
        loan->next_ended = first;
    while (!atomic_compare_exchange_weak_explicit(&loans->ended, &first, loan, memory_order_release,
                                                  memory_order_relaxed));
    loans_drop(loans);
}

static bool is_released(const struct loans *loans, int32_t slot)
{
    return atomic_load_explicit(&loans->cells[slot], memory_order_acquire) == loans->holds[slot].sequence;
}

static void end_hold(struct loans *loans, int32_t slot)
{
    struct hold *hold = &loans->holds[slot];
    struct loan *loan = hold->loan;
    if (hold->before != NO_SLOT)
        loans->holds[hold->before].behind = hold->behind;
    else
        loans->oldest = hold->behind;
    if (hold->behind != NO_SLOT)
        loans->holds[hold->behind].before = hold->before;
    else
        loans->youngest = hold->before;
    hold->loan = NULL;
    loans->held_count--;
    loans->free_slots[loans->free_count++] = slot;
    if (--loan->holds == 0 && loan->ended)
        loans_give_back(loan);
}

/* Look at the oldest holds only: O(1) in first-in-first-out use. */
static void collect_oldest(struct loans *loans)
{
    while (loans->oldest != NO_SLOT && is_released(loans, loans->oldest))
        end_hold(loans, loans->oldest);
}

void loans_collect(struct loans *loans)
{
    collect_ended(loans);
    for (int32_t slot = loans->oldest, next; slot != NO_SLOT; slot = next) {
        next = loans->holds[slot].behind;
        if (is_released(loans, slot))
            end_hold(loans, slot);
    }
}

struct loan *loans_claim(struct loans *loans, int64_t nbytes, bool is_copy)
{
    if (atomic_load_explicit(&loans->ended, memory_order_relaxed) != NULL)
        collect_ended(loans);
    collect_oldest(loans);
    struct loan *loan = malloc(sizeof *loan);
    struct block *block = NULL;
    if (loan != NULL && allocator_prepare(&loans->allocator))
        block = allocator_claim(&loans->allocator, nbytes);
    if (block == NULL) {
        free(loan);
        return NULL;
    }
    loan->owner = loans;
    loan->block = block;
    loan->holds = 0;
    loan->ended = loan->is_copy = is_copy;
    if (is_copy)
        return loan;
    loan->view.ended = end_loan;
    loan->view.ended_early = NULL;
    struct loan **bucket = bucket_of(loans, block->offset);
    loan->next_beside = *bucket;
    *bucket = loan;
    atomic_fetch_add_explicit(&loans->references, 1, memory_order_relaxed);
    return loan;
}

bool loans_contain(const struct loans *loans, const void *address)
{
    return (uintptr_t)address - (uintptr_t)loans->data < (uintptr_t)loans->allocator.capacity;
}

struct loan *loans_find(const struct loans *loans, const void *start)
{
    if (!loans_contain(loans, start))
        return NULL;
    uintptr_t offset = (uintptr_t)start - (uintptr_t)loans->data;
    struct loan *loan = *bucket_of(loans, (int64_t)offset);
    while (loan != NULL && loan->block->offset != (int64_t)offset)
        loan = loan->next_beside;
    return loan;
}

int32_t loans_next_slot(struct loans *loans)
{
    if (loans->held_count >= FEW_HELD || loans->free_count == 0)
        collect_oldest(loans);
    return loans->free_count == 0 ? NO_SLOT : loans->free_slots[loans->free_count - 1];
}

void loans_hold(struct loans *loans, struct loan *loan, int32_t slot)
{
    loans->free_count--;
    loan->holds++;
    loans->held_count++;
    loans->holds[slot] = (struct hold){
        .loan = loan,
        .sequence = ++loans->sequence,
        .since = clock_seconds(),
        .before = loans->youngest,
        .behind = NO_SLOT,
    };
    if (loans->youngest != NO_SLOT)
        loans->holds[loans->youngest].behind = slot;
    else
        loans->oldest = slot;
    loans->youngest = slot;
}

void loans_end_hold(struct loans *loans, uint64_t slot, uint64_t sequence)
{
    if (slot < (uint64_t)loans->slots && loans->holds[slot].loan != NULL && loans->holds[slot].sequence == sequence)
        end_hold(loans, (int32_t)slot);
}
