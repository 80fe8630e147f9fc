// Writes new keys (rotated) and values into their slots; one block a token, one thread a pair of features.
#include "common.cuh"
#include "kernels.cuh"

namespace cuda {
namespace {

constexpr int THREADS = 128;

template <class T> __global__ void __launch_bounds__(THREADS) append(PagedAppend a) {
    int64_t t = blockIdx.x, slot = a.slot_mapping[t];
    // Slots past the cache, which a CPU refuses and the host cannot see here, are not written either.
    if (slot < 0 || slot >= a.num_blocks * a.block_size) return;
    int64_t block = slot / a.block_size, offset = slot % a.block_size, half = a.head_dim / 2;
    const T *k = static_cast<const T*>(a.k) + t * a.k_stride, *v = static_cast<const T*>(a.v) + t * a.v_stride;
    T* k_slot = static_cast<T*>(a.k_cache.data) + block * a.k_cache.block_stride + offset * a.k_cache.slot_stride;
    T* v_slot = static_cast<T*>(a.v_cache.data) + block * a.v_cache.block_stride + offset * a.v_cache.slot_stride;
    for (int64_t i = threadIdx.x; i < a.heads * a.head_dim; i += THREADS) {
        int64_t h = divide(i, a.head_dim), d = i - h * a.head_dim;
        v_slot[h * a.v_cache.head_stride + d] = v[h * a.v_head_stride + d];
        if (a.rotary.cos == nullptr) k_slot[h * a.k_cache.head_stride + d] = k[h * a.k_head_stride + d];
    }
    if (a.rotary.cos == nullptr) return;
    int64_t position = a.positions[t];
    if (position < 0 || position >= a.max_position) {
        // Nor is a row read that the tables lack; a key of NaN cannot be overlooked.
        for (int64_t i = threadIdx.x; i < a.heads * a.head_dim; i += THREADS) {
            int64_t h = divide(i, a.head_dim);
            k_slot[h * a.k_cache.head_stride + i - h * a.head_dim] = narrow<T>(NAN);
        }
        return;
    }
    const float *cos = a.rotary.cos + position * half, *sin = a.rotary.sin + position * half;
    int64_t step = a.rotary.interleaved ? 2 : 1, partner = a.rotary.interleaved ? 1 : half;
    for (int64_t i = threadIdx.x; i < a.heads * half; i += THREADS) {
        int64_t h = divide(i, half), m = i - h * half;
        float x = widen(k[h * a.k_head_stride + m * step]), y = widen(k[h * a.k_head_stride + m * step + partner]);
        T* out = k_slot + h * a.k_cache.head_stride + m * step;
        out[0] = narrow<T>(x * cos[m] - y * sin[m]);
        out[partner] = narrow<T>(y * cos[m] + x * sin[m]);
    }
}

template <class T>
void launch(const PagedAppend& a, cudaStream_t stream) { append<T><<<static_cast<unsigned>(a.tokens), THREADS, 0, stream>>>(a); }

}  // namespace

void paged_append(const PagedAppend& a, cudaStream_t stream) { PSANN_FOR_TYPE(a.type, launch, a, stream) }

}  // namespace cuda
