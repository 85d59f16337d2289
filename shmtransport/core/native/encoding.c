/* The bytes of requests and replies: core/codec.py's encode_request and encode_reply.
 *
 * Values of exactly the plain types, and lists, tuples and dicts of them, are packed here. Everything else goes to the
 * caller's pack(value, depth), which returns it in plain types and msgspec's Ext: tensors, arrays, subclasses, and the
 * refusal of what can't be sent. That is Python code: what is walked through here is held meanwhile, and looked at again
 * after it, as Python's own iteration does.
 */
#include "encoding.h"

#include "layout.h"

#define DEEPEST 100 /* of what pack returns; it keeps to MAX_DEPTH itself */

static PyObject *ext_type;                                              /* msgspec.msgpack.Ext */
static PyObject *name_code, *name_data;                                 /* its attributes */
static PyObject *descriptor_names[5]; /* a descriptor's, in the order of the message */

static bool put_value(struct encoder *encoder, PyObject *value, int depth);
static bool put_packed(struct encoder *encoder, PyObject *value, int depth);
typedef bool put_item(struct encoder *encoder, PyObject *value, int depth);

static bool check_size(Py_ssize_t size)
{
    if ((size_t)size <= PACK_LIMIT)
        return true;
    refuse("beyond_32_bits", "(n)", size);
    return false;
}

static bool put_int(struct encoder *encoder, PyObject *value)
{
    int overflow;
    long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (overflow == 0) {
        if (number == -1 && PyErr_Occurred())
            return false;
        pack_signed(&encoder->packer, number);
        return true;
    }
    if (overflow > 0) {
        unsigned long long large = PyLong_AsUnsignedLongLong(value);
        if (!PyErr_Occurred()) {
            pack_unsigned(&encoder->packer, large);
            return true;
        }
        PyErr_Clear();
    }
    refuse("beyond_64_bits", "()");
    return false;
}

static bool put_text(struct encoder *encoder, PyObject *value)
{
    Py_ssize_t nbytes;
    const char *utf8 = PyUnicode_AsUTF8AndSize(value, &nbytes);
    if (utf8 == NULL || !check_size(nbytes))
        return false;
    pack_text(&encoder->packer, utf8, (size_t)nbytes);
    return true;
}

static bool put_bytes(struct encoder *encoder, PyObject *value)
{
    Py_ssize_t nbytes = PyBytes_Size(value);
    if (!check_size(nbytes))
        return false;
    pack_binary(&encoder->packer, PyBytes_AsString(value), (size_t)nbytes);
    return true;
}

/* One of the types without items; *done tells whether it was one. */
static bool put_plain(struct encoder *encoder, PyObject *value, bool *done)
{
    PyTypeObject *type = Py_TYPE(value);
    *done = true;
    if (value == Py_None)
        pack_nil(&encoder->packer);
    else if (type == &PyBool_Type)
        pack_bool(&encoder->packer, value == Py_True);
    else if (type == &PyFloat_Type)
        pack_double(&encoder->packer, PyFloat_AsDouble(value));
    else if (type == &PyLong_Type)
        return put_int(encoder, value);
    else if (type == &PyUnicode_Type)
        return put_text(encoder, value);
    else if (type == &PyBytes_Type)
        return put_bytes(encoder, value);
    else
        *done = false;
    return true;
}

static bool changed_size(void)
{
    refuse("changed_size", "()");
    return false;
}

/* As Python iterates over a list that changes meanwhile: an item that came is packed, one that went is not. */
static bool put_list(struct encoder *encoder, PyObject *list, int depth, put_item *put)
{
    Py_ssize_t size = PyList_Size(list), index = 0;
    size_t start = encoder->packer.length;
    if (!check_size(size))
        return false;
    pack_array(&encoder->packer, (size_t)size);
    for (; index < PyList_Size(list); index++) {
        PyObject *item = Py_NewRef(PyList_GetItem(list, index)); /* a callback may take it out of the list */
        bool put_it = put(encoder, item, depth + 1);
        Py_DECREF(item);
        if (!put_it)
            return false;
    }
    if (index == size)
        return true;
    if (!check_size(index))
        return false;
    repack_array(&encoder->packer, start, (size_t)size, (size_t)index);
    return true;
}

