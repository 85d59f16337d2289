/* Objects that CUDA hands out as handles. All of it with the lock held. */
#ifndef FAKE_CUDA_HANDLES_H
#define FAKE_CUDA_HANDLES_H

#include "cuda_types.h"

enum kind { CONTEXT, STREAM, EVENT, POOL, KINDS };

struct object {
    enum kind kind;
    uintptr_t handle;
    unsigned references;
    void (*destroy)(struct object *); /* frees it, once nothing refers to it */
    bool hidden;                      /* the driver's own: not counted as live */
    struct object *next;
};

void object_publish(struct object *object, enum kind kind, void (*destroy)(struct object *), bool hidden);
void *object_find(enum kind kind, uintptr_t handle); /* NULL: none such, or destroyed */
void object_retire(struct object *object);           /* its handle is worth nothing from now on */
void object_hold(struct object *object);
void object_drop(struct object *object);
unsigned long long objects_alive(enum kind kind);

#endif
