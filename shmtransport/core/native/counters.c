#include "counters.h"

#include <math.h>

void count_sent(struct counters *counters, uint64_t control_bytes, double seconds, struct sent_tensors tensors)
{
    counters->control_bytes_sent += control_bytes;
    counters->serialize_seconds += seconds;
    if (tensors.count > 0) {
        counters->tensors_sent += tensors.count;
        counters->tensor_bytes_sent += tensors.nbytes;
        counters->tensors_copied += tensors.copies;
        counters->bytes_copied += tensors.copied_bytes;
    }
}

void count_received(struct counters *counters, uint64_t control_bytes, uint64_t tensor_bytes, double seconds)
{
    counters->control_bytes_received += control_bytes;
    counters->tensor_bytes_received += tensor_bytes;
    counters->deserialize_seconds += seconds;
}

static int range_of(double seconds)
{
    if (!(seconds > SHORTEST_SECONDS))
        return 0;
    double range = log2(seconds / SHORTEST_SECONDS) * RANGES_PER_OCTAVE;
    return range < LATENCY_RANGES ? (int)range : LATENCY_RANGES - 1;
}

void count_call(struct counters *counters, double seconds, bool failed)
{
    counters->calls++;
    counters->failures += failed;
    counters->call_seconds += seconds;
    counters->latencies[range_of(seconds)]++;
}

void count_in_flight(struct counters *counters, uint64_t calls)
{
    if (calls > counters->in_flight_peak)
        counters->in_flight_peak = calls;
}

void count_wait(struct counters *counters)
{
    counters->waits++;
}
