/* DirectCalls.call: a whole call in one step, where nothing stands in the way: its request is sent, its reply awaited, and
 * its result handed out. */
#include "direct_calls.h"

#include "call_state.h"
#include "waiting.h"

/* Take the arguments and keywords out of a list that has them alone, as a tuple; NULL with an error set. */
static PyObject *take_given(PyObject *given)
{
    PyObject *item = PyList_Check(given) && PyList_Size(given) == 1 ? PyList_GetItem(given, 0) : NULL;
    if (item == NULL || !PyTuple_Check(item) || PyTuple_Size(item) != 2 || !PyTuple_Check(PyTuple_GetItem(item, 0))
        || !PyDict_Check(PyTuple_GetItem(item, 1)))
        return PyErr_Format(PyExc_TypeError, "%R", given);
    Py_INCREF(item);
    PyList_SetSlice(given, 0, 1, NULL); /* which it has: never an error */
    return item;
}

/* Send the request: as direct_begin_call; the arguments are in the list again if nothing was done, and not held otherwise. */
static int begin_given(DirectCalls *self, CallState *call, PyObject *given)
{
    PyObject *item = take_given(given);
    if (item == NULL)
        return -1;
    int begun = direct_begin_call(self, call, PyTuple_GetItem(item, 0), PyTuple_GetItem(item, 1));
    if (begun == 0 && PyList_Append(given, item) < 0)
        begun = -1;
    Py_DECREF(item);
    return begun;
}

/* The result of a call that has one, handed out, unless there is more to do for this thread; None otherwise. */
static PyObject *hand_out(const DirectCalls *self, CallState *call)
{
    if (!call->ended || call->error != NULL || !direct_is_usable(self) || PyDict_Size(self->followers) > 0)
        Py_RETURN_NONE;
    PyObject *result = call->result;
    call->result = NULL;
    call->handed_out = true;
    return result == NULL ? Py_NewRef(Py_None) : result;
}

PyObject *direct_call(PyObject *object, PyObject *const *arguments, Py_ssize_t count)
{
    DirectCalls *self = (DirectCalls *)object;
    if (count != 3 || !is_call_state(arguments[0]))
        return PyErr_Format(PyExc_TypeError, "%zd", count);
    CallState *call = (CallState *)arguments[0];
    double seconds = PyFloat_AsDouble(arguments[2]);
    if (seconds == -1.0 && PyErr_Occurred())
        return NULL;
    int begun = begin_given(self, call, arguments[1]);
    if (begun < 0 || (begun > 0 && direct_wait_for(self, call, seconds - (clock_seconds() - call->submitted)) < 0))
        return NULL;
    return hand_out(self, call);
}