static bool put_tuple(struct encoder *encoder, PyObject *tuple, int depth)
{
    Py_ssize_t size = PyTuple_Size(tuple);
    if (!check_size(size + 1))
        return false;
    pack_array(&encoder->packer, (size_t)size + 1);
    pack_extension(&encoder->packer, EXTENSION_TUPLE, NULL, 0);
    for (Py_ssize_t index = 0; index < size; index++)
        if (!put_value(encoder, PyTuple_GetItem(tuple, index), depth + 1))
            return false;
    return true;
}

static bool bad_key(PyObject *key)
{
    refuse("bad_key", "(O)", Py_TYPE(key));
    return false;
}

typedef bool put_key(struct encoder *encoder, PyObject *key);

static bool put_dict_key(struct encoder *encoder, PyObject *key)
{
    if (Py_TYPE(key) == &PyUnicode_Type)
        return put_text(encoder, key);
    return Py_TYPE(key) == &PyLong_Type ? put_int(encoder, key) : bad_key(key);
}

/* Python takes subclasses of str as names of keyword arguments. */
static bool put_name(struct encoder *encoder, PyObject *name)
{
    if (PyUnicode_Check(name))
        return put_text(encoder, name);
    return PyLong_Check(name) ? put_int(encoder, name) : bad_key(name);
}

/* Each key of a dict that changes meanwhile must be found once, and no other: everything else is an error, as it is for
 * core/codec.py. packed is an empty set for its keys, or NULL for a dict that nothing else refers to. */
static bool put_entries(struct encoder *encoder, PyObject *dict, int depth, put_key *put_its_key, put_item *put,
                        PyObject *packed)
{
    Py_ssize_t size = PyDict_Size(dict), position = 0, found = 0;
    PyObject *key, *item;
    if (!check_size(size))
        return false;
    pack_map(&encoder->packer, (size_t)size);
    while (PyDict_Next(dict, &position, &key, &item)) {
        if (++found > size)
            return changed_size();
        Py_INCREF(key);
        Py_INCREF(item);
        bool put_it = put_its_key(encoder, key) && (packed == NULL || PySet_Add(packed, key) == 0)
            && put(encoder, item, depth + 1);
        Py_DECREF(item);
        Py_DECREF(key);
        if (!put_it)
            return false;
        if (PyDict_Size(dict) != size)
            return changed_size();
    }
    return (packed == NULL ? found : PySet_Size(packed)) == size || changed_size();
}

static bool put_dict(struct encoder *encoder, PyObject *dict, int depth)
{
    PyObject *packed = PySet_New(NULL);
    bool put_it = packed != NULL && put_entries(encoder, dict, depth, put_dict_key, put_value, packed);
    Py_XDECREF(packed);
    return put_it;
}

static void put_held(struct packer *packer, const struct held *held)
{
    pack_array(packer, sizeof descriptor_names / sizeof *descriptor_names);
    pack_unsigned(packer, (uint64_t)held->offset);
    pack_array(packer, (size_t)held->dimensions);
    for (int index = 0; index < held->dimensions; index++)
        pack_unsigned(packer, (uint64_t)held->sizes[index]);
    pack_text(packer, held->row->text, held->row->length);
    pack_unsigned(packer, (uint64_t)held->slot);
    pack_unsigned(packer, held->sequence);
}

/* Hold a plain tensor for a message that no Python code helps to make; as hold_tensor. */
static int hold_here(struct encoder *encoder, PyObject *value, struct held *held)
{
    uint32_t index = encoder->held_count;
    int is_held = index == MOST_HELD ? 0 : hold_tensor(encoder->loans, value, held);
    if (is_held <= 0)
        return is_held;
    put_held(&encoder->described, held);
    encoder->held[index].slot = (uint64_t)held->slot;
    encoder->held[index].sequence = held->sequence;
    encoder->held_count++;
    return 1;
}

/* Hold a plain tensor for the message: as hold_tensor. */
static int export_here(struct encoder *encoder, PyObject *tensor, struct held *held)
{
    return encoder->descriptors == NULL ? hold_here(encoder, tensor, held)
                                        : export_tensor(encoder->loans, tensor, encoder->descriptors, held);
}

