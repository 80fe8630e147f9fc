// A call of a small op spends as long in Python as in its kernel: 7 us where the caches hold the interpreter's own data, and twice
// that behind a kernel that streamed weights through them. What is here serves a whole call, from the arguments of the public
// function to its output, where everything is as in decoding: plain tensors on the CPU that lie as the kernel reads them, nothing
// to differentiate, and nobody who watches or replaces calls. Any other call is answered by NotImplemented, wrong ones too, and
// the caller goes the long way, which serves it or says what is wrong with it. So a condition here may be narrower than those of
// the op's Python, never wider.
//
// Tensors are read through DLPack's table, so this knows no torch either; outputs are made by the tensors' own `new_empty`.
#include "at_once.h"

#include <cmath>
#include <new>
#include <stdexcept>

#include "arguments.h"
#include "checks.h"
#include "dlpack.h"

namespace py = pybind11;

namespace {

// More rows reuse each weight enough for a matrix product that blocks for the caches to be faster.
constexpr int64_t LINEAR_MAX_ROWS = 8;

// What at_once_setup was given; held for the life of the process.
struct Framework {
    const dlpack::ExchangeApi* api;
    PyObject* types;     // of tensors that nobody has overridden
    PyObject* watchers;  // callables; one that says anything but 0 or False may see or replace calls
    PyObject* forward_ad;
    PyObject *is_grad_enabled, *thread_count;
    PyObject* dtypes;  // in the order of Type
    PyObject *new_empty, *dtype_names, *requires_grad, *is_neg, *current_level;
};
Framework* framework = nullptr;

// Thrown where the call is not for us, or, with a Python error set, where it failed.
struct NotOurs {};

struct Owned {
    PyObject* object;
    explicit Owned(PyObject* o) : object(o) {
        if (o == nullptr) throw NotOurs();
    }
    ~Owned() { Py_XDECREF(object); }
    Owned(const Owned&) = delete;
    Owned& operator=(const Owned&) = delete;
    PyObject* release() {
        PyObject* o = object;
        object = nullptr;
        return o;
    }
};

void require(bool condition) {
    if (!condition) throw NotOurs();
}

bool is_true(PyObject* callable) {
    Owned answer(PyObject_CallNoArgs(callable));
    return answer.object != Py_False && (answer.object == Py_True || PyObject_IsTrue(answer.object) != 0);
}

bool is_watched() {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(framework->watchers); i++)
        if (is_true(PyTuple_GET_ITEM(framework->watchers, i))) return true;
    Owned level(PyObject_GetAttr(framework->forward_ad, framework->current_level));
    return PyLong_AsLong(level.object) >= 0;
}

// A tensor of the call; `t.data` is null where None was given.
struct View {
    PyObject* object;
    dlpack::Tensor t;

    bool is_given() const { return t.data != nullptr; }
    int dimensions() const { return t.dimensions; }
    int64_t size(int i) const { return t.shape[i]; }
    int64_t stride(int i) const { return t.strides[i]; }
    uintptr_t address() const { return t.data == nullptr ? 0 : reinterpret_cast<uintptr_t>(t.data) + t.byte_offset; }

    int type() const {
        auto is = [&](dlpack::Code code, int bits) { return t.lanes == 1 && t.code == code && t.bits == bits; };
        if (is(dlpack::FLOAT, 32)) return static_cast<int>(Type::FLOAT32);
        if (is(dlpack::BFLOAT, 16)) return static_cast<int>(Type::BFLOAT16);
        if (is(dlpack::FLOAT, 16)) return static_cast<int>(Type::FLOAT16);
        if (is(dlpack::INT, 8)) return static_cast<int>(Type::INT8);
        return -1;
    }
    bool is_float() const { return type() == static_cast<int>(Type::FLOAT32); }
    // float32, bfloat16 or float16.
    bool is_floating() const { return type() >= 0 && type() != static_cast<int>(Type::INT8); }
    bool is_integer(int bits) const { return t.lanes == 1 && t.code == dlpack::INT && t.bits == bits; }

