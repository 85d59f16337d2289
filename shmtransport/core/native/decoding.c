/* Requests and replies from a peer's bytes: core/codec.py's decode_call, decode_values and take_call.
 *
 * A message's tensors stand behind its values. So it is read twice: it is looked at as a whole, which gives the tensors'
 * descriptors; then the values are made, with those tensors. Both are safe for any bytes: neither relies on the other.
 *
 * What is refused is None here: protocol/messages.py, the specification, then says in words what is wrong with it.
 */
#include "decoding.h"

#include "borrows_type.h"
#include "descriptor.h"
#include "layout.h"
#include "unpacker.h"

static PyObject *make_text(const struct token *token)
{
    return PyUnicode_DecodeUTF8((const char *)token->bytes, (Py_ssize_t)token->count, NULL);
}

static PyObject *make_shape(const struct descriptor *descriptor)
{
    PyObject *shape = PyTuple_New((Py_ssize_t)descriptor->dimensions);
    for (uint32_t index = 0; shape != NULL && index < descriptor->dimensions; index++) {
        PyObject *size = PyLong_FromUnsignedLongLong(descriptor->shape[index]);
        if (size == NULL || PyTuple_SetItem(shape, (Py_ssize_t)index, size) < 0)
            Py_CLEAR(shape);
    }
    return shape;
}

static PyObject *make_descriptor(const struct descriptor *descriptor, PyObject *describe)
{
    PyObject *shape = make_shape(descriptor);
    PyObject *dtype = shape == NULL ? NULL : make_text(&descriptor->dtype);
    if (dtype == NULL) {
        Py_XDECREF(shape);
        return NULL;
    }
    return PyObject_CallFunction(describe, "KNNKK", (unsigned long long)descriptor->offset, shape, dtype,
                                 (unsigned long long)descriptor->slot, (unsigned long long)descriptor->sequence);
}

static PyObject *make_descriptors(struct call *call, PyObject *describe)
{
    struct descriptor descriptor;
    PyObject *descriptors = PyTuple_New((Py_ssize_t)call->tensor_count);
    for (uint32_t index = 0; descriptors != NULL && index < call->tensor_count; index++) {
        PyObject *made = take_descriptor(&call->tensors, &descriptor) ? make_descriptor(&descriptor, describe) : NULL;
        if (made == NULL || PyTuple_SetItem(descriptors, (Py_ssize_t)index, made) < 0)
            Py_CLEAR(descriptors);
    }
    return descriptors;
}

PyObject *decode_call(PyObject *Py_UNUSED(module), PyObject *parameters)
{
    PyObject *data, *describe;
    char *bytes;
    Py_ssize_t nbytes;
    struct call call;
    if (!PyArg_ParseTuple(parameters, "OO", &data, &describe) || PyBytes_AsStringAndSize(data, &bytes, &nbytes) < 0)
        return NULL;
    if (!inspect_call(bytes, (size_t)nbytes, &call))
        Py_RETURN_NONE;
    PyObject *method = call.tag == TAG_REQUEST ? make_text(&call.method) : Py_NewRef(Py_None);
    PyObject *descriptors = method == NULL ? NULL : make_descriptors(&call, describe);
    if (descriptors == NULL) {
        Py_XDECREF(method);
        return NULL;
    }
    Py_ssize_t start = (Py_ssize_t)(call.values.at - (unsigned char *)bytes);
    return Py_BuildValue("KNNn", (unsigned long long)call.call_id, method, descriptors, start);
}

/* What the values of one message are made from. */
struct decoder {
    struct unpacker unpacker;
    PyObject *tensors;             /* a tuple */
    PyObject *to_array;            /* makes arrays; NULL where the next does */
    const struct tensors *library;
};

static PyObject *invalid(void)
{
    return refuse("invalid_values", "()");
}

static PyObject *make_value(struct decoder *decoder, int depth);

static PyObject *make_tensor(struct decoder *decoder, const struct token *token)
{
    if (!is_tensor(token) || tensor_index(token) >= PyTuple_Size(decoder->tensors))
        return invalid();
    PyObject *tensor = PyTuple_GetItem(decoder->tensors, (Py_ssize_t)tensor_index(token));
    if (token->code == EXTENSION_TENSOR)
        return Py_NewRef(tensor);
    if (decoder->to_array == NULL)
        return array_over_tensor(decoder->library, tensor);
    return PyObject_CallFunctionObjArgs(decoder->to_array, tensor, NULL);
}

