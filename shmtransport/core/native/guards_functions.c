/* Guarded memory as Python sees it; memory/guarded_map.py uses it. */
#include "module.h"

#include "guards.h"

PyObject *guard(PyObject *Py_UNUSED(module), PyObject *parameters)
{
    unsigned long long start, nbytes;
    if (!PyArg_ParseTuple(parameters, "KK", &start, &nbytes))
        return NULL;
    return PyLong_FromLong(guard_range((uintptr_t)start, (size_t)nbytes));
}

/* A number that guard gave; -1 with an error otherwise. */
static int number_of(PyObject *argument)
{
    long number = PyLong_AsLong(argument);
    if (number >= 0 && number < MOST_GUARDS)
        return (int)number;
    if (!PyErr_Occurred())
        PyErr_SetObject(PyExc_ValueError, argument);
    return -1;
}

PyObject *unguard(PyObject *Py_UNUSED(module), PyObject *argument)
{
    int number = number_of(argument);
    if (number < 0)
        return NULL;
    unguard_range(number);
    Py_RETURN_NONE;
}

PyObject *was_cut(PyObject *Py_UNUSED(module), PyObject *argument)
{
    int number = number_of(argument);
    return number < 0 ? NULL : PyBool_FromLong(range_was_cut(number));
}
