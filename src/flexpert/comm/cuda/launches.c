/* Starts kernels whose arguments but a few are known, with as little of the host as that takes.
 *
 * A `Kernel` is one that was compiled, with its arguments; a `Call` is several in a row that take
 * their changing arguments from the same few tensors, which it first looks at. Tensors are read
 * through DLPack's exchange API (a table of functions that torch.Tensor offers), which makes
 * nothing; so nothing of torch or CUDA is needed to compile this, and the functions of the driver
 * are given as addresses.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { GPU = 2 }; /* of DLPack's kinds of devices */
enum { WORDS = 48, TENSORS = 8, SIZES = 4, LAUNCHES = 8, ALIGNMENT = 16 };
enum { TOKENS = -1, ROWS = -2 }; /* sizes of a tensor that a call finds */
enum { OF_TOKENS = -1, CONSTANT = -2 }; /* words that are of no tensor */

/* ---- tensors: the layout of DLPack 1.x ------------------------------------------------------ */

typedef struct {
    uint8_t code, bits;
    uint16_t lanes;
} dtype_t;

typedef struct {
    char *data;
    int32_t device, index;
    int32_t dimensions;
    dtype_t dtype;
    int64_t *sizes, *strides;
    uint64_t offset;
} tensor_t;

typedef struct {
    uint32_t major, minor;
    void *older;
    void *allocate, *give, *take;
    int (*view)(void *object, tensor_t *tensor);
    int (*stream)(int32_t device, int32_t index, void **stream);
} tensor_api;

static const tensor_api *api;
static PyTypeObject *tensor_type;

/* Whether the object is a tensor; without an error if not. */
static int read_tensor(PyObject *object, tensor_t *tensor) {
    PyTypeObject *type = Py_TYPE(object);
    if (type != tensor_type && !PyType_IsSubtype(type, tensor_type)) return 0;
    if (api->view(object, tensor)) {
        PyErr_Clear();
        return 0;
    }
    return 1;
}

static uint64_t address_of(const tensor_t *tensor) {
    return (uint64_t)(uintptr_t)tensor->data + tensor->offset;
}

static int is_contiguous(const tensor_t *tensor) {
    int64_t step = 1;
    int contiguous = 1;
    for (int i = tensor->dimensions - 1; i >= 0; i--) {
        int64_t size = tensor->sizes[i];
        if (size == 0) return 1;
        if (size != 1 && tensor->strides[i] != step) contiguous = 0;
        step *= size;
    }
    return contiguous;
}

/* ---- launching ------------------------------------------------------------------------------ */

typedef int (*launch_function)(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                               unsigned block_x, unsigned block_y, unsigned block_z,
                               unsigned shared, void *stream, void **arguments, void **extra);
typedef int (*get_function)(void **context);
typedef int (*set_function)(void *context);
typedef int (*stream_function)(int32_t device, int32_t index, void **stream);

/* CUDA_KERNEL_NODE_PARAMS, the first version. */
typedef struct {
    void *function;
    unsigned grid[3], block[3], shared;
    void **arguments, **extra;
} node_t;

/* Of the driver, in the order in which `Call.arm` is given them. */
typedef struct {
    int (*create)(void **graph, unsigned flags);
    int (*add)(void **node, void *graph, void *const *after, size_t many, const node_t *of);
    int (*instantiate)(void **executable, void *graph, unsigned long long flags);
    int (*update)(void *executable, void *node, const node_t *to);
    int (*launch)(void *executable, void *stream);
    int (*capturing)(void *stream, int *status);
} graph_functions;
enum { GRAPH_FUNCTIONS = sizeof(graph_functions) / sizeof(void *) };

/* pointers, changing: of the words, so many come first that are tensors, and that launches have
 * others of. The i-th argument of the function is word[place[i]], in its low bytes. */
typedef struct {
    PyObject_HEAD
    PyObject *name, *keeps;
    launch_function launch;
    get_function get_context;
    set_function set_context;
    stream_function stream;
    void *function, *context;
    int32_t device;
    unsigned threads, shared, words, pointers, changing;
    uint8_t place[WORDS];
    uint64_t word[WORDS];
} kernel_t;

