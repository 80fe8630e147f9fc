// Causal depthwise dilated convolution, then the damped sine, on a GPU. A thread owns one feature and walks over a run of tokens;
// its taps come from the first caches. Backward writes the convolution's gradient dz in float, and a block's sums go to `partial`,
// which a second kernel adds in order; a third gathers dx from dz.
#include "common.cuh"
#include "kernels.cuh"

namespace cuda {
namespace {

constexpr int THREADS = 128;
constexpr int64_t RUN = 32;  // tokens a block walks over
constexpr int64_t MAX_PARTIALS = 256;

// First token of token t's document, and the document's number.
__device__ inline int64_t start_of(const WaveConv& a, int64_t t, int64_t& document) {
    document = a.row_length > 0 ? divide(t, a.row_length) : 0;
    int64_t start = document * a.row_length;
    if (a.cu_seqlens == nullptr) return start;
    // The last document that begins at or before t; of empty ones at one place the last.
    int64_t low = 0;
    for (int64_t high = a.documents; high - low > 1;) {
        int64_t middle = (low + high) / 2;
        if (a.cu_seqlens[middle] <= t) low = middle;
        else high = middle;
    }
    if (a.row_length == 0) document = low;
    return max(start, static_cast<int64_t>(a.cu_seqlens[low]));
}

template <class T>
__device__ inline float tap(const WaveConv& a, int64_t t, int64_t start, int64_t document, int64_t column, int64_t distance) {
    if (t - distance >= start) return widen(static_cast<const T*>(a.x)[(t - distance) * a.x_stride + column]);
    if (a.state == nullptr) return 0.0f;
    int64_t length = (a.taps - 1) * a.dilation;
    return widen(static_cast<const T*>(a.state)[(document * length + t - distance - start + length) * a.features + column]);
}

template <class T> __device__ inline float convolve(const WaveConv& a, int64_t t, int64_t start, int64_t document, int64_t column) {
    float z = a.bias == nullptr ? 0.0f : a.bias[column];
    for (int64_t j = 0; j < a.taps; j++)
        z = fmaf(a.weight[column * a.taps + j], tap<T>(a, t, start, document, column, (a.taps - 1 - j) * a.dilation), z);
    return z;
}

template <class T, int MODE> __global__ void __launch_bounds__(THREADS) forward(WaveConv a, T* y) {
    int64_t column = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (column >= a.features) return;
    Feature f = feature_of(a.amplitude[column], a.frequency[column], a.damping[column]);
    int64_t run = (a.tokens + gridDim.y - 1) / gridDim.y, begin = static_cast<int64_t>(blockIdx.y) * run;
    int64_t end = min(begin + run, a.tokens);
    for (int64_t t = begin; t < end; t++) {
        int64_t document, start = start_of(a, t, document);
        y[t * a.features + column] = narrow<T>(damped_sine<MODE>(convolve<T>(a, t, start, document, column), f));
    }
}

// Sums of a feature: bias, amplitude, frequency, damping, then the taps, which are added to memory that no other thread touches.
// Six blocks at once are asked for because the compiler otherwise keeps an address in memory on sm_100.
template <class T, int MODE>
__global__ void __launch_bounds__(THREADS, 6) backward(WaveConv a, const T* dy, int64_t dy_stride, float* dz, float* partial,
                                                       int64_t run) {
    int64_t column = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (column >= a.features) return;
    Feature f = feature_of(a.amplitude[column], a.frequency[column], a.damping[column]);
    float sums[4] = {};
    float* mine = partial + static_cast<int64_t>(blockIdx.y) * (a.taps + 4) * a.features + column;
    for (int64_t j = 0; j < a.taps; j++) mine[(4 + j) * a.features] = 0;
    int64_t begin = static_cast<int64_t>(blockIdx.y) * run, end = min(begin + run, a.tokens);
    for (int64_t t = begin; t < end; t++) {
        int64_t document, start = start_of(a, t, document);
        Gradient g = damped_sine_gradient<MODE>(convolve<T>(a, t, start, document, column), widen(dy[t * dy_stride + column]), f);
        dz[t * a.features + column] = g.dz;
        sums[0] += g.dz, sums[1] += g.amplitude, sums[2] += g.frequency, sums[3] += g.damping;
        for (int64_t j = 0; j < a.taps; j++)
            mine[(4 + j) * a.features] += g.dz * tap<T>(a, t, start, document, column, (a.taps - 1 - j) * a.dilation);
    }
    for (int k = 0; k < 4; k++) mine[k * a.features] = sums[k];
}

template <class T> __global__ void __launch_bounds__(THREADS) gather(WaveConv a, const float* dz, T* dx) {
    int64_t column = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (column >= a.features) return;
    int64_t run = (a.tokens + gridDim.y - 1) / gridDim.y, begin = static_cast<int64_t>(blockIdx.y) * run;
    int64_t end = min(begin + run, a.tokens);
    for (int64_t t = begin; t < end; t++) {
        float d = 0;
        for (int64_t j = a.taps - 1; j >= 0; j--) {
            int64_t reader = t + (a.taps - 1 - j) * a.dilation, document;
            if (reader >= a.tokens || start_of(a, reader, document) > t) break;
            d = fmaf(a.weight[column * a.taps + j], dz[reader * a.features + column], d);
        }
        dx[t * a.features + column] = narrow<T>(d);
    }
}

__global__ void __launch_bounds__(THREADS) finish(WaveConvBackward b, const float* partial, int64_t partials) {
    const WaveConv& a = b.conv;
    int64_t column = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (column >= a.features) return;
    for (int64_t k = 0; k < a.taps + 4; k++) {
        float total = 0;
        for (int64_t p = 0; p < partials; p++) total += partial[(p * (a.taps + 4) + k) * a.features + column];
        if (k == 0) b.dbias[column] = total;
        else if (k == 1) b.damplitude[column] = total;
        else if (k == 2) b.dfrequency[column] = a.amplitude[column] * total;
        else if (k == 3) b.ddamping[column] = -a.amplitude[column] * total;
        else b.dweight[column * a.taps + k - 4] = total;
    }
}

// A grid's second dimension ends at 65535; blocks walk on from there.
int64_t runs_of(const WaveConv& a) { return min(ceil_div(a.tokens, RUN), int64_t{65535}); }

dim3 grid_of(const WaveConv& a, int64_t runs) {
    return dim3(static_cast<unsigned>(ceil_div(a.features, THREADS)), static_cast<unsigned>(runs));
}

template <class T, int MODE> void launch_forward(const WaveConvForward& f, cudaStream_t stream) {
    forward<T, MODE><<<grid_of(f.conv, runs_of(f.conv)), THREADS, 0, stream>>>(f.conv, static_cast<T*>(f.y));
}

template <class T> void forward_of(const WaveConvForward& f, cudaStream_t stream) {
    int mode = f.conv.mode;
    mode == ABS ? launch_forward<T, ABS>(f, stream) : mode == RELU ? launch_forward<T, RELU>(f, stream) :
        launch_forward<T, NONE>(f, stream);
}

template <class T, int MODE> void launch_backward(const WaveConvBackward& b, float* dz, float* partial, cudaStream_t stream) {
    int64_t partials = wave_conv_partials(b.conv.tokens);
    backward<T, MODE><<<grid_of(b.conv, partials), THREADS, 0, stream>>>(b.conv, static_cast<const T*>(b.dy), b.dy_stride, dz,
        partial, ceil_div(b.conv.tokens, partials));
    gather<T><<<grid_of(b.conv, runs_of(b.conv)), THREADS, 0, stream>>>(b.conv, dz, static_cast<T*>(b.dx));
    finish<<<static_cast<unsigned>(ceil_div(b.conv.features, THREADS)), THREADS, 0, stream>>>(b, partial, partials);
}

template <class T> void backward_of(const WaveConvBackward& b, float* dz, float* partial, cudaStream_t stream) {
    int mode = b.conv.mode;
    mode == ABS ? launch_backward<T, ABS>(b, dz, partial, stream) :
        mode == RELU ? launch_backward<T, RELU>(b, dz, partial, stream) : launch_backward<T, NONE>(b, dz, partial, stream);
}

}  // namespace

int64_t wave_conv_partials(int64_t tokens) { return min(ceil_div(tokens, RUN), MAX_PARTIALS); }

void wave_conv_forward(const WaveConvForward& f, cudaStream_t stream) { PSANN_FOR_TYPE(f.conv.type, forward_of, f, stream) }

void wave_conv_backward(const WaveConvBackward& b, float* dz, float* partial, cudaStream_t stream) {
    PSANN_FOR_TYPE(b.conv.type, backward_of, b, dz, partial, stream)
}

}  // namespace cuda
