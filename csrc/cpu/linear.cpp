// A linear layer for a few rows; the definition is linear.py's reference.
//
// With one row every weight is read once and used once, so the time is that of reading the weights: threads take runs of weight
// rows, each read as a few streams far apart. x is widened to float once, laid out as the weights' pairs of vectors come, and stays
// in the first caches; up to four of its rows use each weight that was widened. Each output is two vectors of partial sums over the
// inputs, added up at the end, so it depends neither on the rows beside it nor on which thread or stream it falls to.
#include "../kernels.h"
#include "../memory.h"
#include "../threads.h"
#include "simd.h"

namespace PSANN_NAMESPACE {
namespace {

template <int N> struct Count { static constexpr int value = N; };

constexpr int64_t GRAIN = 1 << 15;        // products below which one thread is faster
constexpr int64_t PIECE_BYTES = 1 << 18;  // of weights, at most
constexpr int64_t AHEAD = 4096;           // bytes that are asked for before their turn where several rows of x share a weight
// The same where one row uses it, into the second cache; narrower vectors gain nothing by it.
constexpr int64_t ALONE_AHEAD = WIDTH == 16 ? 2048 : 0;
// Runs of weight rows that one row of x reads in turn. The hardware fetches ahead within each, and rows side by side would be one
// such run to it: one Zen 3 core reads four far apart about twice as fast as four neighbours.
constexpr int STREAMS = 4;

// Sums of R rows of x with S weight rows.
template <int R, int S, class W>
INLINE void dot(const float* x, int64_t x_stride, const W* weight, int64_t weight_stride, int64_t inputs, float (&out)[R][S]) {
    Float sums[R][S][2] = {};
    auto add = [&](int64_t k, Float (&w)[S][2]) INLINE_LAMBDA {
        UNROLL for (int r = 0; r < R; r++) {
            Float even = load(x + r * x_stride + k), odd = load(x + r * x_stride + k + WIDTH);
            UNROLL for (int s = 0; s < S; s++) {
                sums[r][s][0] = fma(even, w[s][0], sums[r][s][0]);
                sums[r][s][1] = fma(odd, w[s][1], sums[r][s][1]);
            }
        }
    };
    int64_t k = 0;
    for (; k + 2 * WIDTH <= inputs; k += 2 * WIDTH) {
        Float w[S][2];
        UNROLL for (int s = 0; s < S; s++) {
            const W* p = weight + s * weight_stride + k;
            const char* bytes = reinterpret_cast<const char*>(p);
            if (R > 1) __builtin_prefetch(bytes + AHEAD, 0, 3);
            else if (ALONE_AHEAD > 0)
                UNROLL for (size_t i = 0; i < 2 * WIDTH * sizeof(W); i += 64) __builtin_prefetch(bytes + ALONE_AHEAD + i, 0, 2);
            load_pair(p, w[s]);
        }
        add(k, w);
    }
    if (k < inputs) {
        Float w[S][2];
        UNROLL for (int s = 0; s < S; s++) load_pair(weight + s * weight_stride + k, inputs - k, w[s]);
        add(k, w);
    }
    UNROLL for (int r = 0; r < R; r++) {
        if constexpr (S == 4)
            sum_each({sums[r][0][0] + sums[r][0][1], sums[r][1][0] + sums[r][1][1],
                      sums[r][2][0] + sums[r][2][1], sums[r][3][0] + sums[r][3][1]}, out[r]);
        else
            UNROLL for (int s = 0; s < S; s++) out[r][s] = sum(sums[r][s][0] + sums[r][s][1]);
    }
}

// The outputs `output`, output + step, ... of R rows.
template <int R, int S, class T, class W>
INLINE void outputs_of(const Linear& a, const float* x, int64_t x_stride, int64_t row, int64_t output, int64_t step) {
    float sums[R][S];
    dot<R, S>(x + row * x_stride, x_stride, static_cast<const W*>(a.weight) + output * a.weight_stride, step * a.weight_stride,
        a.inputs, sums);
    for (int r = 0; r < R; r++) {
        for (int s = 0; s < S; s++) {
            int64_t n = output + s * step;
            float y = sums[r][s];
            if (a.scale != nullptr) y *= a.scale[n];
            if (a.bias != nullptr) y += a.bias[n];
            put(static_cast<T*>(a.y) + (row + r) * a.outputs + n, y);
        }
    }
}

template <class T, class W> static void run(const Linear& a) {
    int64_t x_stride = padded(a.inputs);
    Workspace wide(a.rows * x_stride);
    for (int64_t r = 0; r < a.rows; r++) {
        const T* from = static_cast<const T*>(a.x) + r * a.x_stride;
        float* to = wide.data + r * x_stride;
        for (int64_t k = 0; k < x_stride; k++) to[place(k, static_cast<const W*>(nullptr))] = k < a.inputs ? scalar(from[k]) : 0.0f;
    }
    int threads = a.rows * a.inputs * a.outputs < GRAIN ? 1 : a.threads;
    int64_t row_bytes = a.inputs * static_cast<int64_t>(sizeof(W)) + 1, most = PIECE_BYTES / row_bytes;
    int64_t share = a.outputs / (4 * threads);
    int64_t piece = ((share < most ? share : most) / STREAMS + 1) * STREAMS;
    parallel(threads, (a.outputs + piece - 1) / piece, [&](int64_t p) {
        int64_t end = (p + 1) * piece < a.outputs ? (p + 1) * piece : a.outputs, output = p * piece;
        auto all_rows = [&](auto count, int64_t first, int64_t step) INLINE_LAMBDA {
            constexpr int S = decltype(count)::value;
            int64_t row = 0;
            for (; row + 4 <= a.rows; row += 4)
                UNROLL for (int s = 0; s < S; s++) outputs_of<4, 1, T, W>(a, wide.data, x_stride, row, first + s * step, 0);
            for (; row + 2 <= a.rows; row += 2)
                UNROLL for (int s = 0; s < S; s++) outputs_of<2, 1, T, W>(a, wide.data, x_stride, row, first + s * step, 0);
            if (row < a.rows) outputs_of<1, S, T, W>(a, wide.data, x_stride, row, first, step);
        };
        int64_t step = (end - output) / STREAMS;
        for (int64_t i = 0; i < step; i++) all_rows(Count<STREAMS>{}, output + i, step);
        for (output += step * STREAMS; output < end; output++) all_rows(Count<1>{}, output, 0);
    });
}

template <class T> static void of_weight(const Linear& a) {
    switch (a.weight_type) {
        case Type::FLOAT32: return run<T, float>(a);
        case Type::BFLOAT16: return run<T, bf16>(a);
        case Type::FLOAT16: return run<T, fp16>(a);
        case Type::INT8: return run<T, int8_t>(a);
    }
}

}  // namespace

void linear(const Linear& a) {
    a.type == Type::FLOAT32 ? of_weight<float>(a) : a.type == Type::BFLOAT16 ? of_weight<bf16>(a) : of_weight<fp16>(a);
}

}  // namespace PSANN_NAMESPACE
