#include "views.h"

#include <string.h>

static void on_delete(struct dl_managed *managed)
{
    struct view *view = managed->context;
    if (view->ended_early != NULL)
        *view->ended_early = true;
    view->ended(view);
}

static int read_row(struct dtype_row *row, PyObject *described)
{
    int code, bits, has_arrays;
    long long itemsize;
    if (!PyArg_ParseTuple(described, "OUiiLp", &row->dtype, &row->name, &code, &bits, &itemsize, &has_arrays))
        return -1;
    Py_ssize_t length;
    row->text = PyUnicode_AsUTF8AndSize(row->name, &length);
    if (row->text == NULL)
        return -1;
    row->length = (size_t)length;
    row->described = (struct dl_dtype){(uint8_t)code, (uint8_t)bits, 1};
    row->itemsize = itemsize;
    row->has_arrays = has_arrays;
    Py_INCREF(row->dtype);
    Py_INCREF(row->name);
    return 0;
}

static int read_arrays(struct tensors *tensors, PyObject *arrays)
{
    PyObject *type;
    if (arrays == Py_None)
        return 0;
    if (!PyArg_ParseTuple(arrays, "O!OO", &PyType_Type, &type, &tensors->tensor_of, &tensors->array_of))
        return -1;
    tensors->array_type = (PyTypeObject *)Py_NewRef(type);
    Py_INCREF(tensors->tensor_of);
    Py_INCREF(tensors->array_of);
    return 0;
}

int tensors_prepare(struct tensors *tensors, PyObject *type, PyObject *rows, PyObject *arrays)
{
    PyObject *capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
    if (capsule == NULL)
        return -1;
    tensors->exchange = PyCapsule_GetPointer(capsule, DL_CAPSULE_NAME); /* its table lives as long as the process */
    Py_DECREF(capsule);
    if (tensors->exchange == NULL)
        return -1;
    if (tensors->exchange->major != DL_MAJOR || tensors->exchange->minor < DL_MINOR
        || tensors->exchange->describe == NULL || tensors->exchange->import_managed == NULL) {
        PyErr_SetObject(PyExc_ImportError, type);
        return -1;
    }
    tensors->type = (PyTypeObject *)Py_NewRef(type);
    Py_ssize_t count = PyTuple_Size(rows);
    for (Py_ssize_t index = 0; index < count && index < MOST_DTYPES; index++, tensors->row_count++)
        if (read_row(&tensors->rows[index], PyTuple_GetItem(rows, index)) < 0)
            return -1;
    return PyErr_Occurred() ? -1 : read_arrays(tensors, arrays);
}

/* Whether a flag of an array is set; -1 with an error set. */
static int has_flag(PyObject *flags, const char *name)
{
    PyObject *flag = PyObject_GetAttrString(flags, name);
    int is_set = flag == NULL ? -1 : PyObject_IsTrue(flag);
    Py_XDECREF(flag);
    return is_set;
}

PyObject *tensor_over_array(const struct tensors *tensors, PyObject *array)
{
    PyObject *flags = PyObject_GetAttrString(array, "flags");
    if (flags == NULL)
        return NULL;
    int is_plain = has_flag(flags, "c_contiguous");
    if (is_plain > 0)
        is_plain = has_flag(flags, "writeable");
    Py_DECREF(flags);
    PyObject *tensor = is_plain > 0 ? PyObject_CallFunctionObjArgs(tensors->tensor_of, array, NULL) : NULL;
    if (tensor == NULL && PyErr_Occurred()
        && (PyErr_ExceptionMatches(PyExc_TypeError) || PyErr_ExceptionMatches(PyExc_ValueError)))
        PyErr_Clear();
    return tensor;
}

PyObject *array_over_tensor(const struct tensors *tensors, PyObject *tensor)
{
    PyObject *array = PyObject_CallFunctionObjArgs(tensors->array_of, tensor, NULL);
    PyObject *done = array == NULL ? NULL : PyObject_CallMethod(array, "setflags", "i", 0);
    if (done == NULL)
        Py_CLEAR(array);
    Py_XDECREF(done);
    return array;
}

