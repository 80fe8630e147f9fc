// Attention of 1 to 16 new tokens of each sequence over its blocks, on a GPU. One block of threads per (sequence, key/value head,
// split of SPLIT keys): all queries that share the head share what it reads. Each warp takes every WARPS-th key of the split and keeps
// its own online softmax for one query row at a time; the block merges its warps in order, leaves (largest, sum, output) in `partial`,
// and a second kernel merges the splits. Lengths are read on the device only, so a graph can be captured.
#include "common.cuh"
#include "kernels.cuh"

namespace cuda {
namespace {

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int64_t SPLIT = 256;
constexpr int MAX_LANE_FEATURES = 8;  // head_dim up to 256, 32 lanes

struct Shape {
    int64_t first_row, tokens, length;
};

__device__ inline Shape shape_of(const PagedAttention& a, int64_t b) {
    return {a.cu_seqlens_q[b], static_cast<int64_t>(a.cu_seqlens_q[b + 1]) - a.cu_seqlens_q[b], a.seq_lens[b]};
}

// What checks.cpp refuses on a CPU and the host cannot see here: nothing of such a sequence is read, and its rows become NaN.
__device__ inline bool is_readable(const PagedAttention& a, const Shape& s, int64_t max_tokens) {
    return s.length >= 0 && s.length <= a.max_blocks * a.block_size && (s.length == 0 || s.tokens <= s.length) &&
           (s.tokens <= max_tokens || s.length == 0) && (a.rotary.cos == nullptr || s.length <= a.max_position);
}

// Feature d of query row `q` rotated for `position`.
template <class T> __device__ inline float rotated(const PagedAttention& a, const T* q, int64_t position, int64_t d) {
    float x = widen(q[d]);
    if (a.rotary.cos == nullptr) return x;
    int64_t half = a.head_dim / 2, m = a.rotary.interleaved ? d / 2 : d < half ? d : d - half;
    bool is_second = a.rotary.interleaved ? d % 2 : d >= half;
    int64_t partner = a.rotary.interleaved ? d ^ 1 : is_second ? d - half : d + half;
    float c = a.rotary.cos[position * half + m], s = a.rotary.sin[position * half + m], y = widen(q[partner]);
    return is_second ? x * c + y * s : x * c - y * s;
}

// partial is (sequences, kv_heads, splits, max_tokens * group, head_dim + 2).
template <class T> __global__ void __launch_bounds__(THREADS) attend(PagedAttention a, int64_t max_tokens, int64_t splits, float* partial) {
    extern __shared__ float shared[];  // (WARPS, head_dim + 2)
    int64_t split = blockIdx.x, kv_head = blockIdx.y, b = blockIdx.z, group = a.heads / a.kv_heads;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Shape s = shape_of(a, b);
    if (s.tokens <= 0 || split * SPLIT >= s.length || !is_readable(a, s, max_tokens)) return;
    const int32_t* table = a.block_table + b * a.table_stride;
    for (int64_t row = 0; row < s.tokens * group; row++) {
        int64_t token = divide(row, group), position = s.length - s.tokens + token, head = kv_head * group + row - token * group;
        const T* q_row = static_cast<const T*>(a.q) + (s.first_row + token) * a.q_stride + head * a.q_head_stride;
        float q[MAX_LANE_FEATURES], o[MAX_LANE_FEATURES] = {}, largest = -INFINITY, sum = 0;
        for (int i = 0; i < MAX_LANE_FEATURES; i++) q[i] = lane + 32 * i < a.head_dim ? rotated(a, q_row, position, lane + 32 * i) * a.softmax_scale : 0.0f;
        int64_t begin = split * SPLIT, end = min(min(begin + SPLIT, s.length), position + 1);
        if (a.window > 0) begin = max(begin, position - a.window + 1);
        float slope = a.alibi_slopes == nullptr ? 0.0f : a.alibi_slopes[head];
        for (int64_t key = begin + warp; key < end; key += WARPS) {
            int64_t page = divide(key, a.block_size), block = table[page], slot = key - page * a.block_size;
            if (block < 0 || block >= a.num_blocks) {
                largest = sum = NAN;  // no such block; the row must not look right
                break;
            }
            const T* k = static_cast<const T*>(a.k_cache.data) + block * a.k_cache.block_stride + slot * a.k_cache.slot_stride + kv_head * a.k_cache.head_stride;
            const T* v = static_cast<const T*>(a.v_cache.data) + block * a.v_cache.block_stride + slot * a.v_cache.slot_stride + kv_head * a.v_cache.head_stride;
            float score = 0;
#pragma unroll
            for (int i = 0; i < MAX_LANE_FEATURES; i++)
                if (lane + 32 * i < a.head_dim) score = fmaf(q[i], widen(k[lane + 32 * i]), score);
            score = warp_sum(score) - slope * static_cast<float>(position - key);
            float renewed = fmaxf(largest, score), factor = largest == renewed ? 1.0f : expf(largest - renewed), p = expf(score - renewed);
            sum = sum * factor + p;
            largest = renewed;
#pragma unroll
            for (int i = 0; i < MAX_LANE_FEATURES; i++)
                if (lane + 32 * i < a.head_dim) o[i] = o[i] * factor + p * widen(v[lane + 32 * i]);
        }
        float* mine = shared + warp * (a.head_dim + 2);
        if (lane == 0) mine[0] = largest, mine[1] = sum;
        for (int i = 0; i < MAX_LANE_FEATURES; i++)
            if (lane + 32 * i < a.head_dim) mine[2 + lane + 32 * i] = o[i];
        __syncthreads();
        float* out = partial + (((b * a.kv_heads + kv_head) * splits + split) * max_tokens * group + row) * (a.head_dim + 2);
        float highest = -INFINITY, total = 0;
        for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, shared[w * (a.head_dim + 2)]);
        for (int w = 0; w < WARPS; w++)
            if (shared[w * (a.head_dim + 2) + 1] != 0) total += shared[w * (a.head_dim + 2) + 1] * expf(shared[w * (a.head_dim + 2)] - highest);
        for (int64_t d = threadIdx.x; d < a.head_dim; d += THREADS) {
            float x = 0;
            for (int w = 0; w < WARPS; w++)
                if (shared[w * (a.head_dim + 2) + 1] != 0) x += shared[w * (a.head_dim + 2) + 2 + d] * expf(shared[w * (a.head_dim + 2)] - highest);
            out[2 + d] = x;
        }
        if (threadIdx.x == 0) out[0] = highest, out[1] = total;
        __syncthreads();
    }
}

template <class T> __global__ void __launch_bounds__(THREADS) merge(PagedAttention a, int64_t max_tokens, int64_t splits, const float* partial) {
    int64_t kv_head = blockIdx.x, b = blockIdx.y, group = a.heads / a.kv_heads;
    Shape s = shape_of(a, b);
    int64_t used = min(splits, (s.length + SPLIT - 1) / SPLIT), width = a.head_dim + 2;
    bool readable = is_readable(a, s, max_tokens);
    if (b == a.sequences - 1) {
        // Rows of q that belong to no sequence.
        int64_t unused = a.rows - a.cu_seqlens_q[a.sequences], features = group * a.head_dim;
        for (int64_t i = threadIdx.x; i < unused * features; i += THREADS) {
            int64_t row = divide(i, features);
            static_cast<T*>(a.o)[((a.cu_seqlens_q[a.sequences] + row) * a.kv_heads + kv_head) * features + i - row * features] = narrow<T>(0.0f);
        }
    }
    for (int64_t i = threadIdx.x; i < s.tokens * group * a.head_dim; i += THREADS) {
        int64_t row = divide(i, a.head_dim), d = i - row * a.head_dim, token = divide(row, group);
        T* o = static_cast<T*>(a.o) + ((s.first_row + token) * a.heads + kv_head * group + row - token * group) * a.head_dim + d;
        if (!readable) {
            *o = narrow<T>(NAN);
            continue;
        }
        int64_t step = max_tokens * group * width;
        const float* first = partial + ((b * a.kv_heads + kv_head) * splits * max_tokens * group + row) * width;
        float highest = -INFINITY, total = 0, x = 0;
        for (int64_t k = 0; k < used; k++) highest = fmaxf(highest, first[k * step]);
        for (int64_t k = 0; k < used; k++) {
            if (first[k * step + 1] == 0) continue;  // saw no key
            float factor = expf(first[k * step] - highest);
            total += first[k * step + 1] * factor;
            x += first[k * step + 2 + d] * factor;
        }
        *o = narrow<T>(used == 0 ? 0.0f : x / total);
    }
}

// A grid has no size of 0.
int64_t splits_of(int64_t max_length) { return max(int64_t{1}, ceil_div(max_length, SPLIT)); }

template <class T> void launch(const PagedAttention& a, int64_t max_tokens, int64_t max_length, float* partial, cudaStream_t stream) {
    int64_t splits = splits_of(max_length);
    if (a.sequences == 0) {
        (void)cudaMemsetAsync(a.o, 0, static_cast<size_t>(a.rows * a.heads * a.head_dim) * sizeof(T), stream);
        return;
    }
    dim3 pieces(static_cast<unsigned>(splits), static_cast<unsigned>(a.kv_heads), static_cast<unsigned>(a.sequences));
    attend<T><<<pieces, THREADS, sizeof(float) * WARPS * static_cast<size_t>(a.head_dim + 2), stream>>>(a, max_tokens, splits, partial);
    merge<T><<<dim3(static_cast<unsigned>(a.kv_heads), static_cast<unsigned>(a.sequences)), THREADS, 0, stream>>>(a, max_tokens, splits, partial);
}

}  // namespace

int64_t paged_attention_partials(const PagedAttention& a, int64_t max_tokens, int64_t max_length) {
    return a.sequences * a.heads * splits_of(max_length) * max_tokens * (a.head_dim + 2);
}

void paged_attention(const PagedAttention& a, int64_t max_tokens, int64_t max_length, float* partial, cudaStream_t stream) {
    PSANN_FOR_TYPE(a.type, launch, a, max_tokens, max_length, partial, stream)
}

}  // namespace cuda
