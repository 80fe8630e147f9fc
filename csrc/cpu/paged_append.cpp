// Writes new keys (rotated) and values into their slots; the definition is paged_attention.py's reference_append.
#include <string.h>

#include "../kernels.h"
#include "../memory.h"
#include "../threads.h"
#include "rotary.h"

namespace PSANN_NAMESPACE {
namespace {

constexpr int64_t GRAIN = 1 << 15;  // elements below which one thread is faster

template <class T> INLINE void store_rounded(T* to, const float* from, int64_t count) {
    int64_t d = 0;
    for (; d + WIDTH <= count; d += WIDTH) store(to + d, load(from + d));
    if (d < count) store(to + d, load(from + d, count - d), count - d);
}

template <class T> static void append(const PagedAppend& a) {
    int64_t piece_tokens = 8;
    int threads = a.tokens * a.heads * a.head_dim < GRAIN ? 1 : a.threads;
    parallel(threads, (a.tokens + piece_tokens - 1) / piece_tokens, [&](int64_t piece) {
        Workspace turned(a.head_dim);
        int64_t end = (piece + 1) * piece_tokens < a.tokens ? (piece + 1) * piece_tokens : a.tokens;
        for (int64_t t = piece * piece_tokens; t < end; t++) {
            int64_t slot = a.slot_mapping[t];
            if (slot < 0) continue;
            int64_t block = slot / a.block_size, offset = slot % a.block_size;
            for (int64_t h = 0; h < a.heads; h++) {
                const T* k = static_cast<const T*>(a.k) + t * a.k_stride + h * a.k_head_stride;
                const T* v = static_cast<const T*>(a.v) + t * a.v_stride + h * a.v_head_stride;
                T* k_slot = static_cast<T*>(a.k_cache.data) + block * a.k_cache.block_stride + offset * a.k_cache.slot_stride +
                    h * a.k_cache.head_stride;
                T* v_slot = static_cast<T*>(a.v_cache.data) + block * a.v_cache.block_stride + offset * a.v_cache.slot_stride +
                    h * a.v_cache.head_stride;
                if (a.rotary.cos != nullptr) {
                    rotate(a.rotary, a.positions[t], a.head_dim, k, turned.data, 1.0f);
                    store_rounded(k_slot, turned.data, a.head_dim);
                } else {
                    memcpy(k_slot, k, sizeof(T) * static_cast<size_t>(a.head_dim));
                }
                memcpy(v_slot, v, sizeof(T) * static_cast<size_t>(a.head_dim));
            }
        }
    });
}

}  // namespace

void paged_append(const PagedAppend& a) {
    a.type == Type::FLOAT32 ? append<float>(a) : a.type == Type::BFLOAT16 ? append<bf16>(a) : append<fp16>(a);
}

}  // namespace PSANN_NAMESPACE