static PyObject *make_list(struct decoder *decoder, uint32_t count, int depth)
{
    PyObject *list = PyList_New((Py_ssize_t)count);
    for (uint32_t index = 0; list != NULL && index < count; index++) {
        PyObject *item = make_value(decoder, depth);
        if (item == NULL || PyList_SetItem(list, (Py_ssize_t)index, item) < 0)
            Py_CLEAR(list);
    }
    return list;
}

static PyObject *make_tuple(struct decoder *decoder, uint32_t count, int depth)
{
    PyObject *tuple = PyTuple_New((Py_ssize_t)count);
    for (uint32_t index = 0; tuple != NULL && index < count; index++) {
        PyObject *item = make_value(decoder, depth);
        if (item == NULL || PyTuple_SetItem(tuple, (Py_ssize_t)index, item) < 0)
            Py_CLEAR(tuple);
    }
    return tuple;
}

static PyObject *make_int(const struct token *token)
{
    return token->kind == TOKEN_UNSIGNED ? PyLong_FromUnsignedLongLong(token->number)
                                         : PyLong_FromLongLong((long long)token->number);
}

static PyObject *make_key(struct decoder *decoder)
{
    struct token token;
    if (!unpack_token(&decoder->unpacker, &token) || !is_key(&token))
        return invalid();
    return token.kind == TOKEN_TEXT ? make_text(&token) : make_int(&token);
}

static PyObject *make_dict(struct decoder *decoder, uint32_t count, int depth)
{
    PyObject *dict = PyDict_New();
    for (; dict != NULL && count > 0; count--) {
        PyObject *key = make_key(decoder);
        PyObject *item = key == NULL ? NULL : make_value(decoder, depth);
        if (item == NULL || PyDict_SetItem(dict, key, item) < 0)
            Py_CLEAR(dict);
        Py_XDECREF(key);
        Py_XDECREF(item);
    }
    return dict;
}

static PyObject *make_value(struct decoder *decoder, int depth)
{
    struct token token;
    if (!unpack_token(&decoder->unpacker, &token))
        return invalid();
    switch (token.kind) {
    case TOKEN_NIL:
        Py_RETURN_NONE;
    case TOKEN_FALSE:
        Py_RETURN_FALSE;
    case TOKEN_TRUE:
        Py_RETURN_TRUE;
    case TOKEN_UNSIGNED:
    case TOKEN_NEGATIVE:
        return make_int(&token);
    case TOKEN_DOUBLE:
        return PyFloat_FromDouble(token.real);
    case TOKEN_TEXT:
        return make_text(&token);
    case TOKEN_BINARY:
        return PyBytes_FromStringAndSize((const char *)token.bytes, (Py_ssize_t)token.count);
    default:
        break;
    }
    if (depth > MAX_DEPTH)
        return invalid();
    if (token.kind == TOKEN_EXTENSION)
        return make_tensor(decoder, &token);
    if (token.kind == TOKEN_MAP)
        return make_dict(decoder, token.count, depth + 1);
    if (token.count > 0 && take_tuple_marker(&decoder->unpacker))
        return make_tuple(decoder, token.count - 1, depth + 1);
    return make_list(decoder, token.count, depth + 1);
}

/* A request's arguments, a tuple, and its keyword arguments. */
static bool make_arguments(struct decoder *decoder, PyObject **arguments, PyObject **keywords)
{
    struct token token;
    *arguments = unpack_kind(&decoder->unpacker, &token, TOKEN_ARRAY) ? make_tuple(decoder, token.count, ARGUMENT_DEPTH)
                                                                      : invalid();
    if (*arguments == NULL)
        return false;
    *keywords = unpack_kind(&decoder->unpacker, &token, TOKEN_MAP) ? make_dict(decoder, token.count, ARGUMENT_DEPTH)
                                                                   : invalid();
    if (*keywords == NULL)
        Py_CLEAR(*arguments);
    return *keywords != NULL;
}

