/* What the files of this extension share. Every Python type of it is made in the module's exec step.
 *
 * Why this core is whole whatever a signal handler or a finalizer calls in the middle of a call: CPython runs those
 * between two instructions of Python code, and in a garbage collection, which the making of a container may start.
 * The C functions here run no Python code between their first look at an object's state and their last change of it:
 * they make what they need first (bytes, integers and blocks, none of which is a container), and then change. Where one
 * does let Python run, as a long wait does, its description says this, and it looks at the state again.
 *
 * They also rely on the GIL: on a Python without it this module must not be used by two threads at once, so it does not
 * declare that it could be, and such a Python switches its GIL on.
 */
#ifndef SHMTRANSPORT_MODULE_H
#define SHMTRANSPORT_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <stdbool.h>

/* Raise what shmtransport.core.refusals.<rule>(arguments) returns: no words in C. The format is that of Py_BuildValue
 * for a tuple. Always NULL. */
PyObject *refuse(const char *rule, const char *format, ...);

/* Take the error that is set, with its traceback; NULL if none is. */
PyObject *fetch_error(void);

/* Set an error that was made or taken; it takes the reference over. */
void raise_again(PyObject *error);

/* Make a type once, for as long as the process lives, however often this module is imported: a static pointer to it tells
 * its objects, those of an earlier import too. False with an error set. */
bool make_type_once(PyTypeObject **type, PyType_Spec *spec);

/* The memory of an object of one of this module's types, without references in it, and its reference to its type. */
void free_object(PyObject *self);

int add_allocator_types(PyObject *module);
int add_message_ring_type(PyObject *module);
int add_bell_type(PyObject *module);
int add_mapping_type(PyObject *module);
int add_patience_type(PyObject *module);
int add_call_state_type(PyObject *module);
int add_direct_calls_type(PyObject *module);
int add_direct_answers_type(PyObject *module);
int add_message_calls_type(PyObject *module);
int add_counters_type(PyObject *module);
int add_tensors_type(PyObject *module);
int add_borrows_type(PyObject *module);
int add_loans_types(PyObject *module);

int prepare_encoding(void);
PyObject *encode_request(PyObject *module, PyObject *parameters);
PyObject *encode_reply(PyObject *module, PyObject *parameters);

PyObject *decode_call(PyObject *module, PyObject *parameters);
PyObject *decode_values(PyObject *module, PyObject *parameters);
PyObject *take_call(PyObject *module, PyObject *const *arguments, Py_ssize_t count);

PyObject *answer_in_turn(PyObject *module, PyObject *parameters);

#endif
