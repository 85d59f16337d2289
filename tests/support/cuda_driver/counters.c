/* fake_cuda_counter(name), and the report of all counters at the process's end. An unknown name is ULLONG_MAX. */
#include "counters.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "calls.h"
#include "handles.h"
#include "ranges.h"

struct counters counters;

static unsigned long long live_streams(void)
{
    return objects_alive(STREAM);
}

static unsigned long long live_events(void)
{
    return objects_alive(EVENT);
}

static unsigned long long live_pools(void)
{
    return objects_alive(POOL);
}

static unsigned long long unmapped(void)
{
    return counters.unmapped_while_registered + registrations_without_memory();
}

static const struct {
    const char *name;
    unsigned long long *value;
    unsigned long long (*compute)(void);
} table[] = {
    {"streams", NULL, live_streams},
    {"events", NULL, live_events},
    {"pools", NULL, live_pools},
    {"device_bytes", NULL, bytes_of_device},
    {"imported_bytes", NULL, bytes_imported},
    {"registered_bytes", NULL, bytes_registered},
    {"host_bytes", NULL, bytes_of_host},
    {"pageable_copies", &counters.pageable_copies, NULL},
    {"async_copies", &counters.async_copies, NULL},
    {"unmapped_while_registered", NULL, unmapped},
    {"unregistered_in_use", &counters.unregistered_in_use, NULL},
    {"freed_while_imported", &counters.freed_while_imported, NULL},
    {"context_synchronizations", &counters.context_synchronizations, NULL},
    {"event_waits", &counters.event_waits, NULL},
};

enum { COUNTERS = sizeof table / sizeof *table };

static unsigned long long value_of(size_t i)
{
    return table[i].compute != NULL ? table[i].compute() : *table[i].value;
}

unsigned long long fake_cuda_counter(const char *name)
{
    if (strncmp(name, "calls:", 6) == 0)
        return calls_of(name + 6);
    for (size_t i = 0; i < COUNTERS; i++) {
        if (strcmp(table[i].name, name) != 0)
            continue;
        lock();
        unsigned long long value = value_of(i);
        unlock();
        return value;
    }
    return ULLONG_MAX;
}

static void write_call(const char *name, unsigned long long count, void *file)
{
    fprintf(file, "calls:%s %llu\n", name, count);
}

void write_report(void)
{
    FILE *file = settings.report[0] == '\0' ? NULL : fopen(settings.report, "w");
    if (file == NULL)
        return;
    for (size_t i = 0; i < COUNTERS; i++)
        fprintf(file, "%s %llu\n", table[i].name, value_of(i));
    each_call(write_call, file);
    fclose(file);
}
