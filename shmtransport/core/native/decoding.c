/* Requests and replies from a peer's bytes: core/codec.py's decode_call, decode_values and take_call.
 *
 * A message's tensors stand behind its values. So it is read twice: it is looked at as a whole, which gives the tensors'
 * descriptors; then the values are made, with those tensors. Both are safe for any bytes: neither relies on the other.
 *
 * What is refused is None here: protocol/messages.py, the specification, then says in words what is wrong with it.
 */
#include "module.h"

#include "borrows_type.h"
#include "descriptor.h"
#include "inspection.h"
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
    PyObject *tensors;  /* a tuple */
    PyObject *to_array; /* NULL where arrays are left to others */
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
        return invalid();
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

static PyObject *make_arguments(struct decoder *decoder)
{
    struct token token;
    if (!unpack_kind(&decoder->unpacker, &token, TOKEN_ARRAY))
        return invalid();
    PyObject *arguments = make_list(decoder, token.count, ARGUMENT_DEPTH);
    if (arguments == NULL)
        return NULL;
    bool is_map = unpack_kind(&decoder->unpacker, &token, TOKEN_MAP);
    PyObject *keywords = is_map ? make_dict(decoder, token.count, ARGUMENT_DEPTH) : invalid();
    if (keywords == NULL) {
        Py_DECREF(arguments);
        return NULL;
    }
    return Py_BuildValue("NN", arguments, keywords);
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
    return tag == TAG_REQUEST ? make_arguments(&decoder) : make_value(&decoder, 0);
}

/* Whether every tensor can be borrowed, as far as this can be known before any is. */
static bool all_can_be_borrowed(const struct call *call, PyObject *borrows)
{
    struct unpacker tensors = call->tensors;
    struct descriptor descriptor;
    for (uint32_t index = 0; index < call->tensor_count; index++)
        if (!take_descriptor(&tensors, &descriptor) || !can_be_borrowed(borrows, &descriptor))
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

/* The rest of what take_call returns: a request's method, arguments and keyword arguments, or a reply's result. */
static PyObject *make_taken(const struct call *call, struct decoder *decoder, uint64_t nbytes)
{
    unsigned long long call_id = call->call_id, tensor_bytes = nbytes;
    if (call->tag == TAG_REPLY) {
        PyObject *result = make_value(decoder, 0);
        return result == NULL ? NULL : Py_BuildValue("KNIK", call_id, result, call->tensor_count, tensor_bytes);
    }
    PyObject *method = make_text(&call->method);
    PyObject *arguments = method == NULL ? NULL : make_arguments(decoder);
    if (arguments == NULL) {
        Py_XDECREF(method);
        return NULL;
    }
    return Py_BuildValue("KNNIK", call_id, method, arguments, call->tensor_count, tensor_bytes);
}

/* take_call(data, tag, borrows): see core/codec.py. */
PyObject *take_call(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    char *bytes;
    Py_ssize_t nbytes;
    struct call call;
    uint64_t tensor_bytes = 0;
    if (count != 3)
        return PyErr_Format(PyExc_TypeError, "%zd", count);
    unsigned long long tag = PyLong_AsUnsignedLongLong(arguments[1]);
    if (PyErr_Occurred() || PyBytes_AsStringAndSize(arguments[0], &bytes, &nbytes) < 0)
        return NULL;
    PyObject *borrows = arguments[2];
    if (!is_borrows(borrows) || !inspect_call(bytes, (size_t)nbytes, &call) || call.tag != tag || call.has_arrays
        || !all_can_be_borrowed(&call, borrows))
        Py_RETURN_NONE;
    PyObject *tensors = borrow_all(&call, borrows, &tensor_bytes);
    if (tensors == NULL || tensors == Py_None)
        return tensors;
    struct decoder decoder = {.unpacker = call.values, .tensors = tensors};
    PyObject *taken = make_taken(&call, &decoder, tensor_bytes);
    Py_DECREF(tensors);
    if (taken == NULL && call.tensor_count == 0) { /* the caller's own decoder meets it again, and says what it is */
        PyErr_Clear();
        Py_RETURN_NONE;
    }
    return taken; /* the tensors are released by now: the caller must not look at them again */
}
