#include "module.h"

#include <stdarg.h>

PyObject *fetch_error(void)
{
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    if (error != NULL && traceback != NULL)
        PyException_SetTraceback(error, traceback);
    Py_XDECREF(type);
    Py_XDECREF(traceback);
    return error;
}

void raise_again(PyObject *error)
{
    PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_DECREF(error);
}

PyObject *refuse(const char *rule, const char *format, ...)
{
    va_list values;
    va_start(values, format);
    PyObject *arguments = Py_VaBuildValue(format, values);
    va_end(values);
    PyObject *refusals = arguments == NULL ? NULL : PyImport_ImportModule("shmtransport.core.refusals");
    PyObject *function = refusals == NULL ? NULL : PyObject_GetAttrString(refusals, rule);
    PyObject *error = function == NULL ? NULL : PyObject_CallObject(function, arguments);
    if (error != NULL)
        raise_again(error);
    Py_XDECREF(function);
    Py_XDECREF(refusals);
    Py_XDECREF(arguments);
    return NULL;
}