/* As export_here, with a tensor over an array's memory. */
static int export_array_here(struct encoder *encoder, const struct tensors *library, PyObject *array, struct held *held)
{
    PyObject *tensor = tensor_over_array(library, array);
    if (tensor == NULL)
        return PyErr_Occurred() ? -1 : 0;
    int exported = export_here(encoder, tensor, held);
    Py_DECREF(tensor);
    return exported;
}

/* A plain tensor or array is exported here; *done tells whether it was one. */
static bool put_tensor(struct encoder *encoder, PyObject *value, bool *done)
{
    Py_ssize_t index = encoder->descriptors == NULL ? encoder->held_count : PyList_Size(encoder->descriptors);
    struct held held;
    *done = false;
    if (encoder->loans == NULL || index >= MAX_TENSORS)
        return true;
    const struct tensors *library = ((const Loans *)encoder->loans)->library;
    bool is_array = library->array_type != NULL && Py_IS_TYPE(value, library->array_type);
    int exported = is_array ? export_array_here(encoder, library, value, &held) : export_here(encoder, value, &held);
    if (exported <= 0)
        return exported == 0;
    const char bytes[2] = {(char)(index & 0xff), (char)(index >> 8)};
    pack_extension(&encoder->packer, is_array ? EXTENSION_ARRAY : EXTENSION_TENSOR, bytes, sizeof bytes);
    encoder->sent.count++;
    encoder->sent.nbytes += (uint64_t)held.nbytes;
    encoder->sent.copies += held.is_copy;
    encoder->sent.copied_bytes += held.is_copy ? (uint64_t)held.nbytes : 0;
    *done = true;
    return true;
}

/* What the caller makes of a value of another type. */
static bool put_other(struct encoder *encoder, PyObject *value, int depth)
{
    bool is_put;
    if (!put_tensor(encoder, value, &is_put) || is_put)
        return is_put;
    if (encoder->pack == NULL)
        return false;
    PyObject *number = PyLong_FromLong(depth);
    PyObject *packed = number == NULL ? NULL : PyObject_CallFunctionObjArgs(encoder->pack, value, number, NULL);
    Py_XDECREF(number);
    bool put_it = packed != NULL && put_packed(encoder, packed, 0);
    Py_XDECREF(packed);
    return put_it;
}

static bool put_value(struct encoder *encoder, PyObject *value, int depth)
{
    PyTypeObject *type = Py_TYPE(value);
    bool is_plain;
    if (!put_plain(encoder, value, &is_plain))
        return false;
    if (is_plain)
        return true;
    bool is_list = type == &PyList_Type, is_tuple = type == &PyTuple_Type;
    if (!is_list && !is_tuple && type != &PyDict_Type)
        return put_other(encoder, value, depth);
    if (depth >= MAX_DEPTH) {
        refuse("nested_too_deep", "(i)", MAX_DEPTH);
        return false;
    }
    if (is_list)
        return put_list(encoder, value, depth, put_value);
    return is_tuple ? put_tuple(encoder, value, depth) : put_dict(encoder, value, depth);
}

static bool put_ext(struct encoder *encoder, PyObject *ext)
{
    PyObject *code = PyObject_GetAttr(ext, name_code);
    PyObject *data = PyObject_GetAttr(ext, name_data);
    bool put_it = false;
    long number = code == NULL ? 0 : PyLong_AsLong(code);
    char *bytes;
    Py_ssize_t nbytes;
    if (data != NULL && !PyErr_Occurred() && PyBytes_AsStringAndSize(data, &bytes, &nbytes) == 0 && check_size(nbytes)) {
        pack_extension(&encoder->packer, (int8_t)number, bytes, (size_t)nbytes);
        put_it = true;
    }
    Py_XDECREF(code);
    Py_XDECREF(data);
    return put_it;
}

/* What the caller's pack has returned. */
static bool put_packed(struct encoder *encoder, PyObject *value, int depth)
{
    PyTypeObject *type = Py_TYPE(value);
    bool is_plain;
    if (!put_plain(encoder, value, &is_plain))
        return false;
    if (is_plain)
        return true;
    if ((PyObject *)type == ext_type)
        return put_ext(encoder, value);
    if (depth < DEEPEST && type == &PyList_Type)
        return put_list(encoder, value, depth, put_packed);
    if (depth < DEEPEST && type == &PyDict_Type)
        return put_entries(encoder, value, depth, put_dict_key, put_packed, NULL);
    PyErr_SetObject(PyExc_TypeError, value);
    return false;
}

