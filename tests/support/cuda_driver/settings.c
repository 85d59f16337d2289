/* The settings: FAKE_CUDA_* variables, read when the library is loaded; fake_cuda_configure changes them later. */
#include "state.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "calls.h"

struct settings settings = {
    .devices = 1,
    .driver_version = 13000,
    .delay_us = 2000,
    .register_limit = (size_t)1 << 30,
    .device_bytes = (size_t)4 << 30,
};

static void keep(char *place, size_t room, const char *value)
{
    strncpy(place, value, room - 1);
    place[room - 1] = '\0';
}

bool set_setting(const char *name, const char *value)
{
    if (strcmp(name, "DEVICES") == 0)
        settings.devices = atoi(value);
    else if (strcmp(name, "DRIVER_VERSION") == 0)
        settings.driver_version = atoi(value);
    else if (strcmp(name, "UUID") == 0)
        keep(settings.uuids, sizeof settings.uuids, value);
    else if (strcmp(name, "DELAY_US") == 0)
        settings.delay_us = strtoul(value, NULL, 10);
    else if (strcmp(name, "STALL") == 0)
        settings.stall = atoi(value) != 0;
    else if (strcmp(name, "REGISTER_LIMIT") == 0)
        settings.register_limit = strtoull(value, NULL, 10);
    else if (strcmp(name, "DEVICE_BYTES") == 0)
        settings.device_bytes = strtoull(value, NULL, 10);
    else if (strcmp(name, "STICKY") == 0)
        keep(settings.sticky_function, sizeof settings.sticky_function, value);
    else if (strcmp(name, "REPORT") == 0)
        keep(settings.report, sizeof settings.report, value);
    else if (strcmp(name, "FAIL") == 0)
        return set_faults(value);
    else
        return false;
    return true;
}

int fake_cuda_configure(const char *name, const char *value)
{
    lock();
    bool known = set_setting(name, value);
    changed();
    unlock();
    return known;
}

__attribute__((constructor)) static void read_environment(void)
{
    static const char *const names[] = {
        "DEVICES",        "DRIVER_VERSION", "UUID",   "DELAY_US", "STALL",
        "REGISTER_LIMIT", "DEVICE_BYTES",   "STICKY", "REPORT",   "FAIL",
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char variable[64];
        snprintf(variable, sizeof variable, "FAKE_CUDA_%s", names[i]);
        const char *value = getenv(variable);
        if (value != NULL)
            set_setting(names[i], value);
    }
}
