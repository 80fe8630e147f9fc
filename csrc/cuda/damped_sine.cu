// Damped sine on a GPU. Forward reads z and writes y, 16 bytes an access where the rows allow it. Backward: a block owns a strip of
// columns and a run of rows; its columns' sums stay in registers, are added over the block's row lanes in shared memory, and go to
// `partial`, one row a block; a second kernel adds those in order.
#include "common.cuh"
#include "kernels.cuh"

namespace cuda {
namespace {

constexpr int THREADS = 256;
constexpr int COLUMNS = 32, ROW_LANES = THREADS / COLUMNS;
constexpr int64_t MAX_PARTIALS = 256;

template <class T, int MODE, int N>
__global__ void __launch_bounds__(THREADS) forward(const T* z, const float* amplitude, const float* frequency, const float* damping,
                                                   T* y, int64_t rows, int64_t features, int64_t z_stride) {
    int64_t column = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * N;
    if (column >= features) return;
    Feature f[N];
    for (int i = 0; i < N; i++) f[i] = feature_of(amplitude[column + i], frequency[column + i], damping[column + i]);
    for (int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
        Pack<T, N> in = *reinterpret_cast<const Pack<T, N>*>(z + r * z_stride + column), out;
        for (int i = 0; i < N; i++) out.x[i] = narrow<T>(damped_sine<MODE>(widen(in.x[i]), f[i]));
        *reinterpret_cast<Pack<T, N>*>(y + r * features + column) = out;
    }
}

template <class T, int MODE>
__global__ void __launch_bounds__(THREADS) backward(const T* z, const T* dy, const float* amplitude, const float* frequency,
                                                    const float* damping, T* dz, float* partial, int64_t rows, int64_t features,
                                                    int64_t z_stride, int64_t dy_stride, int64_t run) {
    __shared__ float sums[3][ROW_LANES][COLUMNS];
    int lane = threadIdx.x % COLUMNS, row_lane = threadIdx.x / COLUMNS;
    int64_t column = static_cast<int64_t>(blockIdx.x) * COLUMNS + lane;
    float da = 0, df = 0, dd = 0;
    if (column < features) {
        Feature f = feature_of(amplitude[column], frequency[column], damping[column]);
        int64_t begin = static_cast<int64_t>(blockIdx.y) * run, end = min(begin + run, rows);
        for (int64_t r = begin + row_lane; r < end; r += ROW_LANES) {
            Gradient g = damped_sine_gradient<MODE>(widen(z[r * z_stride + column]), widen(dy[r * dy_stride + column]), f);
            dz[r * features + column] = narrow<T>(g.dz);
            da += g.amplitude, df += g.frequency, dd += g.damping;
        }
    }
    sums[0][row_lane][lane] = da, sums[1][row_lane][lane] = df, sums[2][row_lane][lane] = dd;
    __syncthreads();
    if (row_lane >= 3 || column >= features) return;
    float total = 0;
    for (int i = 0; i < ROW_LANES; i++) total += sums[row_lane][i][lane];
    partial[(static_cast<int64_t>(blockIdx.y) * 3 + row_lane) * features + column] = total;
}

__global__ void __launch_bounds__(THREADS) finish(const float* partial, const float* amplitude, float* da, float* df, float* dd,
                                                  int64_t partials, int64_t features) {
    int64_t column = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (column >= features) return;
    float sums[3] = {};
    for (int64_t p = 0; p < partials; p++)
        for (int k = 0; k < 3; k++) sums[k] += partial[(p * 3 + k) * features + column];
    da[column] = sums[0];
    df[column] = amplitude[column] * sums[1];
    dd[column] = -amplitude[column] * sums[2];
}

bool is_aligned(const void* p, int64_t stride_bytes) { return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride_bytes % 16 == 0; }

template <class T, int MODE> void launch_forward(const DampedSineForward& a, cudaStream_t stream) {
    constexpr int N = 16 / sizeof(T);
    int64_t bytes = static_cast<int64_t>(sizeof(T));
    bool wide = a.features % N == 0 && is_aligned(a.z, a.z_stride * bytes) && is_aligned(a.y, a.features * bytes);
    // Enough blocks to fill any GPU; each keeps its features' constants for many rows.
    int64_t columns = ceil_div(a.features, static_cast<int64_t>(THREADS) * (wide ? N : 1));
    dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(min(a.rows, max(int64_t{1}, 4096 / columns))));
    const T* z = static_cast<const T*>(a.z);
    T* y = static_cast<T*>(a.y);
    if (wide)
        forward<T, MODE, N><<<grid, THREADS, 0, stream>>>(z, a.amplitude, a.frequency, a.damping, y, a.rows, a.features,
            a.z_stride);
    else
        forward<T, MODE, 1><<<grid, THREADS, 0, stream>>>(z, a.amplitude, a.frequency, a.damping, y, a.rows, a.features,
            a.z_stride);
}

template <class T> void forward_of(const DampedSineForward& a, cudaStream_t stream) {
    a.mode == ABS ? launch_forward<T, ABS>(a, stream) : a.mode == RELU ? launch_forward<T, RELU>(a, stream) :
        launch_forward<T, NONE>(a, stream);
}

template <class T, int MODE> void launch_backward(const DampedSineBackward& a, float* partial, cudaStream_t stream) {
    int64_t partials = damped_sine_partials(a.rows);
    dim3 grid(static_cast<unsigned>(ceil_div(a.features, COLUMNS)), static_cast<unsigned>(partials));
    backward<T, MODE><<<grid, THREADS, 0, stream>>>(static_cast<const T*>(a.z), static_cast<const T*>(a.dy), a.amplitude,
        a.frequency, a.damping, static_cast<T*>(a.dz), partial, a.rows, a.features, a.z_stride, a.dy_stride,
        ceil_div(a.rows, partials));
    finish<<<static_cast<unsigned>(ceil_div(a.features, THREADS)), THREADS, 0, stream>>>(partial, a.amplitude, a.damplitude,
        a.dfrequency, a.ddamping, partials, a.features);
}

template <class T> void backward_of(const DampedSineBackward& a, float* partial, cudaStream_t stream) {
    a.mode == ABS ? launch_backward<T, ABS>(a, partial, stream) : a.mode == RELU ? launch_backward<T, RELU>(a, partial, stream) :
        launch_backward<T, NONE>(a, partial, stream);
}

}  // namespace

int64_t damped_sine_partials(int64_t rows) { return min(ceil_div(rows, 4 * ROW_LANES), MAX_PARTIALS); }

void damped_sine_forward(const DampedSineForward& a, cudaStream_t stream) { PSANN_FOR_TYPE(a.type, forward_of, a, stream) }

void damped_sine_backward(const DampedSineBackward& a, float* partial, cudaStream_t stream) {
    PSANN_FOR_TYPE(a.type, backward_of, a, partial, stream)
}

}  // namespace cuda
