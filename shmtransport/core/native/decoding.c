/* Requests and replies from a peer's bytes: core/codec.py's decode_call and decode_values.
 *
 * A message's tensors stand behind its values. So it is read twice: decode_call looks at every byte, refuses what is not
 * exactly what protocol/messages.py and values.unpack accept, and gives the tensors' descriptors; decode_values then
 * makes the values, with those tensors. Both are safe for any bytes: neither relies on the other.
 *
 * What is refused is None here: protocol/messages.py, the specification, then says in words what is wrong with it.
 */
#include "module.h"

#include "borrows_type.h"
#include "descriptor.h"
#include "layout.h"
#include "unpacker.h"

#define MAX_DEPTH 32
#define ARGUMENT_DEPTH 2
#define MAX_TENSORS 1024
#define MAX_NAME_CHARACTERS 256
#define REQUEST_FIELDS 6 /* tag, call_id, method, arguments, keywords, tensors */
#define REPLY_FIELDS 4   /* tag, call_id, result, tensors */

enum extension { EXTENSION_TENSOR = 1, EXTENSION_ARRAY = 2, EXTENSION_TUPLE = 3 };

/* --- looking at everything --- */

static bool is_tensor(const struct token *token)
{
    return (token->code == EXTENSION_TENSOR || token->code == EXTENSION_ARRAY) && token->count == 2;
}

static uint32_t tensor_index(const struct token *token)
{
    return (uint32_t)token->bytes[0] | (uint32_t)token->bytes[1] << 8;
}

static bool is_key(const struct token *token)
{
    if (token->kind == TOKEN_TEXT)
        return utf8_characters(token->bytes, token->count) >= 0;
    return token->kind == TOKEN_UNSIGNED || token->kind == TOKEN_NEGATIVE;
}

static bool check_value(struct unpacker *unpacker, int depth, uint32_t *tensors);

static bool check_items(struct unpacker *unpacker, uint32_t count, int depth, uint32_t *tensors)
{
    for (; count > 0; count--)
        if (!check_value(unpacker, depth, tensors))
            return false;
    return true;
}

/* Go over a tuple's marker, if the next item is one. */
static bool take_tuple_marker(struct unpacker *unpacker)
{
    struct unpacker ahead = *unpacker;
    struct token token;
    if (!unpack_kind(&ahead, &token, TOKEN_EXTENSION) || token.code != EXTENSION_TUPLE)
        return false;
    *unpacker = ahead;
    return true;
}

static bool check_map(struct unpacker *unpacker, uint32_t count, int depth, uint32_t *tensors, bool only_text)
{
    struct token key;
    for (; count > 0; count--)
        if (!unpack_token(unpacker, &key) || !is_key(&key) || (only_text && key.kind != TOKEN_TEXT)
            || !check_value(unpacker, depth, tensors))
            return false;
    return true;
}

/* Go over a value; *tensors becomes larger than every index in it. */
static bool check_value(struct unpacker *unpacker, int depth, uint32_t *tensors)
{
    struct token token;
    if (!unpack_token(unpacker, &token))
        return false;
    switch (token.kind) {
    case TOKEN_TEXT:
        return utf8_characters(token.bytes, token.count) >= 0;
    case TOKEN_EXTENSION:
        if (depth > MAX_DEPTH || !is_tensor(&token))
            return false;
        if (tensor_index(&token) >= *tensors)
            *tensors = tensor_index(&token) + 1;
        return true;
    case TOKEN_ARRAY:
        if (depth > MAX_DEPTH)
            return false;
        if (token.count > 0 && take_tuple_marker(unpacker))
            token.count--;
        return check_items(unpacker, token.count, depth + 1, tensors);
    case TOKEN_MAP:
        return depth <= MAX_DEPTH && check_map(unpacker, token.count, depth + 1, tensors, false);
    default:
        return true;
    }
}

/* A whole message, as far as it is known without making anything. */
struct call {
    uint64_t tag, call_id;
    struct token method;       /* of a request */
    struct unpacker values;    /* where a request's arguments or a reply's result begin */
    struct unpacker tensors;   /* where the first descriptor begins */
    uint32_t tensor_count;
};

