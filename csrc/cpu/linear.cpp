// A linear layer for a few rows; the definition is linear.py's reference.
//
// With one row every weight is read once and used once, so the time is that of reading the weights: threads take runs of weight
// rows, each weight row is one stream, FOUR streams at once. x is widened to float once and stays in the first caches. Each
// output is one vector of partial sums over the inputs, added up at the end, so it does not depend on the rows beside it.
#include "../kernels.h"
#include "../threads.h"
#include "simd.h"

namespace PSANN_NAMESPACE {
namespace {

constexpr int STREAMS = 4;
constexpr int64_t GRAIN = 1 << 15;  // products below which one thread is faster

// Sums of R rows of x with STREAMS weight rows, from input 0 up.
template <int R, class W> INLINE void dot(const float* x, int64_t x_stride, const W* const (&weight)[STREAMS], int64_t inputs, float (&out)[R][STREAMS]) {
    Float sums[R][STREAMS] = {};
    auto step = [&](int64_t k, int64_t lanes) {
        Float w[STREAMS];
        // The next group of weight rows lies right behind this one, where rows are dense.
        const char* next = reinterpret_cast<const char*>(weight[0] + STREAMS * (weight[1] - weight[0]) + STREAMS * k);
        for (size_t line = 0; line < STREAMS * WIDTH * sizeof(W); line += 64) __builtin_prefetch(next + line, 0, 3);
        for (int s = 0; s < STREAMS; s++) w[s] = lanes == WIDTH ? load(weight[s] + k) : load(weight[s] + k, lanes);
        for (int r = 0; r < R; r++) {
            Float v = load(x + r * x_stride + k);  // padded with zeros
            for (int s = 0; s < STREAMS; s++) sums[r][s] = fma(v, w[s], sums[r][s]);
        }
    };
    int64_t k = 0;
    for (; k + WIDTH <= inputs; k += WIDTH) step(k, WIDTH);
    if (k < inputs) step(k, inputs - k);
    for (int r = 0; r < R; r++)
        for (int s = 0; s < STREAMS; s++) out[r][s] = sum(sums[r][s]);
}

template <class T> INLINE void put(T* p, float x) { store(p, all(x), 1); }

template <int R, class T, class W> INLINE void outputs_of(const Linear& a, const float* x, int64_t x_stride, int64_t row, int64_t begin, int count) {
    const W* weight[STREAMS];
    // A short last group reads its last row again.
    for (int s = 0; s < STREAMS; s++) weight[s] = static_cast<const W*>(a.weight) + (begin + (s < count ? s : count - 1)) * a.weight_stride;
    float sums[R][STREAMS];
    dot<R>(x + row * x_stride, x_stride, weight, a.inputs, sums);
    for (int r = 0; r < R; r++) {
        for (int s = 0; s < count; s++) {
            float y = sums[r][s];
            if (a.scale != nullptr) y *= a.scale[begin + s];
            if (a.bias != nullptr) y += a.bias[begin + s];
            put(static_cast<T*>(a.y) + (row + r) * a.outputs + begin + s, y);
        }
    }
}

template <class T, class W> static void run(const Linear& a) {
    int64_t x_stride = (a.inputs + WIDTH - 1) / WIDTH * WIDTH;
    Workspace wide(a.rows * x_stride);
    for (int64_t r = 0; r < a.rows; r++) {
        const T* from = static_cast<const T*>(a.x) + r * a.x_stride;
        float* to = wide.data + r * x_stride;
        int64_t k = 0;
        for (; k + WIDTH <= a.inputs; k += WIDTH) store(to + k, load(from + k));
        if (k < a.inputs) store(to + k, load(from + k, a.inputs - k));
    }
    int64_t piece = 16;
    parallel(a.rows * a.inputs * a.outputs < GRAIN ? 1 : a.threads, (a.outputs + piece - 1) / piece, [&](int64_t p) {
        int64_t end = (p + 1) * piece < a.outputs ? (p + 1) * piece : a.outputs;
        for (int64_t begin = p * piece; begin < end; begin += STREAMS) {
            int count = end - begin < STREAMS ? static_cast<int>(end - begin) : STREAMS;
            int64_t row = 0;
            for (; row + 2 <= a.rows; row += 2) outputs_of<2, T, W>(a, wide.data, x_stride, row, begin, count);
            if (row < a.rows) outputs_of<1, T, W>(a, wide.data, x_stride, row, begin, count);
        }
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