static bool put_shape(struct encoder *encoder, PyObject *shape)
{
    Py_ssize_t size = PyTuple_Size(shape);
    if (size < 0 || !check_size(size))
        return false;
    pack_array(&encoder->packer, (size_t)size);
    for (Py_ssize_t index = 0; index < size; index++)
        if (!put_packed(encoder, PyTuple_GetItem(shape, index), 0))
            return false;
    return true;
}

static bool put_descriptor(struct encoder *encoder, PyObject *descriptor)
{
    const int fields = sizeof descriptor_names / sizeof *descriptor_names;
    pack_array(&encoder->packer, (size_t)fields);
    for (int index = 0; index < fields; index++) {
        PyObject *field = PyObject_GetAttr(descriptor, descriptor_names[index]);
        if (field == NULL)
            return false;
        bool put_it = PyTuple_Check(field) ? put_shape(encoder, field) : put_packed(encoder, field, 0);
        Py_DECREF(field);
        if (!put_it)
            return false;
    }
    return true;
}

static bool put_descriptors(struct encoder *encoder, PyObject *descriptors)
{
    Py_ssize_t size = PyList_Size(descriptors);
    if (size < 0 || !check_size(size))
        return false;
    pack_array(&encoder->packer, (size_t)size);
    for (Py_ssize_t index = 0; index < size; index++) {
        PyObject *descriptor = PyList_GetItem(descriptors, index);
        if (descriptor == NULL)
            return false;
        Py_INCREF(descriptor);
        bool put_it = put_descriptor(encoder, descriptor);
        Py_DECREF(descriptor);
        if (!put_it)
            return false;
    }
    return true;
}

static void begin_message(struct encoder *encoder, size_t fields, uint64_t tag)
{
    packer_begin(&encoder->packer);
    encoder->sent = (struct sent_tensors){0};
    pack_byte(&encoder->packer, MAGIC_BYTE);
    pack_byte(&encoder->packer, FORMAT_VERSION);
    pack_array(&encoder->packer, 1 + fields);
    pack_unsigned(&encoder->packer, tag);
}

static bool put_arguments(struct encoder *encoder, PyObject *arguments)
{
    Py_ssize_t size = PyTuple_Size(arguments);
    if (!check_size(size))
        return false;
    pack_array(&encoder->packer, (size_t)size);
    for (Py_ssize_t index = 0; index < size; index++)
        if (!put_value(encoder, PyTuple_GetItem(arguments, index), ARGUMENT_DEPTH))
            return false;
    return true;
}

static bool put_keywords(struct encoder *encoder, PyObject *keywords)
{
    return put_entries(encoder, keywords, ARGUMENT_DEPTH - 1, put_name, put_value, NULL);
}

/* --- with Python's help: encode_request and encode_reply --- */

/* The message and the size of the tensors that were exported here, unless something went wrong. */
static PyObject *end_message(struct encoder *encoder, bool is_whole)
{
    struct packer *packer = &encoder->packer;
    PyObject *result = NULL;
    if (packer->out_of_memory && is_whole)
        PyErr_NoMemory();
    else if (is_whole)
        result = Py_BuildValue("y#KKK", (const char *)packer->bytes, (Py_ssize_t)packer->length,
                               (unsigned long long)encoder->sent.nbytes, (unsigned long long)encoder->sent.copies,
                               (unsigned long long)encoder->sent.copied_bytes);
    packer_end(packer);
    return result;
}

PyObject *encode_request(PyObject *Py_UNUSED(module), PyObject *parameters)
{
    PyObject *call_id, *method, *arguments, *keywords;
    struct encoder encoder;
    if (!PyArg_ParseTuple(parameters, "O!UO!O!OO!O", &PyLong_Type, &call_id, &method, &PyTuple_Type, &arguments,
                          &PyDict_Type, &keywords, &encoder.pack, &PyList_Type, &encoder.descriptors, &encoder.loans))
        return NULL;
    if (!is_loans(encoder.loans))
        encoder.loans = NULL;
    begin_message(&encoder, 5, TAG_REQUEST);
    return end_message(&encoder, put_int(&encoder, call_id) && put_text(&encoder, method)
                                     && put_arguments(&encoder, arguments) && put_keywords(&encoder, keywords)
                                     && put_descriptors(&encoder, encoder.descriptors));
}