static void point_at_words(kernel_t *kernel, void **arguments) {
    for (unsigned i = 0; i < kernel->words; i++) arguments[i] = &kernel->word[kernel->place[i]];
}

/* The thread may use another device, or none so far: then *elsewhere, and `leave` is to be called. */
static int enter(const kernel_t *kernel, void **context, int *elsewhere) {
    int status = kernel->get_context(context);
    *elsewhere = !status && *context != kernel->context;
    return *elsewhere ? kernel->set_context(kernel->context) : status;
}

static void leave(const kernel_t *kernel, void *context, int elsewhere) {
    if (elsewhere) kernel->set_context(context);
}

static int refused(const kernel_t *kernel, int status) {
    PyErr_Format(PyExc_RuntimeError, "the CUDA driver does not launch %U on device %d: error %d",
                 kernel->name, (int)kernel->device, status);
    return -1;
}

/* -1 with an error, or 0. The driver copies the words before this returns; it may have to wait for
 * room in a queue, which other threads may have to make: so they run meanwhile. */
static int start(kernel_t *const *kernels, const unsigned *programs, int many, void *stream) {
    void *context = NULL;
    int status, elsewhere, at = 0;
    Py_BEGIN_ALLOW_THREADS
    status = enter(kernels[0], &context, &elsewhere);
    for (; !status && at < many; at++) {
        kernel_t *kernel = kernels[at];
        void *arguments[WORDS];
        point_at_words(kernel, arguments);
        status = kernel->launch(kernel->function, programs[at], 1, 1, kernel->threads, 1, 1,
                                kernel->shared, stream, arguments, NULL);
    }
    leave(kernels[0], context, elsewhere);
    Py_END_ALLOW_THREADS
    return status ? refused(kernels[at ? at - 1 : 0], status) : 0;
}

/* ---- Kernel --------------------------------------------------------------------------------- */

static void *as_pointer(unsigned long long address) { return (void *)(uintptr_t)address; }

static PyObject *kernel_new(PyTypeObject *type, PyObject *arguments, PyObject *named) {
    (void)named;
    unsigned long long launch, get, set, stream, function, context;
    int device;
    unsigned threads, shared, pointers, changing;
    PyObject *name, *keeps, *words;
    const char *place;
    Py_ssize_t places;
    if (!PyArg_ParseTuple(arguments, "UO(KKKK)iKKIIIIy#O!", &name, &keeps, &launch, &get, &set,
                          &stream, &device, &function, &context, &threads, &shared, &pointers,
                          &changing, &place, &places, &PyTuple_Type, &words))
        return NULL;
    Py_ssize_t many = PyTuple_Size(words);
    if (places > WORDS || many > WORDS || pointers > changing || changing > (unsigned)many)
        return PyErr_Format(PyExc_ValueError, "a kernel with more than %d arguments", WORDS);
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    kernel_t *kernel = (kernel_t *)allocate(type, 0);
    if (!kernel) return NULL;
    Py_INCREF(name);
    Py_INCREF(keeps);
    kernel->name = name;
    kernel->keeps = keeps;
    kernel->launch = (launch_function)as_pointer(launch);
    kernel->get_context = (get_function)as_pointer(get);
    kernel->set_context = (set_function)as_pointer(set);
    kernel->stream = stream ? (stream_function)as_pointer(stream) : api->stream;
    kernel->device = device;
    kernel->function = as_pointer(function);
    kernel->context = as_pointer(context);
    kernel->threads = threads;
    kernel->shared = shared;
    kernel->words = (unsigned)places;
    kernel->pointers = pointers;
    kernel->changing = changing;
    memcpy(kernel->place, place, (size_t)places);
    for (Py_ssize_t i = 0; i < many; i++) {
        kernel->word[i] = PyLong_AsUnsignedLongLongMask(PyTuple_GetItem(words, i));
        if (PyErr_Occurred()) {
            Py_DECREF(kernel);
            return NULL;
        }
    }
    return (PyObject *)kernel;
}

