/* Devices and contexts: each thread has a stack of contexts, whose top is current. */
#ifndef FAKE_CUDA_CONTEXTS_H
#define FAKE_CUDA_CONTEXTS_H

#include "handles.h"

enum { MOST_DEVICES = 8 };

struct stream;

struct context {
    struct object object;
    CUdevice device;
    unsigned flags;
    unsigned retained; /* of a primary context */
    struct stream *legacy;
};

bool is_device(CUdevice device);
void uuid_of(CUdevice device, CUuuid *uuid);
CUdevice device_with(const CUuuid *uuid); /* -1: this process has none such */
CUcontext current_context(void);          /* 0: none; needs no lock */
struct context *this_context(void);       /* of this thread, NULL if it is none or destroyed */

#endif