void tensors_forget(struct tensors *tensors)
{
    for (int index = 0; index < tensors->row_count; index++) {
        Py_DECREF(tensors->rows[index].dtype);
        Py_DECREF(tensors->rows[index].name);
    }
    tensors->row_count = 0;
    if (tensors->array_type != NULL) {
        Py_CLEAR(tensors->array_type);
        Py_CLEAR(tensors->tensor_of);
        Py_CLEAR(tensors->array_of);
    }
    Py_CLEAR(tensors->type);
}

const struct dtype_row *row_of_dtype(const struct tensors *tensors, PyObject *dtype)
{
    for (int index = 0; index < tensors->row_count; index++)
        if (tensors->rows[index].dtype == dtype)
            return &tensors->rows[index];
    return NULL;
}

const struct dtype_row *row_of_text(const struct tensors *tensors, const unsigned char *text, size_t length)
{
    for (int index = 0; index < tensors->row_count; index++)
        if (tensors->rows[index].length == length && memcmp(tensors->rows[index].text, text, length) == 0)
            return &tensors->rows[index];
    return NULL;
}

const struct dtype_row *row_of_name(const struct tensors *tensors, PyObject *name)
{
    Py_ssize_t length;
    const char *text = PyUnicode_Check(name) ? PyUnicode_AsUTF8AndSize(name, &length) : NULL;
    if (text != NULL)
        return row_of_text(tensors, (const unsigned char *)text, (size_t)length);
    PyErr_Clear(); /* a lone surrogate: no dtype's name */
    return NULL;
}

const struct dtype_row *row_described(const struct tensors *tensors, struct dl_dtype described)
{
    for (int index = 0; index < tensors->row_count; index++) {
        struct dl_dtype row = tensors->rows[index].described;
        if (row.code == described.code && row.bits == described.bits && described.lanes == 1)
            return &tensors->rows[index];
    }
    return NULL;
}

bool read_extent(PyObject *shape, int64_t itemsize, struct extent *extent)
{
    Py_ssize_t dimensions = PyTuple_Check(shape) ? PyTuple_Size(shape) : -1;
    if (dimensions < 0 || dimensions > MAX_DIMENSIONS)
        return false;
    extent->dimensions = (int)dimensions;
    extent->nbytes = itemsize;
    for (Py_ssize_t index = 0; index < dimensions; index++) {
        PyObject *size = PyTuple_GetItem(shape, index);
        int overflow;
        long long number = PyLong_CheckExact(size) ? PyLong_AsLongLongAndOverflow(size, &overflow) : 0;
        if (number <= 0 || extent->nbytes > INT64_MAX / number)
            return false;
        extent->sizes[index] = number;
        extent->nbytes *= number;
    }
    return true;
}

static void describe_view(struct view *view, void *start, const struct dtype_row *row, const struct extent *extent)
{
    int64_t *shape = view->sizes, *strides = view->sizes + MAX_DIMENSIONS, stride = 1;
    for (int index = extent->dimensions - 1; index >= 0; index--) {
        shape[index] = extent->sizes[index];
        strides[index] = stride;
        stride *= extent->sizes[index];
    }
    view->managed = (struct dl_managed){
        .major = DL_MAJOR,
        .context = view,
        .deleter = on_delete,
        .tensor = {
            .data = start,
            .device_type = DL_CPU,
            .dimensions = extent->dimensions,
            .dtype = row->described,
            .shape = shape,
            .strides = strides,
        },
    };
}

PyObject *make_tensor_over(const struct tensors *tensors, struct view *view, void *start, const struct dtype_row *row,
                           const struct extent *extent)
{
    void *tensor = NULL;
    bool has_ended = false;
    describe_view(view, start, row, extent);
    view->ended_early = &has_ended;
    int failed = tensors->exchange->import_managed(&view->managed, &tensor);
    if (!failed && tensor != NULL) {
        view->ended_early = NULL;
        return tensor;
    }
    if (!has_ended)
        view->ended(view);
    if (!PyErr_Occurred())
        PyErr_NoMemory();
    return NULL;
}
