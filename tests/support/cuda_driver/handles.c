/* The table of live handles. A number is never given twice, so that a handle that was destroyed stays refused. */
#include "handles.h"

enum { BUCKETS = 1024, STEP = 64 };
static struct object *buckets[BUCKETS];
static uintptr_t last = 0x10000;
static unsigned long long alive[KINDS];

static struct object **bucket_of(uintptr_t handle)
{
    return &buckets[handle / STEP % BUCKETS];
}

void object_publish(struct object *object, enum kind kind, void (*destroy)(struct object *), bool hidden)
{
    last += STEP;
    *object = (struct object){kind, last, 1, destroy, hidden, *bucket_of(last)};
    *bucket_of(last) = object;
    if (!hidden)
        alive[kind]++;
}

void *object_find(enum kind kind, uintptr_t handle)
{
    struct object *object = *bucket_of(handle);
    while (object != NULL && (object->handle != handle || object->kind != kind))
        object = object->next;
    return object;
}

void object_retire(struct object *object)
{
    struct object **place = bucket_of(object->handle);
    while (*place != object)
        place = &(*place)->next;
    *place = object->next;
    if (!object->hidden)
        alive[object->kind]--;
    object_drop(object);
}

void object_hold(struct object *object)
{
    object->references++;
}

void object_drop(struct object *object)
{
    if (--object->references == 0)
        object->destroy(object);
}

unsigned long long objects_alive(enum kind kind)
{
    return alive[kind];
}