    // No gaps, and unit stride at the end however long that is.
    bool is_packed() const {
        int64_t expected = 1;
        for (int i = t.dimensions - 1; i >= 0; i--) {
            if (t.strides[i] != expected && (t.shape[i] != 1 || i == t.dimensions - 1)) return false;
            expected *= t.shape[i];
        }
        return t.dimensions > 0 && expected > 0;
    }
    bool is_vector(int64_t n) const { return t.dimensions == 1 && t.shape[0] == n && is_packed(); }
    bool has_shape_of(const View& other) const {
        if (t.dimensions != other.t.dimensions) return false;
        for (int i = 0; i < t.dimensions; i++)
            if (t.shape[i] != other.t.shape[i]) return false;
        return true;
    }
    // (..., features) in rows of equal distance.
    bool has_rows() const { return is_packed() || (t.dimensions == 2 && t.strides[1] == 1 && t.shape[0] * t.shape[1] > 0); }
    int64_t row_stride() const { return t.dimensions == 2 ? t.strides[0] : t.shape[t.dimensions - 1]; }
    // (tokens, heads, head_dim), each head without gaps.
    bool has_heads() const {
        return t.dimensions == 3 && t.strides[2] == 1 && t.shape[0] * t.shape[1] * t.shape[2] > 0;
    }
    // Of all dimensions but the last.
    int64_t rows() const {
        int64_t n = 1;
        for (int i = 0; i + 1 < t.dimensions; i++) n *= t.shape[i];
        return n;
    }
};

// The arguments of one call, taken in order; the first is the backend.
class Call {
public:
    Call(PyObject* const* given, Py_ssize_t count, Py_ssize_t expected) : given_(given) {
        if (count != expected) {
            PyErr_Format(PyExc_TypeError, "takes %zd arguments, not %zd", expected, count);
            throw NotOurs();
        }
        PyObject* backend = next();
        require(framework != nullptr && PyUnicode_Check(backend) &&
            (PyUnicode_CompareWithASCIIString(backend, "auto") == 0 || PyUnicode_CompareWithASCIIString(backend, "native") == 0));
        require(!is_watched());
        needs_no_gradient_ = !is_true(framework->is_grad_enabled);
    }

    PyObject* next() { return *given_++; }

    View tensor() {
        View v{next(), {}};
        PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(v.object));
        bool is_plain = false;
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(framework->types); i++)
            is_plain = is_plain || type == PyTuple_GET_ITEM(framework->types, i);
        require(is_plain);
        // The memory of a view that negates holds the opposite.
        require(Owned(PyObject_VectorcallMethod(framework->is_neg, &v.object, 1, nullptr)).object == Py_False);
        if (!needs_no_gradient_) require(Owned(PyObject_GetAttr(v.object, framework->requires_grad)).object == Py_False);
        if (framework->api->describe(v.object, &v.t) != 0) {
            // A tensor that DLPack cannot describe is no plain memory; what the op makes of it, it says itself.
            PyErr_Clear();
            throw NotOurs();
        }
        require(v.t.device_type == dlpack::CPU && v.t.data != nullptr && v.t.strides != nullptr);
        return v;
    }

    View tensor_or_none() {
        if (*given_ != Py_None) return tensor();
        given_++;
        return {nullptr, {}};
    }

    void none() { require(next() == Py_None); }

    bool boolean() {
        PyObject* o = next();
        require(PyBool_Check(o));
        return o == Py_True;
    }

    double real() {
        PyObject* o = next();
        require(PyFloat_CheckExact(o));
        return PyFloat_AS_DOUBLE(o);
    }

    double real_or(double absent) {
        if (*given_ != Py_None) return real();
        given_++;
        return absent;
    }

private:
    PyObject* const* given_;
    bool needs_no_gradient_;
};

// like.new_empty(the shape of `like` with another last size), in the dtype of `type`.
struct Output : View {
    Owned made;

    Output(const View& like, int64_t last, int type) : View{nullptr, {}}, made(make(like, last, type)) {
        object = made.object;
        if (framework->api->describe(object, &t) != 0) throw NotOurs();
    }

    static PyObject* make(const View& like, int64_t last, int type) {
        int n = like.dimensions();
        Owned shape(PyTuple_New(n));
        for (int i = 0; i < n; i++)
            PyTuple_SET_ITEM(shape.object, i, Owned(PyLong_FromLongLong(i + 1 < n ? like.size(i) : last)).release());
        bool is_other = type != like.type();
        PyObject* given[] = {like.object, shape.object, is_other ? PyTuple_GET_ITEM(framework->dtypes, type) : nullptr};
        return PyObject_VectorcallMethod(framework->new_empty, given, 2, is_other ? framework->dtype_names : nullptr);
    }
};

