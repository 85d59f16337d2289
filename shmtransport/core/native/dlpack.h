/* What of DLPack 1 is used here: https://dmlc.github.io/dlpack/latest/c_api.html
 *
 * A library's exchange table (its type's attribute __dlpack_c_exchange_api__) makes its tensors of what is described
 * here, and describes its tensors; both as C functions.
 */
#ifndef SHMTRANSPORT_DLPACK_H
#define SHMTRANSPORT_DLPACK_H

#include <stdint.h>

#define DL_CAPSULE_NAME "dlpack_exchange_api"
#define DL_MAJOR 1
#define DL_MINOR 3 /* the first with all of the table's entries below */
#define DL_CPU 1
#define DL_COMPLEX 5

struct dl_dtype {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};

struct dl_tensor {
    void *data;
    int32_t device_type;
    int32_t device_id;
    int32_t dimensions;
    struct dl_dtype dtype;
    int64_t *shape;
    int64_t *strides; /* in elements */
    uint64_t byte_offset;
};

struct dl_managed {
    uint32_t major, minor;
    void *context;
    void (*deleter)(struct dl_managed *managed);
    uint64_t flags;
    struct dl_tensor tensor;
};

struct dl_exchange {
    uint32_t major, minor;
    void *previous;
    void *allocate;
    void *export_managed;
    int (*import_managed)(struct dl_managed *managed, void **object); /* takes the managed tensor over */
    int (*describe)(void *object, struct dl_tensor *tensor);          /* of that very type only */
    void *current_stream;
};

#endif
