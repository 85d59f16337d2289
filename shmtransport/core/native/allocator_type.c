/* The allocator as Python sees it: NextFitAllocator, and Block for what it gives out.
 *
 * A Block holds a reference to its allocator for as long as it is held, so that the C block that it points to is there.
 * An allocator has no reference to its Blocks: there is no cycle, and nothing here is seen by the garbage collector.
 */
#include "module.h"

#include "allocator.h"

typedef struct {
    PyObject_HEAD
    struct allocator allocator;
} Allocator;

typedef struct {
    PyObject_HEAD
    Allocator *owner;    /* NULL unless held */
    struct block *block; /* NULL unless held */
    long long offset;
    long long nbytes;
} Block;

static PyTypeObject *block_type; /* for as long as the process lives */

/* --- Block --- */

static PyObject *block_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"offset", "nbytes", NULL};
    long long offset, nbytes;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "LL", names, &offset, &nbytes))
        return NULL;
    Block *self = (Block *)PyType_GenericAlloc(type, 0);
    if (self != NULL) {
        self->offset = offset;
        self->nbytes = nbytes;
    }
    return (PyObject *)self;
}

/* A signal handler may raise right after a claim has returned, before its caller has stored the block: it is given back
 * here, or nothing could ever release it. */
static void block_dealloc(PyObject *self)
{
    Block *lost = (Block *)self;
    if (lost->owner != NULL) {
        allocator_release(&lost->owner->allocator, lost->block);
        Py_DECREF(lost->owner);
    }
    free_object(self);
}

static PyObject *block_repr(PyObject *self)
{
    return PyUnicode_FromFormat("Block(offset=%lld, nbytes=%lld)", ((Block *)self)->offset, ((Block *)self)->nbytes);
}

static PyObject *block_held(PyObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(((Block *)self)->block != NULL);
}

static PyMemberDef block_members[] = {
    {"offset", T_LONGLONG, offsetof(Block, offset), READONLY, NULL},
    {"nbytes", T_LONGLONG, offsetof(Block, nbytes), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef block_attributes[] = {
    {"held", block_held, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot block_slots[] = {
    {Py_tp_new, block_new},
    {Py_tp_dealloc, block_dealloc},
    {Py_tp_repr, block_repr},
    {Py_tp_members, block_members},
    {Py_tp_getset, block_attributes},
    {0, NULL},
};

static PyType_Spec block_spec = {
    .name = "shmtransport.core._native.Block",
    .basicsize = sizeof(Block),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = block_slots,
};

/* --- NextFitAllocator --- */

static PyObject *allocator_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"capacity", NULL};
    long long capacity;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "L", names, &capacity))
        return NULL;
    if (capacity <= 0 || capacity % BLOCK_ALIGNMENT != 0)
        return refuse("bad_capacity", "(L)", capacity);
    Allocator *self = (Allocator *)PyType_GenericAlloc(type, 0);
    if (self != NULL && !allocator_begin(&self->allocator, capacity)) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void allocator_dealloc(PyObject *self)
{
    allocator_end(&((Allocator *)self)->allocator);
    free_object(self);
}

static PyObject *allocator_claim_method(PyObject *self, PyObject *argument)
{
    struct allocator *allocator = &((Allocator *)self)->allocator;
    int overflow;
    long long nbytes = PyLong_AsLongLongAndOverflow(argument, &overflow);
    if (nbytes == -1 && PyErr_Occurred())
        return NULL;
    if (overflow > 0)
        Py_RETURN_NONE;
    if (overflow < 0 || nbytes <= 0)
        return refuse("empty_claim", "(O)", argument);
    if (!allocator_prepare(allocator))
        return PyErr_NoMemory();
    Block *result = PyObject_New(Block, block_type);
    if (result == NULL)
        return NULL;
    result->owner = NULL;
    result->block = allocator_claim(allocator, nbytes);
    if (result->block == NULL) {
        Py_DECREF(result);
        Py_RETURN_NONE;
    }
    result->owner = (Allocator *)Py_NewRef(self);
    result->offset = result->block->offset;
    result->nbytes = result->block->nbytes;
    return (PyObject *)result;
}

static PyObject *allocator_release_method(PyObject *self, PyObject *argument)
{
    if (!Py_IS_TYPE(argument, block_type))
        return PyErr_Format(PyExc_TypeError, "%R", argument);
    Block *held = (Block *)argument;
    if ((PyObject *)held->owner != self)
        return refuse("block_not_held", "(L)", held->offset);
    allocator_release(&((Allocator *)self)->allocator, held->block);
    held->block = NULL;
    held->owner = NULL;
    Py_DECREF(self); /* the block's reference: the caller has one too */
    Py_RETURN_NONE;
}

static PyObject *allocator_has_room_method(PyObject *self, PyObject *argument)
{
    int overflow;
    long long nbytes = PyLong_AsLongLongAndOverflow(argument, &overflow);
    if (nbytes == -1 && PyErr_Occurred())
        return NULL;
    if (overflow > 0)
        Py_RETURN_FALSE;
    return PyBool_FromLong(allocator_has_room(&((Allocator *)self)->allocator, nbytes > 0 ? nbytes : 0));
}

static PyObject *allocator_largest_gap_method(PyObject *self, PyObject *Py_UNUSED(nothing))
{
    return PyLong_FromLongLong(allocator_largest_gap(&((Allocator *)self)->allocator));
}

static Py_ssize_t allocator_length(PyObject *self)
{
    return (Py_ssize_t)((Allocator *)self)->allocator.held_count;
}

static PyMethodDef allocator_methods[] = {
    {"claim", allocator_claim_method, METH_O, NULL},
    {"release", allocator_release_method, METH_O, NULL},
    {"has_room", allocator_has_room_method, METH_O, NULL},
    {"largest_gap", allocator_largest_gap_method, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef allocator_members[] = {
    {"capacity", T_LONGLONG, offsetof(Allocator, allocator) + offsetof(struct allocator, capacity), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot allocator_slots[] = {
    {Py_tp_new, allocator_new},
    {Py_tp_dealloc, allocator_dealloc},
    {Py_tp_methods, allocator_methods},
    {Py_tp_members, allocator_members},
    {Py_sq_length, allocator_length},
    {0, NULL},
};

static PyType_Spec allocator_spec = {
    .name = "shmtransport.core._native.NextFitAllocator",
    .basicsize = sizeof(Allocator),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = allocator_slots,
};

int add_allocator_types(PyObject *module)
{
    if (!make_type_once(&block_type, &block_spec) || PyModule_AddObjectRef(module, "Block", (PyObject *)block_type) < 0)
        return -1;
    PyObject *allocator = PyType_FromSpec(&allocator_spec);
    if (allocator == NULL)
        return -1;
    int added = PyModule_AddObjectRef(module, "NextFitAllocator", allocator);
    Py_DECREF(allocator);
    return added;
}