template <class Arguments> void run(Arguments a, void (*kernel)(const Arguments&)) {
    Owned threads(PyObject_CallNoArgs(framework->thread_count));
    a.threads = static_cast<int>(PyLong_AsLong(threads.object));
    py::gil_scoped_release others_run;
    kernel(a);
}

// The op's check of the values of index tensors; what is wrong with them, its Python says.
template <class Arguments> void require_values(const Arguments& a, void (*check)(const Arguments&)) {
    try {
        check(a);
    } catch (const std::invalid_argument&) {
        throw NotOurs();
    }
}

// linear(x, weight, scale=, bias=)
PyObject* linear(Call& call) {
    View x = call.tensor(), weight = call.tensor(), scale = call.tensor_or_none(), bias = call.tensor_or_none();
    require(x.is_floating() && x.has_rows() && x.rows() <= LINEAR_MAX_ROWS);
    require(weight.type() >= 0 && weight.dimensions() == 2 && weight.is_packed());
    int64_t outputs = weight.size(0), inputs = weight.size(1);
    require(x.size(x.dimensions() - 1) == inputs && scale.is_given() == (weight.type() == static_cast<int>(Type::INT8)));
    for (const View* each : {&scale, &bias}) require(!each->is_given() || (each->is_float() && each->is_vector(outputs)));
    Output y(x, outputs, x.type());
    run(arguments::linear(x.address(), weight.address(), scale.address(), bias.address(), y.address(), x.rows(), inputs, outputs,
                          x.row_stride(), inputs, x.type(), weight.type()),
        +[](const Linear& a) { kernels().linear(a); });
    return y.made.release();
}

// rms_norm(x, weight, residual=, eps=, dtype=), y or (y, h)
PyObject* rms_norm(Call& call) {
    View x = call.tensor(), weight = call.tensor(), residual = call.tensor_or_none();
    double eps = call.real();
    PyObject* dtype = call.next();
    require(x.is_floating() && x.has_rows() && eps > 0);
    int64_t features = x.size(x.dimensions() - 1);
    require(weight.is_vector(features) && (weight.is_float() || weight.type() == x.type()));
    // Beside a float32 x, and no other, a residual or y may be a half.
    auto fits = [&](int type) { return type == x.type() || x.is_float(); };
    int y_type = x.type();
    if (dtype != Py_None) {
        for (y_type = 0; y_type < PyTuple_GET_SIZE(framework->dtypes); y_type++)
            if (dtype == PyTuple_GET_ITEM(framework->dtypes, y_type)) break;
        require(y_type < PyTuple_GET_SIZE(framework->dtypes) && fits(y_type));
    }
    if (residual.is_given())
        require(residual.is_floating() && residual.has_shape_of(x) && residual.has_rows() && fits(residual.type()));
    auto norm = [&](const View& y, const View& h) {
        run(arguments::rms_norm_forward(x.address(), residual.address(), weight.address(), y.address(), h.address(), x.rows(),
                                        features, x.row_stride(), residual.is_given() ? residual.row_stride() : 0,
                                        static_cast<float>(eps), x.type(), weight.type(),
                                        residual.is_given() ? residual.type() : x.type(), y_type),
            +[](const RmsNormForward& a) { kernels().rms_norm_forward(a); });
    };
    Output y(x, features, y_type);
    if (!residual.is_given()) {
        norm(y, {nullptr, {}});
        return y.made.release();
    }
    Output h(x, features, x.type());
    norm(y, h);
    return PyTuple_Pack(2, y.object, h.object);
}

// scaled_add(x, branch, alpha)
PyObject* scaled_add(Call& call) {
    View x = call.tensor(), branch = call.tensor(), alpha = call.tensor();
    require(x.is_floating() && x.is_packed() && branch.is_floating() && branch.has_shape_of(x) && branch.is_packed());
    require((branch.type() == x.type() || x.is_float()) && alpha.is_float() && alpha.is_vector(1));
    int64_t features = x.size(x.dimensions() - 1);
    Output h(x, features, x.type());
    run(arguments::scaled_add(x.address(), branch.address(), alpha.address(), h.address(), x.rows() * features, x.type(),
                              branch.type()),
        +[](const ScaledAdd& a) { kernels().scaled_add(a); });
    return h.made.release();
}

