// Root-mean-square normalization on a GPU: one block a row forward; backward a block owns a run of rows and adds its rows' part of
// the weight's gradient in `partial`, a row of it a block, which a second kernel adds in order.
#include "common.cuh"
#include "kernels.cuh"

namespace cuda {
namespace {

constexpr int THREADS = 256;
constexpr int64_t MAX_PARTIALS = 512;

__device__ float block_sum(float x) {
    __shared__ float sums[THREADS / 32];
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    float total = 0;
    for (int i = 0; i < THREADS / 32; i++) total += sums[i];
    return total;
}

__device__ inline float weight_at(const void* weight, Type type, int64_t i) {
    if (type == Type::FLOAT32) return static_cast<const float*>(weight)[i];
    return type == Type::BFLOAT16 ? widen(static_cast<const __nv_bfloat16*>(weight)[i]) :
        widen(static_cast<const __half*>(weight)[i]);
}

template <class T>
__global__ void __launch_bounds__(THREADS) forward(const T* x, const T* residual, const void* weight, T* y, T* h, int64_t rows,
                                                   int64_t features, int64_t x_stride, int64_t residual_stride, float eps,
                                                   Type weight_type) {
    for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
        const T* from = x + r * x_stride;
        float squares = 0;
        for (int64_t c = threadIdx.x; c < features; c += THREADS) {
            float value = widen(from[c]);
            if (residual != nullptr) {
                T stored = narrow<T>(value + widen(residual[r * residual_stride + c]));
                h[r * features + c] = stored;
                value = widen(stored);
            }
            squares = fmaf(value, value, squares);
        }
        // A thread reads back only what it wrote itself.
        if (residual != nullptr) from = h + r * features;
        float root = rsqrtf(block_sum(squares) / static_cast<float>(features) + eps);
        for (int64_t c = threadIdx.x; c < features; c += THREADS)
            y[r * features + c] = narrow<T>(widen(from[c]) * root * weight_at(weight, weight_type, c));
    }
}

template <class T>
__global__ void __launch_bounds__(THREADS) backward(const T* h, const T* dy, const T* dh_in, const void* weight, T* dh,
                                                    float* partial, int64_t rows, int64_t features, int64_t h_stride,
                                                    int64_t dy_stride, int64_t dh_in_stride, float eps, Type weight_type,
                                                    int64_t run) {
    float* mine = partial + static_cast<int64_t>(blockIdx.x) * features;
    for (int64_t c = threadIdx.x; c < features; c += THREADS) mine[c] = 0;
    int64_t begin = static_cast<int64_t>(blockIdx.x) * run, end = min(begin + run, rows);
    for (int64_t r = begin; r < end; r++) {
        float squares = 0, products = 0;
        for (int64_t c = threadIdx.x; c < features; c += THREADS) {
            float v = widen(h[r * h_stride + c]);
            squares = fmaf(v, v, squares);
            products = fmaf(v, widen(dy[r * dy_stride + c]) * weight_at(weight, weight_type, c), products);
        }
        float root = rsqrtf(block_sum(squares) / static_cast<float>(features) + eps);
        float pull = block_sum(products) / static_cast<float>(features) * root * root;
        for (int64_t c = threadIdx.x; c < features; c += THREADS) {
            float v = widen(h[r * h_stride + c]), g = widen(dy[r * dy_stride + c]);
            float d = root * (g * weight_at(weight, weight_type, c) - v * pull);
            if (dh_in != nullptr) d += widen(dh_in[r * dh_in_stride + c]);
            dh[r * features + c] = narrow<T>(d);
            mine[c] += g * v * root;
        }
    }
}

__global__ void __launch_bounds__(THREADS) finish(const float* partial, float* dweight, int64_t partials, int64_t features) {
    int64_t c = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (c >= features) return;
    float total = 0;
    for (int64_t p = 0; p < partials; p++) total += partial[p * features + c];
    dweight[c] = total;
}

template <class T> void forward_of(const RmsNormForward& a, cudaStream_t stream) {
    unsigned blocks = static_cast<unsigned>(min(a.rows, int64_t{1} << 20));
    forward<T><<<blocks, THREADS, 0, stream>>>(static_cast<const T*>(a.x), static_cast<const T*>(a.residual), a.weight,
        static_cast<T*>(a.y), static_cast<T*>(a.h), a.rows, a.features, a.x_stride, a.residual_stride, a.eps, a.weight_type);
}

template <class T> void backward_of(const RmsNormBackward& a, float* partial, cudaStream_t stream) {
    int64_t partials = rms_norm_partials(a.rows);
    backward<T><<<static_cast<unsigned>(partials), THREADS, 0, stream>>>(static_cast<const T*>(a.h), static_cast<const T*>(a.dy),
        static_cast<const T*>(a.dh_in), a.weight, static_cast<T*>(a.dh), partial, a.rows, a.features, a.h_stride, a.dy_stride,
        a.dh_in_stride, a.eps, a.weight_type, ceil_div(a.rows, partials));
    finish<<<static_cast<unsigned>(ceil_div(a.features, THREADS)), THREADS, 0, stream>>>(partial, a.dweight, partials, a.features);
}

}  // namespace

int64_t rms_norm_partials(int64_t rows) { return min(rows, MAX_PARTIALS); }

void rms_norm_forward(const RmsNormForward& a, cudaStream_t stream) { PSANN_FOR_TYPE(a.type, forward_of, a, stream) }

void rms_norm_backward(const RmsNormBackward& a, float* partial, cudaStream_t stream) {
    PSANN_FOR_TYPE(a.type, backward_of, a, partial, stream)
}

}  // namespace cuda