static bool take_name(struct unpacker *unpacker, struct token *name)
{
    if (!unpack_kind(unpacker, name, TOKEN_TEXT))
        return false;
    int64_t characters = utf8_characters(name->bytes, name->count);
    return characters >= 0 && characters <= MAX_NAME_CHARACTERS;
}

static bool check_arguments(struct unpacker *unpacker, uint32_t *tensors)
{
    struct token token;
    return unpack_kind(unpacker, &token, TOKEN_ARRAY) && check_items(unpacker, token.count, ARGUMENT_DEPTH, tensors)
        && unpack_kind(unpacker, &token, TOKEN_MAP) && check_map(unpacker, token.count, ARGUMENT_DEPTH, tensors, true);
}

/* Whether the bytes after the preamble are a valid request or reply. */
static bool check_call(struct unpacker *unpacker, struct call *call)
{
    struct token token;
    struct descriptor descriptor;
    uint32_t tensors = 0;
    if (!unpack_kind(unpacker, &token, TOKEN_ARRAY) || !unpack_count(unpacker, &call->tag))
        return false;
    bool is_request = call->tag == TAG_REQUEST;
    if (!is_request && call->tag != TAG_REPLY)
        return false;
    if (token.count != (is_request ? REQUEST_FIELDS : REPLY_FIELDS) || !unpack_count(unpacker, &call->call_id)
        || (is_request && !take_name(unpacker, &call->method)))
        return false;
    call->values = *unpacker;
    if (!(is_request ? check_arguments(unpacker, &tensors) : check_value(unpacker, 0, &tensors)))
        return false;
    if (!unpack_kind(unpacker, &token, TOKEN_ARRAY) || token.count > MAX_TENSORS || token.count < tensors)
        return false;
    call->tensor_count = token.count;
    call->tensors = *unpacker;
    for (uint32_t index = 0; index < call->tensor_count; index++)
        if (!take_descriptor(unpacker, &descriptor))
            return false;
    return unpacker->at == unpacker->end;
}

/* --- making Python's objects --- */

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

/* What decode_call returns of a message that is valid. */
static PyObject *make_call(struct call *call, PyObject *describe, PyObject *borrows, Py_ssize_t start)
{
    uint64_t nbytes = 0;
    PyObject *tensors, *descriptors = NULL, *method = NULL;
    if (is_borrows(borrows) && all_can_be_borrowed(call, borrows))
        tensors = borrow_all(call, borrows, &nbytes);
    else
        tensors = Py_NewRef(Py_None);
    if (tensors != NULL)
        descriptors = tensors == Py_None ? make_descriptors(call, describe) : PyTuple_New(0);
    if (descriptors != NULL)
        method = call->tag == TAG_REQUEST ? make_text(&call->method) : Py_NewRef(Py_None);
    if (method == NULL) {
        Py_XDECREF(tensors);
        Py_XDECREF(descriptors);
        return NULL;
    }
    return Py_BuildValue("KNNnNK", (unsigned long long)call->call_id, method, descriptors, start, tensors,
                         (unsigned long long)nbytes);
}

PyObject *decode_call(PyObject *Py_UNUSED(module), PyObject *parameters)
{
    PyObject *data, *describe, *borrows;
    char *bytes;
    Py_ssize_t nbytes;
    if (!PyArg_ParseTuple(parameters, "OOO", &data, &describe, &borrows)
        || PyBytes_AsStringAndSize(data, &bytes, &nbytes) < 0)
        return NULL;
    if (nbytes < 2 || (unsigned char)bytes[0] != MAGIC_BYTE || bytes[1] != FORMAT_VERSION)
        Py_RETURN_NONE;
    struct call call = {0};
    struct unpacker unpacker = {(unsigned char *)bytes + 2, (unsigned char *)bytes + nbytes};
    if (!check_call(&unpacker, &call))
        Py_RETURN_NONE;
    return make_call(&call, describe, borrows, (Py_ssize_t)(call.values.at - (unsigned char *)bytes));
}

/* What the values of one message are made from. */
struct decoder {
    struct unpacker unpacker;
    PyObject *tensors; /* a tuple */
    PyObject *to_array;
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
