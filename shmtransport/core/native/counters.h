/* Totals of what one client or server does: core/counters.py's. No Python. */
#ifndef SHMTRANSPORT_COUNTERS_H
#define SHMTRANSPORT_COUNTERS_H

#include <stdbool.h>
#include <stdint.h>

#define SHORTEST_SECONDS 1e-6
#define RANGES_PER_OCTAVE 8
#define LATENCY_RANGES (32 * RANGES_PER_OCTAVE)

struct counters {
    unsigned long long calls, failures;
    unsigned long long control_bytes_sent, control_bytes_received;
    unsigned long long tensors_sent, tensor_bytes_sent, tensor_bytes_received;
    unsigned long long tensors_copied, bytes_copied;
    unsigned long long waits, stalls, in_flight_peak;
    double call_seconds, serialize_seconds, deserialize_seconds, stall_seconds;
    unsigned long long latencies[LATENCY_RANGES];
};

/* Tensors of one message that was made. */
struct sent_tensors {
    uint64_t count, nbytes;
    uint64_t copies, copied_bytes; /* of those, what was copied in */
};

void count_sent(struct counters *counters, uint64_t control_bytes, double seconds, struct sent_tensors tensors);
void count_received(struct counters *counters, uint64_t control_bytes, uint64_t tensor_bytes, double seconds);
void count_call(struct counters *counters, double seconds, bool failed);
void count_wait(struct counters *counters);
void count_in_flight(struct counters *counters, uint64_t calls);

#endif