PyObject *decode_values(PyObject *Py_UNUSED(module), PyObject *parameters)
{
    unsigned long long tag;
    PyObject *data;
    Py_ssize_t start, nbytes;
    char *bytes;
    struct decoder decoder;
    if (!PyArg_ParseTuple(parameters, "KOnO!O", &tag, &data, &start, &PyTuple_Type, &decoder.tensors, &decoder.to_array)
        || PyBytes_AsStringAndSize(data, &bytes, &nbytes) < 0)
        return NULL;
    if (start < 0 || start > nbytes)
        return invalid();
    decoder.unpacker = (struct unpacker){(unsigned char *)bytes + start, (unsigned char *)bytes + nbytes};
    PyObject *arguments, *keywords;
    if (tag != TAG_REQUEST)
        return make_value(&decoder, 0);
    return make_arguments(&decoder, &arguments, &keywords) ? Py_BuildValue("NN", arguments, keywords) : NULL;
}

/* Whether every tensor can be borrowed, and become an array if any does, as far as this can be known before any is. */
static bool all_can_be_borrowed(const struct call *call, PyObject *borrows)
{
    struct unpacker tensors = call->tensors;
    struct descriptor descriptor;
    for (uint32_t index = 0; index < call->tensor_count; index++)
        if (!take_descriptor(&tensors, &descriptor) || !can_be_borrowed(borrows, &descriptor, call->has_arrays))
            return false;
    return true;
}

/* All tensors, or None if one can't be borrowed: the borrows that were begun end with that. */
static PyObject *borrow_all(const struct call *call, PyObject *borrows, uint64_t *nbytes)
{
    struct unpacker remaining = call->tensors;
    struct descriptor descriptor;
    PyObject *tensors = PyTuple_New((Py_ssize_t)call->tensor_count);
    for (uint32_t index = 0; tensors != NULL && index < call->tensor_count; index++) {
        bool is_read = take_descriptor(&remaining, &descriptor);
        PyObject *tensor = is_read ? borrow_described(borrows, &descriptor, nbytes) : Py_NewRef(Py_None);
        if (tensor == Py_None) {
            Py_DECREF(tensors);
            return tensor;
        }
        if (tensor == NULL || PyTuple_SetItem(tensors, (Py_ssize_t)index, tensor) < 0)
            Py_CLEAR(tensors);
    }
    return tensors;
}

bool can_be_taken(const struct call *call, PyObject *borrows)
{
    return (!call->has_arrays || library_of(borrows)->array_type != NULL) && all_can_be_borrowed(call, borrows);
}

int take_values(const struct call *call, PyObject *borrows, struct values *values)
{
    *values = (struct values){0};
    PyObject *tensors = borrow_all(call, borrows, &values->tensor_bytes);
    if (tensors == NULL || tensors == Py_None) {
        Py_XDECREF(tensors);
        return tensors == NULL ? -1 : 0;
    }
    struct decoder decoder = {.unpacker = call->values, .tensors = tensors, .library = library_of(borrows)};
    bool is_made;
    if (call->tag == TAG_REQUEST)
        is_made = make_arguments(&decoder, &values->arguments, &values->keywords);
    else
        is_made = (values->result = make_value(&decoder, 0)) != NULL;
    Py_DECREF(tensors);
    return is_made ? 1 : -1; /* in the latter case the tensors are released: they must not be looked at again */
}

/* take_call(data, tag, borrows): see core/codec.py. */
PyObject *take_call(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    char *bytes;
    Py_ssize_t nbytes;
    struct call call;
    struct values values;
    if (count != 3)
        return PyErr_Format(PyExc_TypeError, "%zd", count);
    unsigned long long tag = PyLong_AsUnsignedLongLong(arguments[1]);
    if (PyErr_Occurred() || PyBytes_AsStringAndSize(arguments[0], &bytes, &nbytes) < 0)
        return NULL;
    PyObject *borrows = arguments[2];
    if (!is_borrows(borrows) || !inspect_call(bytes, (size_t)nbytes, &call) || call.tag != tag
        || !can_be_taken(&call, borrows))
        Py_RETURN_NONE;
    int taken = take_values(&call, borrows, &values);
    if (taken < 0 && call.tensor_count == 0) { /* the caller's own decoder meets it again, and says what it is */
        PyErr_Clear();
        taken = 0;
    }
    if (taken <= 0)
        return taken < 0 ? NULL : Py_NewRef(Py_None);
    unsigned long long call_id = call.call_id, tensor_bytes = values.tensor_bytes;
    if (call.tag == TAG_REPLY)
        return Py_BuildValue("KNIK", call_id, values.result, call.tensor_count, tensor_bytes);
    PyObject *method = make_text(&call.method);
    return Py_BuildValue("KN(NN)IK", call_id, method, values.arguments, values.keywords, call.tensor_count,
                         tensor_bytes);
}
