/* What tests may ask about: fake_cuda_counter(name). Call with the lock held. */
#ifndef FAKE_CUDA_COUNTERS_H
#define FAKE_CUDA_COUNTERS_H

struct counters {
    unsigned long long pageable_copies;
    unsigned long long async_copies;
    unsigned long long unmapped_while_registered;
    unsigned long long unregistered_in_use;  /* a queued copy still had to read or write it */
    unsigned long long freed_while_imported; /* the other process had not freed it first */
    unsigned long long context_synchronizations;
    unsigned long long event_waits;
};

extern struct counters counters;
void write_report(void); /* into the file that FAKE_CUDA_REPORT names */

#endif