static void kernel_free(PyObject *self) {
    kernel_t *kernel = (kernel_t *)self;
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(kernel->name);
    Py_XDECREF(kernel->keeps);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyObject *kernel_launch(PyObject *self, PyObject *const *values, Py_ssize_t many) {
    kernel_t *kernel = (kernel_t *)self;
    if (many != 1 + (Py_ssize_t)kernel->changing)
        return PyErr_Format(PyExc_TypeError, "%U changes in %u arguments, not in %zd", kernel->name,
                            kernel->changing, many - 1);
    unsigned programs = (unsigned)PyLong_AsUnsignedLongMask(values[0]);
    for (unsigned i = 0; i < kernel->changing; i++) {
        PyObject *value = values[1 + i];
        if (i >= kernel->pointers) {
            kernel->word[i] = PyLong_AsUnsignedLongLongMask(value);
            continue;
        }
        tensor_t tensor;
        if (!read_tensor(value, &tensor) || address_of(&tensor) % ALIGNMENT) Py_RETURN_FALSE;
        kernel->word[i] = address_of(&tensor);
    }
    void *stream = NULL;
    if (PyErr_Occurred() || kernel->stream(GPU, kernel->device, &stream) ||
        start(&kernel, &programs, 1, stream))
        return NULL;
    Py_RETURN_TRUE;
}

static PyMethodDef kernel_methods[] = {
    {"launch", (PyCFunction)(void (*)(void))kernel_launch, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot kernel_slots[] = {
    {Py_tp_new, kernel_new},
    {Py_tp_dealloc, kernel_free},
    {Py_tp_methods, kernel_methods},
    {0, NULL},
};
static PyType_Spec kernel_spec = {
    .name = "flexpert.comm.cuda._launches.Kernel",
    .basicsize = sizeof(kernel_t),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = kernel_slots,
};
static PyTypeObject *kernel_type;

/* ---- Call ----------------------------------------------------------------------------------- */

typedef struct {
    dtype_t dtype;
    int32_t device, index, dimensions;
    int64_t sizes[SIZES];
} wanted_t;

/* least(max(tokens, 1) * each, most) + more programs. from: of each word, a tensor or above. */
typedef struct {
    int64_t each, most, more;
    int from[WORDS];
} launch_t;

/* quiet: words of memory that must be 0 for the call to do anything. executable: a graph of the
 * launches, or NULL; what its nodes have are the words and numbers of programs of the last time. */
typedef struct {
    PyObject_HEAD
    const volatile int64_t *quiet, *stop;
    unsigned quiet_words;
    int64_t most_tokens, most_rows;
    int tensors, launches;
    wanted_t wanted[TENSORS];
    kernel_t *kernels[LAUNCHES];
    launch_t launch[LAUNCHES];
    uint64_t constant[LAUNCHES][WORDS];
    graph_functions driver;
    void *graph, *executable, *node[LAUNCHES];
    PyObject *give_back;
    unsigned last_programs[LAUNCHES];
    uint64_t last[LAUNCHES][WORDS];
} call_t;

static node_t node_of(kernel_t *kernel, unsigned programs, void **arguments) {
    point_at_words(kernel, arguments);
    return (node_t){kernel->function, {programs, 1, 1}, {kernel->threads, 1, 1},
                    kernel->shared, arguments, NULL};
}

/* As `start`, by one launch of the graph. */
static int start_graph(call_t *call, const unsigned *programs, void *stream) {
    const kernel_t *first = call->kernels[0];
    void *context = NULL;
    int status, elsewhere;
    Py_BEGIN_ALLOW_THREADS
    status = enter(first, &context, &elsewhere);
    for (int i = 0; !status && i < call->launches; i++) {
        kernel_t *kernel = call->kernels[i];
        size_t size = kernel->changing * sizeof(uint64_t);
        if (programs[i] == call->last_programs[i] && !memcmp(call->last[i], kernel->word, size))
            continue;
        void *arguments[WORDS];
        node_t node = node_of(kernel, programs[i], arguments);
        status = call->driver.update(call->executable, call->node[i], &node);
        memcpy(call->last[i], kernel->word, size);
        call->last_programs[i] = status ? 0 : programs[i];
    }
    if (!status) status = call->driver.launch(call->executable, stream);
    leave(first, context, elsewhere);
    Py_END_ALLOW_THREADS
    return status ? refused(first, status) : 0;
}

static int read_wanted(PyObject *item, wanted_t *wanted) {
    unsigned char code, bits;
    PyObject *sizes;
    if (!PyArg_ParseTuple(item, "bbiiO!", &code, &bits, &wanted->device, &wanted->index,
                          &PyTuple_Type, &sizes))
        return -1;
    wanted->dtype = (dtype_t){code, bits, 1};
    wanted->dimensions = (int32_t)PyTuple_Size(sizes);
    if (wanted->dimensions > SIZES) {
        PyErr_Format(PyExc_ValueError, "a tensor of more than %d dimensions", SIZES);
        return -1;
    }
    for (int i = 0; i < wanted->dimensions; i++)
        wanted->sizes[i] = PyLong_AsLongLong(PyTuple_GetItem(sizes, i));
    return PyErr_Occurred() ? -1 : 0;
}

static int read_launch(PyObject *item, call_t *call, int at) {
    launch_t *launch = &call->launch[at];
    PyObject *kernel, *from;
    long long each, most, more;
    if (!PyArg_ParseTuple(item, "O!LLLO!", kernel_type, &kernel, &each, &most, &more,
                          &PyTuple_Type, &from))
        return -1;
    Py_INCREF(kernel);
    call->kernels[at] = (kernel_t *)kernel;
    launch->each = each, launch->most = most, launch->more = more;
    unsigned changing = call->kernels[at]->changing;
    if ((unsigned)PyTuple_Size(from) != changing) {
        PyErr_Format(PyExc_ValueError, "%U changes in %u arguments", call->kernels[at]->name,
                     changing);
        return -1;
    }
    for (unsigned i = 0; i < changing; i++) {
        int source;
        unsigned long long constant;
        if (!PyArg_ParseTuple(PyTuple_GetItem(from, i), "iK", &source, &constant)) return -1;
        if (source < CONSTANT || source >= call->tensors) {
            PyErr_Format(PyExc_ValueError, "no tensor %d", source);
            return -1;
        }
        launch->from[i] = source;
        call->constant[at][i] = constant;
    }
    return 0;
}

static PyObject *call_new(PyTypeObject *type, PyObject *arguments, PyObject *named) {
    (void)named;
    unsigned long long quiet, stop;
    unsigned words;
    long long most_tokens, most_rows;
    PyObject *tensors, *launches;
    if (!PyArg_ParseTuple(arguments, "KIKLLO!O!", &quiet, &words, &stop, &most_tokens, &most_rows,
                          &PyTuple_Type, &tensors, &PyTuple_Type, &launches))
        return NULL;
    Py_ssize_t many = PyTuple_Size(tensors), kernels = PyTuple_Size(launches);
    if (many > TENSORS || kernels > LAUNCHES || kernels < 1)
        return PyErr_Format(PyExc_ValueError, "a call of %zd tensors and %zd launches", many,
                            kernels);
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    call_t *call = (call_t *)allocate(type, 0);
    if (!call) return NULL;
    call->quiet = as_pointer(quiet);
    call->quiet_words = words;
    call->stop = as_pointer(stop);
    call->most_tokens = most_tokens;
    call->most_rows = most_rows;
    for (; call->tensors < many; call->tensors++)
        if (read_wanted(PyTuple_GetItem(tensors, call->tensors), &call->wanted[call->tensors]))
            goto failed;
    for (; call->launches < kernels; call->launches++)
        if (read_launch(PyTuple_GetItem(launches, call->launches), call, call->launches))
            goto failed;
    return (PyObject *)call;
failed:
    Py_DECREF(call);
    return NULL;
}

/* From a finaliser, which must not lose an error that is on its way. */
static void give_graph_back(PyObject *give_back, void *executable, void *graph) {
    PyObject *kind, *value, *trace;
    PyErr_Fetch(&kind, &value, &trace);
    PyObject *done = PyObject_CallFunction(give_back, "KK", (unsigned long long)(uintptr_t)executable,
                                           (unsigned long long)(uintptr_t)graph);
    if (done) Py_DECREF(done);
    else PyErr_Clear();
    PyErr_Restore(kind, value, trace);
}

static void call_free(PyObject *self) {
    call_t *call = (call_t *)self;
    PyTypeObject *type = Py_TYPE(self);
    for (int i = 0; i < LAUNCHES; i++) Py_XDECREF((PyObject *)call->kernels[i]);
    if (call->executable) give_graph_back(call->give_back, call->executable, call->graph);
    Py_XDECREF(call->give_back);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

/* Whether a tensor is what is wanted; finds *tokens if that is negative. rows: of a tensor that has
 * a row for each that came, or for as many as can come. */
static int fits(const tensor_t *tensor, const wanted_t *wanted, int64_t *tokens, int64_t rows,
                const call_t *call) {
    if (memcmp(&tensor->dtype, &wanted->dtype, sizeof(dtype_t)) ||
        tensor->device != wanted->device || tensor->index != wanted->index ||
        tensor->dimensions != wanted->dimensions || !is_contiguous(tensor))
        return 0;
    for (int i = 0; i < wanted->dimensions; i++) {
        int64_t size = tensor->sizes[i], desired = wanted->sizes[i];
        if (desired == TOKENS) {
            if (*tokens < 0 && size <= call->most_tokens) *tokens = size;
            if (size != *tokens) return 0;
        } else if (desired == ROWS) {
            if (size != rows && size != call->most_rows) return 0;
        } else if (size != desired) {
            return 0;
        }
    }
    return address_of(tensor) % ALIGNMENT == 0;
}

/* run(tokens, rows, *tensors): the number of tokens, which is that of the tensors if a negative one
 * is given; -1: something is not as it is wanted, and nothing was done. */
static PyObject *call_run(PyObject *self, PyObject *const *values, Py_ssize_t many) {
    call_t *call = (call_t *)self;
    if (many != 2 + call->tensors)
        return PyErr_Format(PyExc_TypeError, "run takes %d tensors, not %zd", call->tensors,
                            many - 2);
    int64_t tokens = PyLong_AsLongLong(values[0]), rows = PyLong_AsLongLong(values[1]), any = 0;
    if (PyErr_Occurred()) return NULL;
    for (unsigned i = 0; i < call->quiet_words; i++) any |= call->quiet[i];
    if (any || *call->stop) return PyLong_FromLong(-1);
    uint64_t addresses[TENSORS];
    for (int i = 0; i < call->tensors; i++) {
        tensor_t tensor;
        if (!read_tensor(values[2 + i], &tensor) ||
            !fits(&tensor, &call->wanted[i], &tokens, rows, call))
            return PyLong_FromLong(-1);
        addresses[i] = address_of(&tensor);
    }
    unsigned programs[LAUNCHES];
    for (int i = 0; i < call->launches; i++) {
        kernel_t *kernel = call->kernels[i];
        const launch_t *launch = &call->launch[i];
        for (unsigned at = 0; at < kernel->changing; at++) {
            int from = launch->from[at];
            kernel->word[at] = from >= 0          ? addresses[from]
                               : from == CONSTANT ? call->constant[i][at]
                                                  : (uint64_t)tokens;
        }
        int64_t busy = (tokens > 1 ? tokens : 1) * launch->each;
        programs[i] = (unsigned)((busy < launch->most ? busy : launch->most) + launch->more);
    }
    const kernel_t *first = call->kernels[0];
    void *stream = NULL;
    if (first->stream(GPU, first->device, &stream)) return NULL;
    int captured = 0;
    if (call->executable && call->driver.capturing(stream, &captured)) captured = 1;
    int failed = call->executable && !captured
                     ? start_graph(call, programs, stream)
                     : start(call->kernels, programs, call->launches, stream);
    return failed ? NULL : PyLong_FromLongLong(tokens);
}

/* arm(functions, give_back): launch a graph from now on, but where the stream is captured; the
 * driver's answer, 0 if that can be. give_back: is called with the executable graph (or 0) and the
 * graph, which are to be destroyed. */
static PyObject *call_arm(PyObject *self, PyObject *arguments) {
    call_t *call = (call_t *)self;
    unsigned long long f[GRAPH_FUNCTIONS];
    PyObject *give_back;
    if (!PyArg_ParseTuple(arguments, "(KKKKKK)O", &f[0], &f[1], &f[2], &f[3], &f[4], &f[5],
                          &give_back))
        return NULL;
    if (call->executable) return PyLong_FromLong(0);
    void *functions[GRAPH_FUNCTIONS];
    for (int i = 0; i < GRAPH_FUNCTIONS; i++) functions[i] = as_pointer(f[i]);
    memcpy(&call->driver, functions, sizeof functions);
    const kernel_t *first = call->kernels[0];
    void *context = NULL, *graph = NULL, *executable = NULL;
    int elsewhere, status = enter(first, &context, &elsewhere);
    if (!status) status = call->driver.create(&graph, 0);
    for (int i = 0; !status && i < call->launches; i++) {
        void *words[WORDS];
        node_t node = node_of(call->kernels[i], 1, words);
        status = call->driver.add(&call->node[i], graph, i ? &call->node[i - 1] : NULL, i > 0,
                                  &node);
        call->last_programs[i] = 0; /* so that the first launch updates it */
    }
    if (!status) status = call->driver.instantiate(&executable, graph, 0);
    leave(first, context, elsewhere);
    if (!status) {
        Py_INCREF(give_back);
        call->give_back = give_back;
        call->graph = graph;
        call->executable = executable;
    } else if (graph) {
        give_graph_back(give_back, NULL, graph);
    }
    return PyLong_FromLong(status);
}

static PyMethodDef call_methods[] = {
    {"run", (PyCFunction)(void (*)(void))call_run, METH_FASTCALL, NULL},
    {"arm", call_arm, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot call_slots[] = {
    {Py_tp_new, call_new},
    {Py_tp_dealloc, call_free},
    {Py_tp_methods, call_methods},
    {0, NULL},
};
static PyType_Spec call_spec = {
    .name = "flexpert.comm.cuda._launches.Call",
    .basicsize = sizeof(call_t),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = call_slots,
};

/* ---- the module ----------------------------------------------------------------------------- */

static PyObject *use_tensors(PyObject *module, PyObject *type) {
    (void)module;
    PyObject *capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
    if (!capsule) return NULL;
    const tensor_api *offered = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    Py_DECREF(capsule);
    if (!offered) return NULL;
    if (offered->major != 1 || !offered->view || !offered->stream)
        return PyErr_Format(PyExc_ValueError, "DLPack %u.%u", offered->major, offered->minor);
    api = offered;
    Py_INCREF(type);
    tensor_type = (PyTypeObject *)type;
    Py_RETURN_NONE;
}

static PyObject *describe(PyObject *module, PyObject *object) {
    (void)module;
    tensor_t tensor;
    if (!api || !read_tensor(object, &tensor) || tensor.dtype.lanes != 1)
        return PyErr_Format(PyExc_TypeError, "no tensor that can be read here");
    PyObject *sizes = PyTuple_New(tensor.dimensions);
    for (int i = 0; sizes && i < tensor.dimensions; i++)
        PyTuple_SetItem(sizes, i, PyLong_FromLongLong(tensor.sizes[i]));
    return Py_BuildValue("(iiiiN)", tensor.dtype.code, tensor.dtype.bits, tensor.device,
                         tensor.index, sizes);
}

static PyMethodDef functions[] = {
    {"use_tensors", use_tensors, METH_O, NULL},
    {"describe", describe, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_launches",
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__launches(void) {
    PyObject *module = PyModule_Create(&definition);
    if (!module) return NULL;
    kernel_type = (PyTypeObject *)PyType_FromSpec(&kernel_spec);
    PyObject *call_type = PyType_FromSpec(&call_spec);
    if (!kernel_type || !call_type ||
        PyModule_AddObjectRef(module, "Kernel", (PyObject *)kernel_type) ||
        PyModule_AddObjectRef(module, "Call", call_type)) {
        Py_DECREF(module);
        return NULL;
    }
    Py_DECREF(call_type);
    return module;
}