// What paged_append and paged_attention share: x (tokens, heads, head_dim), and the caches in its dtype.
struct Paged {
    View x, k_cache, v_cache;

    void require_caches() const {
        require(x.is_floating() && x.has_heads());
        for (const View* cache : {&k_cache, &v_cache})
            require(cache->type() == x.type() && cache->dimensions() == 4 && cache->size(0) > 0 && cache->size(1) > 0 &&
                cache->size(2) > 0 && cache->size(3) == x.size(2) && cache->stride(3) == 1);
        require(k_cache.has_shape_of(v_cache));
    }

    void require_tables(const View& cos, const View& sin) const {
        require(cos.is_given() == sin.is_given());
        if (!cos.is_given()) return;
        require(cos.is_float() && sin.is_float() && cos.dimensions() == 2 && cos.has_shape_of(sin) && cos.is_packed() &&
            sin.is_packed() && x.size(2) == 2 * cos.size(1));
    }

    static arguments::Strides strides(const View& cache) { return {cache.stride(0), cache.stride(1), cache.stride(2)}; }
    static int64_t positions(const View& cos) { return cos.is_given() ? cos.size(0) : 0; }
};

// paged_append(k, v, k_cache, v_cache, slot_mapping, positions=, cos=, sin=, interleaved=, k_scale=, v_scale=)
PyObject* paged_append(Call& call) {
    View k = call.tensor(), v = call.tensor();
    Paged paged{k, call.tensor(), call.tensor()};
    View slot_mapping = call.tensor(), positions = call.tensor_or_none(), cos = call.tensor_or_none(), sin = call.tensor_or_none();
    bool interleaved = call.boolean();
    call.none();
    call.none();
    paged.require_caches();
    paged.require_tables(cos, sin);
    const View &k_cache = paged.k_cache, &v_cache = paged.v_cache;
    int64_t tokens = k.size(0), heads = k.size(1), head_dim = k.size(2);
    require(v.type() == k.type() && v.has_shape_of(k) && v.has_heads() && heads == k_cache.size(2));
    require(slot_mapping.is_integer(64) && slot_mapping.is_vector(tokens));
    require(positions.is_given() ? positions.is_integer(64) && positions.is_vector(tokens) : !cos.is_given());
    PagedAppend a = arguments::paged_append(
        k.address(), v.address(), k_cache.address(), Paged::strides(k_cache), v_cache.address(), Paged::strides(v_cache),
        slot_mapping.address(), positions.address(), cos.address(), sin.address(), interleaved, tokens, heads, head_dim,
        k_cache.size(1), k_cache.size(0), Paged::positions(cos), k.stride(0), k.stride(1), v.stride(0), v.stride(1), k.type());
    require_values(a, check_paged_append);
    run(a, +[](const PagedAppend& appended) { kernels().paged_append(appended); });
    Py_RETURN_NONE;
}

