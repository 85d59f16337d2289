#include "module.h"

#include "layout.h"

void free_object(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc free_memory = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_memory(self);
    Py_DECREF(type);
}

bool make_type_once(PyTypeObject **type, PyType_Spec *spec)
{
    if (*type == NULL)
        *type = (PyTypeObject *)PyType_FromSpec(spec);
    return *type != NULL;
}

/* Types are kept in static pointers, so that there is one interpreter only that may have them. */
static int check_interpreter(void)
{
    if (PyInterpreterState_GetID(PyInterpreterState_Get()) == 0)
        return 0;
    refuse("subinterpreter", "()");
    return -1;
}

static int fill_module(PyObject *module)
{
    if (check_interpreter() < 0)
        return -1;
    if (PyModule_AddIntConstant(module, "FORMAT_VERSION", FORMAT_VERSION) < 0)
        return -1;
    if (add_allocator_types(module) < 0)
        return -1;
    if (add_message_ring_type(module) < 0 || add_bell_type(module) < 0)
        return -1;
    if (add_mapping_type(module) < 0 || add_tensors_type(module) < 0)
        return -1;
    if (add_counters_type(module) < 0 || add_patience_type(module) < 0)
        return -1;
    if (add_call_state_type(module) < 0 || add_message_calls_type(module) < 0)
        return -1;
    if (add_direct_calls_type(module) < 0 || add_direct_answers_type(module) < 0)
        return -1;
    if (add_borrows_type(module) < 0 || add_loans_types(module) < 0)
        return -1;
    return prepare_encoding();
}

static PyMethodDef functions[] = {
    {"encode_request", encode_request, METH_VARARGS, NULL},
    {"encode_reply", encode_reply, METH_VARARGS, NULL},
    {"decode_call", decode_call, METH_VARARGS, NULL},
    {"decode_values", decode_values, METH_VARARGS, NULL},
    {"take_call", (PyCFunction)(void (*)(void))take_call, METH_FASTCALL, NULL},
    {"answer_in_turn", answer_in_turn, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, fill_module},
#ifdef Py_mod_gil /* not in the limited API, which a free-threaded Python lacks */
    /* What threads share, such as counters, loans and the state of calls, is guarded by the GIL alone. */
    {Py_mod_gil, Py_MOD_GIL_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "shmtransport.core._native",
    .m_doc = "The compiled twin of the core; shmtransport.core says what is in it and what for.",
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&definition);
}
