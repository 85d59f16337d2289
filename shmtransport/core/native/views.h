/* Tensors over mapped memory, made by the exchange table of their library.
 *
 * A view is what a tensor's storage keeps alive. Its end is the deleter of DLPack, which may run on any thread, without
 * the GIL, in a garbage collection, or after the interpreter has ended: what runs then touches C memory only.
 */
#ifndef SHMTRANSPORT_VIEWS_H
#define SHMTRANSPORT_VIEWS_H

#include "module.h"

#include <stdbool.h>

#include "descriptor.h"
#include "dlpack.h"

#define MOST_DTYPES 64

/* One row of memory/dtypes.py's table. */
struct dtype_row {
    PyObject *dtype; /* the library's object */
    PyObject *name;
    const char *text; /* the name's bytes */
    size_t length;
    struct dl_dtype described;
    int64_t itemsize;
    bool has_arrays; /* there are arrays of it */
};

/* How tensors of one library are made and described. */
struct tensors {
    PyTypeObject *type; /* its tensors, without subclasses */
    const struct dl_exchange *exchange;
    int row_count;
    struct dtype_row rows[MOST_DTYPES];
    PyTypeObject *array_type; /* of arrays that cross as tensors, without subclasses; NULL if there are none */
    PyObject *tensor_of;      /* makes a tensor over an array's memory; built in, as the next: it runs no Python code */
    PyObject *array_of;       /* makes the array over a tensor's memory */
};

struct view {
    struct dl_managed managed;
    void (*ended)(struct view *view); /* called once, by the deleter */
    bool *ended_early;                /* set where a tensor could not be made, and the view has ended in the attempt */
    int64_t sizes[2 * MAX_DIMENSIONS]; /* shape and strides */
};

/* Sizes of a tensor, and how many bytes they are. */
struct extent {
    int dimensions;
    int64_t sizes[MAX_DIMENSIONS];
    int64_t nbytes;
};

/* Fill in how a library's tensors are made, from memory/views.py's description; -1 with an error set. */
int tensors_prepare(struct tensors *tensors, PyObject *type, PyObject *rows, PyObject *arrays);
void tensors_forget(struct tensors *tensors);

/* A tensor over the memory of an array that is contiguous and may be written; NULL without an error if it is not, or if
 * the library doesn't take it. */
PyObject *tensor_over_array(const struct tensors *tensors, PyObject *array);

/* The read-only array over a tensor's memory; NULL with an error set. */
PyObject *array_over_tensor(const struct tensors *tensors, PyObject *tensor);

/* The row of a library's dtype, of a name, or of what is described; NULL if there is none. */
const struct dtype_row *row_of_dtype(const struct tensors *tensors, PyObject *dtype);
const struct dtype_row *row_of_name(const struct tensors *tensors, PyObject *name);
const struct dtype_row *row_of_text(const struct tensors *tensors, const unsigned char *text, size_t length);
const struct dtype_row *row_described(const struct tensors *tensors, struct dl_dtype described);

/* Read a shape, a tuple of integers; false if it is anything else, has no elements, or too many to be counted. */
bool read_extent(PyObject *shape, int64_t itemsize, struct extent *extent);

/* Make a tensor over memory. The view is the tensor's from here on: where this fails, the view has ended. */
PyObject *make_tensor_over(const struct tensors *tensors, struct view *view, void *start, const struct dtype_row *row,
                           const struct extent *extent);

#endif
