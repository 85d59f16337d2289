#include "call_state.h"

#include "waiting.h"

static PyTypeObject *call_state_type; /* for as long as the process lives */

bool is_call_state(PyObject *object)
{
    return PyObject_TypeCheck(object, call_state_type);
}

static void end(CallState *call)
{
    call->ended = true;
    atomic_store_explicit(&call->ready, 1, memory_order_release);
}

void call_succeed(CallState *call, PyObject *result, bool has_tensors)
{
    PyObject *before = call->result;
    call->result = result;
    call->has_tensors = has_tensors;
    end(call);
    Py_XDECREF(before);
}

void call_fail(CallState *call, PyObject *error)
{
    PyObject *before = call->error;
    call->error = error;
    end(call);
    Py_XDECREF(before);
}

static int call_init(PyObject *object, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"method", NULL};
    CallState *self = (CallState *)object;
    PyObject *method;
    if (keywords == NULL && PyTuple_Size(arguments) == 1) /* as usual: parsing takes as long as all else here */
        method = PyTuple_GetItem(arguments, 0);
    else if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O", names, &method))
        return -1;
    PyObject *before = self->method;
    self->method = Py_NewRef(method);
    self->call_id = -1;
    self->submitted = clock_seconds();
    Py_XDECREF(before);
    return 0;
}

static int call_traverse(PyObject *object, visitproc visit, void *arg)
{
    CallState *self = (CallState *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->method);
    Py_VISIT(self->error);
    Py_VISIT(self->callbacks);
    Py_VISIT(self->result);
    return 0;
}

static int call_clear(PyObject *object)
{
    CallState *self = (CallState *)object;
    Py_CLEAR(self->method);
    Py_CLEAR(self->data);
    Py_CLEAR(self->error);
    Py_CLEAR(self->callbacks);
    Py_CLEAR(self->result);
    return 0;
}

static void call_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    call_clear(self);
    free_object(self);
}

#define CALL_MEMBER(name, type) {#name, type, offsetof(CallState, name), 0, NULL}

_Static_assert(sizeof(atomic_uchar) == 1, "Python writes it as a bool");

static PyMemberDef call_members[] = {
    CALL_MEMBER(method, T_OBJECT),
    CALL_MEMBER(data, T_OBJECT),
    CALL_MEMBER(error, T_OBJECT),
    CALL_MEMBER(callbacks, T_OBJECT),
    CALL_MEMBER(result, T_OBJECT),
    CALL_MEMBER(call_id, T_LONGLONG),
    CALL_MEMBER(generation, T_LONGLONG),
    CALL_MEMBER(submitted, T_DOUBLE),
    CALL_MEMBER(ready, T_BOOL),
    CALL_MEMBER(ended, T_BOOL),
    CALL_MEMBER(has_tensors, T_BOOL),
    CALL_MEMBER(handed_out, T_BOOL),
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot call_slots[] = {
    {Py_tp_init, call_init},
    {Py_tp_dealloc, call_dealloc},
    {Py_tp_traverse, call_traverse},
    {Py_tp_clear, call_clear},
    {Py_tp_members, call_members},
    {0, NULL},
};

static PyType_Spec call_spec = {
    .name = "shmtransport.core._native.CallState",
    .basicsize = sizeof(CallState),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = call_slots,
};

int add_call_state_type(PyObject *module)
{
    return make_type_once(&call_state_type, &call_spec)
        ? PyModule_AddObjectRef(module, "CallState", (PyObject *)call_state_type)
        : -1;
}