// paged_attention(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, cos=, sin=, interleaved=, softmax_scale=, window=,
// alibi_slopes=, k_scale=, v_scale=)
PyObject* paged_attention(Call& call) {
    View q = call.tensor();
    Paged paged{q, call.tensor(), call.tensor()};
    View block_table = call.tensor(), seq_lens = call.tensor(), bounds = call.tensor();
    View cos = call.tensor_or_none(), sin = call.tensor_or_none();
    bool interleaved = call.boolean();
    paged.require_caches();
    double softmax_scale = call.real_or(1 / std::sqrt(static_cast<double>(q.size(2))));
    PyObject* window = call.next();
    View alibi_slopes = call.tensor_or_none();
    call.none();
    call.none();
    paged.require_tables(cos, sin);
    const View &k_cache = paged.k_cache, &v_cache = paged.v_cache;
    int64_t rows = q.size(0), heads = q.size(1), head_dim = q.size(2), kv_heads = k_cache.size(2);
    require(heads % kv_heads == 0 && block_table.dimensions() == 2 && block_table.is_integer(32) && block_table.is_packed());
    int64_t sequences = block_table.size(0), max_blocks = block_table.size(1);
    require(seq_lens.is_integer(32) && seq_lens.is_vector(sequences) && bounds.is_integer(32) && bounds.is_vector(sequences + 1));
    require(!alibi_slopes.is_given() || (alibi_slopes.is_float() && alibi_slopes.is_vector(heads)));
    long long seen = 0;
    if (window != Py_None) {
        require(PyLong_CheckExact(window));
        seen = PyLong_AsLongLong(window);
        require(seen >= 1);
    }
    PagedAttention a = arguments::paged_attention(
        q.address(), k_cache.address(), Paged::strides(k_cache), v_cache.address(), Paged::strides(v_cache), block_table.address(),
        seq_lens.address(), bounds.address(), alibi_slopes.address(), 0, cos.address(), sin.address(), interleaved, rows, sequences,
        heads, kv_heads, head_dim, k_cache.size(1), k_cache.size(0), max_blocks, Paged::positions(cos), block_table.stride(0),
        q.stride(0), q.stride(1), seen, static_cast<float>(softmax_scale), q.type());
    // The kernel's check passes over sequences without new tokens and rows that belong to none; the op's own does not.
    require(a.cu_seqlens_q[sequences] == rows);
    for (int64_t b = 0; b < sequences; b++) require(a.cu_seqlens_q[b] < a.cu_seqlens_q[b + 1]);
    require_values(a, check_paged_attention);
    Output o(q, head_dim, q.type());
    a.o = arguments::at<void>(o.address());
    run(a, +[](const PagedAttention& attended) { kernels().paged_attention(attended); });
    return o.made.release();
}

template <PyObject* (*serve)(Call&), Py_ssize_t COUNT> PyObject* entry(PyObject*, PyObject* const* given, Py_ssize_t count) {
    try {
        Call call(given, count, COUNT + 1);
        return serve(call);
    } catch (const NotOurs&) {
        if (PyErr_Occurred()) return nullptr;
        Py_RETURN_NOTIMPLEMENTED;
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
}

// Bare functions of Python's own kind: pybind11's take as long to unpack a call as all the rest here.
template <PyObject* (*serve)(Call&), Py_ssize_t COUNT> PyMethodDef method(const char* name) {
    auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&entry<serve, COUNT>));
    return {name, function, METH_FASTCALL, "(backend, the op's arguments in order): its output, or NotImplemented"};
}

PyMethodDef METHODS[] = {
    method<linear, 4>("linear_at_once"), method<rms_norm, 5>("rms_norm_at_once"), method<scaled_add, 3>("scaled_add_at_once"),
    method<paged_append, 11>("paged_append_at_once"), method<paged_attention, 14>("paged_attention_at_once"),
};

// False where this torch has no table that we can read; then every call is answered by NotImplemented.
bool setup(py::object capsule, py::tuple types, py::tuple watchers, py::object forward_ad, py::object is_grad_enabled,
           py::object thread_count, py::tuple dtypes) {
    const auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::CAPSULE));
    if (api == nullptr) throw py::error_already_set();
    if (api->major != dlpack::MAJOR || api->describe == nullptr) return false;
    auto held = [](py::object o) { return o.release().ptr(); };
    auto name = [](const char* s) { return PyUnicode_InternFromString(s); };
    // A second copy of the package sets it up alike; what the first one gave may still be in use.
    framework = new Framework{api, held(types), held(watchers), held(forward_ad), held(is_grad_enabled), held(thread_count),
                              held(dtypes), name("new_empty"), held(py::make_tuple("dtype")), name("requires_grad"),
                              name("is_neg"), name("_current_level")};
    return true;
}

}  // namespace

void add_at_once(py::module_& module) {
    module.attr("linear_max_rows") = LINEAR_MAX_ROWS;
    module.def("at_once_setup", &setup);
    for (PyMethodDef& m : METHODS) {
        PyObject* function = PyCFunction_NewEx(&m, nullptr, module.attr("__name__").ptr());
        if (function == nullptr) throw py::error_already_set();
        module.add_object(m.ml_name, py::reinterpret_steal<py::object>(function));
    }
}
