// Root-mean-square normalization with an optional residual; the definition is rms_norm.py's reference.
//
// Forward reads x (and residual) and writes y (and h). Backward reads h and dy, recomputes the root, and writes dh; a row stays
// in the first cache between its two passes. The weight's gradient is added up like damped_sine's: blocks of rows in slabs that
// follow from the number of rows alone.
#include <math.h>

#include "../kernels.h"
#include "../memory.h"
#include "../threads.h"
#include "simd.h"

namespace PSANN_NAMESPACE {
namespace {

constexpr int64_t BLOCK_ROWS = 64;
constexpr int64_t MAX_SLABS = 32;
constexpr int64_t GRAIN = 1 << 14;  // elements below which one thread is faster

static const float* as_floats(const void* p, Type type, int64_t count, Workspace& converted) {
    if (type == Type::FLOAT32) return static_cast<const float*>(p);
    for (int64_t i = 0; i < count; i++)
        converted.data[i] =
            type == Type::BFLOAT16 ? scalar(static_cast<const bf16*>(p)[i]) : scalar(static_cast<const fp16*>(p)[i]);
    return converted.data;
}

// T: of x and h; R: of the residual; Y: of y.
template <class T, class R, class Y> static void forward(const RmsNormForward& a) {
    const T* x = static_cast<const T*>(a.x);
    const R* residual = static_cast<const R*>(a.residual);
    Y* y = static_cast<Y*>(a.y);
    T* h = static_cast<T*>(a.h);
    Workspace converted(a.features);
    const float* weight = as_floats(a.weight, a.weight_type, a.features, converted);
    int64_t piece_rows = GRAIN / 4 / a.features + 1;
    parallel(a.rows * a.features < GRAIN ? 1 : a.threads, (a.rows + piece_rows - 1) / piece_rows, [&](int64_t piece) {
        int64_t end = (piece + 1) * piece_rows < a.rows ? (piece + 1) * piece_rows : a.rows;
        for (int64_t r = piece * piece_rows; r < end; r++) {
            const T* from = x + r * a.x_stride;
            float squares[1];
            sum_row(a.features, [&](int64_t c, int64_t count, Float (&out)[1]) INLINE_LAMBDA {
                Float value = take(from + c, count);
                if (residual != nullptr) {
                    // What is normalized is the sum as it is stored.
                    value = rounded(value + take(residual + r * a.residual_stride + c, count), from);
                    give(h + r * a.features + c, value, count);
                }
                out[0] = value * value;
            }, squares);
            if (residual != nullptr) from = h + r * a.features;
            float root = 1.0f / sqrtf(squares[0] / static_cast<float>(a.features) + a.eps);
            each_vector(0, a.features, [&](int64_t c, int64_t count) INLINE_LAMBDA {
                give(y + r * a.features + c, take(from + c, count) * root * take(weight + c, count), count);
            });
        }
    });
}

template <class T, class R, class Y> static void backward(const RmsNormBackward& a) {
    const T *h = static_cast<const T*>(a.h), *dh_in = static_cast<const T*>(a.dh_in);
    const Y* dy = static_cast<const Y*>(a.dy);
    T* dh = static_cast<T*>(a.dh);
    R* dresidual = static_cast<R*>(a.dresidual);
    Workspace converted(a.features);
    const float* weight = as_floats(a.weight, a.weight_type, a.features, converted);
    int64_t blocks = (a.rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    int64_t slab_rows = (blocks + MAX_SLABS - 1) / MAX_SLABS * BLOCK_ROWS;
    int64_t slabs = (a.rows + slab_rows - 1) / slab_rows;
    Workspace partial(slabs * 2 * a.features);  // (slabs, 2, features): the slab's sum and the current block's
    parallel(a.rows * a.features < GRAIN ? 1 : a.threads, slabs, [&](int64_t slab) {
        float *total = partial.data + slab * 2 * a.features, *block = total + a.features;
        for (int64_t c = 0; c < 2 * a.features; c++) total[c] = 0.0f;
        int64_t end = (slab + 1) * slab_rows < a.rows ? (slab + 1) * slab_rows : a.rows;
        for (int64_t r = slab * slab_rows; r < end; r++) {
            const T* value = h + r * a.h_stride;
            const Y* down = dy + r * a.dy_stride;
            float sums[2];  // of squares, and of products with the gradient
            sum_row(a.features, [&](int64_t c, int64_t count, Float (&out)[2]) INLINE_LAMBDA {
                Float v = take(value + c, count);
                out[0] = v * v;
                out[1] = v * (take(down + c, count) * take(weight + c, count));
            }, sums);
            float root = 1.0f / sqrtf(sums[0] / static_cast<float>(a.features) + a.eps);
            float pull = sums[1] / static_cast<float>(a.features) * root * root;
            each_vector(0, a.features, [&](int64_t c, int64_t count) INLINE_LAMBDA {
                Float v = take(value + c, count), g = take(down + c, count);
                Float d = root * (g * take(weight + c, count) - v * pull);
                if (dh_in != nullptr) d += take(dh_in + r * a.dh_in_stride + c, count);
                give(dh + r * a.features + c, d, count);
                if (dresidual != nullptr) give(dresidual + r * a.features + c, d, count);
                give(block + c, take(block + c, count) + g * v * root, count);
            });
            if ((r + 1) % BLOCK_ROWS == 0 || r + 1 == end) {
                each_vector(0, a.features, [&](int64_t c, int64_t count) {
                    give(total + c, take(total + c, count) + take(block + c, count), count);
                    give(block + c, Float{}, count);
                });
            }
        }
    });
    for (int64_t c = 0; c < a.features; c++) {
        float whole = 0.0f;
        for (int64_t slab = 0; slab < slabs; slab++) whole += partial.data[slab * 2 * a.features + c];
        a.dweight[c] = whole;
    }
}

}  // namespace

void rms_norm_forward(const RmsNormForward& a) {
    if (a.type == Type::BFLOAT16) return forward<bf16, bf16, bf16>(a);
    if (a.type == Type::FLOAT16) return forward<fp16, fp16, fp16>(a);
    with_type(a.residual_type, [&](auto r) {
        with_type(a.y_type, [&](auto y) { forward<float, decltype(r), decltype(y)>(a); });
    });
}

void rms_norm_backward(const RmsNormBackward& a) {
    if (a.type == Type::BFLOAT16) return backward<bf16, bf16, bf16>(a);
    if (a.type == Type::FLOAT16) return backward<fp16, fp16, fp16>(a);
    with_type(a.residual_type, [&](auto r) {
        with_type(a.y_type, [&](auto y) { backward<float, decltype(r), decltype(y)>(a); });
    });
}

}  // namespace PSANN_NAMESPACE
