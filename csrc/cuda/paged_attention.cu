// Attention of few new tokens of each sequence over its blocks, on a GPU. One block of threads per (sequence, key/value head, split
// of its keys): all queries that share the head share what it reads, one row after the other, which is why many new tokens are
// another backend's. Each warp takes every WARPS-th key of the split and keeps its own online softmax for one query row at a time;
// the block merges its warps in order, leaves (largest, sum, output) in `partial`, and a second kernel merges the splits. Lengths
// are read on the device only, so a graph can be captured. Sequences lie along a grid's first dimension: the others end at 65535.
#include "common.cuh"
#include "kernels.cuh"

namespace cuda {
namespace {

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int64_t SPLIT = 256;       // keys; more where a sequence would have more than MAX_SPLITS
constexpr int64_t MAX_SPLITS = 64;
constexpr int MAX_LANE_FEATURES = 8;  // head_dim up to 256, 32 lanes

struct Shape {
    int64_t first_row, tokens, length;
};

__device__ inline Shape shape_of(const PagedAttention& a, int64_t b) {
    return {a.cu_seqlens_q[b], static_cast<int64_t>(a.cu_seqlens_q[b + 1]) - a.cu_seqlens_q[b], a.seq_lens[b]};
}

// Follows from the sequence's own length, so that neither its company nor the width of its table changes a bit.
__device__ inline int64_t split_of(const Shape& s) { return max(SPLIT, (s.length + MAX_SPLITS - 1) / MAX_SPLITS); }

// What checks.cpp refuses on a CPU and the host cannot see here: nothing of such a sequence is read, and its rows become NaN.
__device__ inline bool is_readable(const PagedAttention& a, const Shape& s) {
    return s.length >= 0 && s.length <= a.max_blocks * a.block_size && (s.length == 0 || s.tokens <= s.length) &&
        s.first_row >= 0 && s.first_row + s.tokens <= a.rows && (a.rotary.cos == nullptr || s.length <= a.max_position);
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

// partial is (rows, heads, splits, head_dim + 2). Six blocks at once are asked for because the compiler otherwise stops at 80
// registers on sm_100 and spills.
template <class T> __global__ void __launch_bounds__(THREADS, 6) attend(PagedAttention a, int64_t splits, float* partial) {
    extern __shared__ float shared[];  // (WARPS, head_dim + 2)
    int64_t b = blockIdx.x, kv_head = blockIdx.y, split = blockIdx.z, group = divide(a.heads, a.kv_heads);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Shape s = shape_of(a, b);
    if (s.tokens <= 0 || !is_readable(a, s) || split * split_of(s) >= s.length) return;
    const int32_t* table = a.block_table + b * a.table_stride;
    for (uint32_t row = 0, rows = static_cast<uint32_t>(s.tokens * group); row < rows; row++) {
        int64_t token = divide(row, group), position = s.length - s.tokens + token, head = kv_head * group + row - token * group;
        const T* q_row = static_cast<const T*>(a.q) + (s.first_row + token) * a.q_stride + head * a.q_head_stride;
        float q[MAX_LANE_FEATURES], o[MAX_LANE_FEATURES] = {}, largest = -INFINITY, sum = 0;
        for (int i = 0; i < MAX_LANE_FEATURES; i++)
            q[i] = lane + 32 * i < a.head_dim ? rotated(a, q_row, position, lane + 32 * i) * a.softmax_scale : 0.0f;
        int64_t begin = split * split_of(s);
        // Lengths are below 2^31: keys of 32 bits take fewer registers.
        uint32_t end = static_cast<uint32_t>(min(min(begin + split_of(s), s.length), position + 1));
        if (a.window > 0) begin = max(begin, position - a.window + 1);
        float slope = a.alibi_slopes == nullptr ? 0.0f : a.alibi_slopes[head];
        for (uint32_t key = static_cast<uint32_t>(begin) + warp; key < end; key += WARPS) {
            uint32_t page = key / static_cast<uint32_t>(a.block_size);
            int64_t block = table[page], slot = key - page * static_cast<uint32_t>(a.block_size);
            if (block < 0 || block >= a.num_blocks) {
                largest = sum = NAN;  // no such block; the row must not look right
                break;
            }
            const T* k = static_cast<const T*>(a.k_cache.data) + block * a.k_cache.block_stride + slot * a.k_cache.slot_stride +
                kv_head * a.k_cache.head_stride;
            const T* v = static_cast<const T*>(a.v_cache.data) + block * a.v_cache.block_stride + slot * a.v_cache.slot_stride +
                kv_head * a.v_cache.head_stride;
            float score = 0;
#pragma unroll
            for (int i = 0; i < MAX_LANE_FEATURES; i++)
                if (lane + 32 * i < a.head_dim) score = fmaf(q[i], widen(k[lane + 32 * i]), score);
            score = warp_sum(score) - slope * static_cast<float>(position - key);
            // A score of -infinity weighs nothing; shifted by a maximum that is no larger it would be NaN.
            float renewed = fmaxf(largest, score), factor = largest == renewed ? 1.0f : expf(largest - renewed);
            float p = score == -INFINITY ? 0.0f : expf(score - renewed);
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
        float* out = partial + (((s.first_row + token) * a.heads + head) * splits + split) * (a.head_dim + 2);
        float highest = -INFINITY, total = 0;
        for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, shared[w * (a.head_dim + 2)]);
        for (int w = 0; w < WARPS; w++)
            if (shared[w * (a.head_dim + 2) + 1] != 0)
                total += shared[w * (a.head_dim + 2) + 1] * expf(shared[w * (a.head_dim + 2)] - highest);
        for (int64_t d = threadIdx.x; d < a.head_dim; d += THREADS) {
            float x = 0;
            for (int w = 0; w < WARPS; w++)
                if (shared[w * (a.head_dim + 2) + 1] != 0)
                    x += shared[w * (a.head_dim + 2) + 2 + d] * expf(shared[w * (a.head_dim + 2)] - highest);
            out[2 + d] = x;
        }
        if (threadIdx.x == 0) out[0] = highest, out[1] = total;
        __syncthreads();
    }
}

template <class T> __global__ void __launch_bounds__(THREADS) merge(PagedAttention a, int64_t splits, const float* partial) {
    int64_t b = blockIdx.x, kv_head = blockIdx.y, group = divide(a.heads, a.kv_heads), width = a.head_dim + 2;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Shape s = shape_of(a, b);
    bool readable = is_readable(a, s);
    int64_t used = readable ? (s.length + split_of(s) - 1) / split_of(s) : 0;
    int64_t first = max(s.first_row, int64_t{0}), last = min(s.first_row + s.tokens, a.rows);
    // Rows of q past the last sequence are the last sequence's to clear.
    int64_t cleared = b == a.sequences - 1 ? a.rows : last;
    for (int64_t i = warp; i < (cleared - first) * group; i += WARPS) {
        int64_t r = first + divide(i, group), head = kv_head * group + i - (r - first) * group;
        T* o = static_cast<T*>(a.o) + (r * a.heads + head) * a.head_dim;
        const float* from = partial + (r * a.heads + head) * splits * width;
        float highest = -INFINITY, total = 0;
        if (r < last) {
            for (int64_t k = 0; k < used; k++) highest = fmaxf(highest, from[k * width]);
            for (int64_t k = 0; k < used; k++)
                if (from[k * width + 1] != 0) total += from[k * width + 1] * expf(from[k * width] - highest);
        }
        for (int64_t d = lane; d < a.head_dim; d += 32) {
            float x = 0;
            if (r < last && !readable) x = NAN;
            if (r < last && used > 0) {
                for (int64_t k = 0; k < used; k++)
                    if (from[k * width + 1] != 0) x += from[k * width + 2 + d] * expf(from[k * width] - highest);  // 0: saw no key
                x /= total;
            }
            o[d] = narrow<T>(x);
        }
    }
}

// A grid has no size of 0.
int64_t splits_of(int64_t max_length) { return min(max(int64_t{1}, ceil_div(max_length, SPLIT)), MAX_SPLITS); }

template <class T> void launch(const PagedAttention& a, int64_t max_length, float* partial, cudaStream_t stream) {
    int64_t splits = splits_of(max_length);
    if (a.sequences == 0) {
        (void)cudaMemsetAsync(a.o, 0, static_cast<size_t>(a.rows * a.heads * a.head_dim) * sizeof(T), stream);
        return;
    }
    dim3 rows(static_cast<unsigned>(a.sequences), static_cast<unsigned>(a.kv_heads));
    dim3 pieces(rows.x, rows.y, static_cast<unsigned>(splits));
    attend<T><<<pieces, THREADS, sizeof(float) * WARPS * static_cast<size_t>(a.head_dim + 2), stream>>>(a, splits, partial);
    merge<T><<<rows, THREADS, 0, stream>>>(a, splits, partial);
}

}  // namespace

int64_t paged_attention_partials(const PagedAttention& a, int64_t max_length) {
    return a.rows * a.heads * splits_of(max_length) * (a.head_dim + 2);
}

void paged_attention(const PagedAttention& a, int64_t max_length, float* partial, cudaStream_t stream) {
    PSANN_FOR_TYPE(a.type, launch, a, max_length, partial, stream)
}

}  // namespace cuda