PyObject *encode_reply(PyObject *Py_UNUSED(module), PyObject *parameters)
{
    PyObject *call_id, *result;
    struct encoder encoder;
    if (!PyArg_ParseTuple(parameters, "O!OOO!O", &PyLong_Type, &call_id, &result, &encoder.pack, &PyList_Type,
                          &encoder.descriptors, &encoder.loans))
        return NULL;
    if (!is_loans(encoder.loans))
        encoder.loans = NULL;
    begin_message(&encoder, 3, TAG_REPLY);
    return end_message(&encoder, put_int(&encoder, call_id) && put_value(&encoder, result, 0)
                                     && put_descriptors(&encoder, encoder.descriptors));
}

/* --- without --- */

static void begin_alone(struct encoder *encoder, PyObject *loans, size_t fields, uint64_t tag)
{
    encoder->pack = encoder->descriptors = NULL;
    encoder->loans = loans;
    encoder->held_count = 0;
    packer_begin(&encoder->described);
    begin_message(encoder, fields, tag);
}

void encoder_end(struct encoder *encoder)
{
    packer_end(&encoder->packer);
    packer_end(&encoder->described);
}

void encoder_undo(struct encoder *encoder)
{
    for (uint32_t index = 0; index < encoder->held_count; index++)
        end_held(encoder->loans, encoder->held[index].slot, encoder->held[index].sequence);
    encoder_end(encoder);
}

/* Append the descriptors. What is refused is refused again where Python makes the message, and put into words there. */
static int end_alone(struct encoder *encoder, bool is_put)
{
    pack_array(&encoder->packer, encoder->held_count);
    pack_raw(&encoder->packer, encoder->described.bytes, encoder->described.length);
    if (is_put && !encoder->packer.out_of_memory && !encoder->described.out_of_memory)
        return 1;
    encoder_undo(encoder);
    if (!PyErr_Occurred())
        return 0;
    if (!PyErr_ExceptionMatches(PyExc_Exception))
        return -1;
    PyErr_Clear();
    return 0;
}

int encode_request_alone(struct encoder *encoder, PyObject *loans, uint64_t call_id, PyObject *method,
                         PyObject *arguments, PyObject *keywords)
{
    begin_alone(encoder, loans, 5, TAG_REQUEST);
    pack_unsigned(&encoder->packer, call_id);
    bool is_put = put_text(encoder, method) && put_arguments(encoder, arguments);
    if (is_put && keywords != NULL)
        is_put = put_keywords(encoder, keywords);
    else
        pack_map(&encoder->packer, 0);
    return end_alone(encoder, is_put);
}

int encode_reply_alone(struct encoder *encoder, PyObject *loans, uint64_t call_id, PyObject *result)
{
    begin_alone(encoder, loans, 3, TAG_REPLY);
    pack_unsigned(&encoder->packer, call_id);
    return end_alone(encoder, put_value(encoder, result, 0));
}

bool is_method_name(PyObject *method)
{
    return PyUnicode_CheckExact(method) && PyUnicode_GetLength(method) <= MAX_NAME_CHARACTERS;
}

int prepare_encoding(void)
{
    static const char *const names[] = {"offset", "shape", "dtype", "slot", "sequence"};
    for (size_t index = 0; index < sizeof names / sizeof *names; index++)
        if ((descriptor_names[index] = PyUnicode_InternFromString(names[index])) == NULL)
            return -1;
    name_code = PyUnicode_InternFromString("code");
    name_data = PyUnicode_InternFromString("data");
    PyObject *msgpack = PyImport_ImportModule("msgspec.msgpack");
    ext_type = msgpack == NULL ? NULL : PyObject_GetAttrString(msgpack, "Ext");
    Py_XDECREF(msgpack);
    return name_code == NULL || name_data == NULL || ext_type == NULL ? -1 : 0;
}
