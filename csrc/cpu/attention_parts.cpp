// What attention of short windows does besides its matrix products, which are somebody else's; the definition is
// rope_attention.py's reference, the products are in rope_attention_dense.py.
//
// turn_heads moves heads between the layout of activations, (row, token, head, feature), and that of batched products,
// (row, head, token, feature), rotates them on the way, and widens or narrows them. Among products a rotated head holds the first
// numbers of all its pairs, then the second ones, whichever way they are paired outside: products of two such heads do not mind.
// The softmax and its derivative work on whole rows of scores; what a query does not see is neither read nor counted, and comes out
// 0.
#include <math.h>

#include "../kernels.h"
#include "../memory.h"
#include "../threads.h"
#include "sine.h"

namespace PSANN_NAMESPACE {
namespace {

constexpr int64_t GRAIN = 1 << 14;  // elements below which one thread is faster
constexpr int64_t PIECE = 1 << 12;  // elements of a piece of work, about

// The first and the second numbers of WIDTH adjacent pairs.
template <class T> INLINE void split_pairs(const T* p, Float& a, Float& b) {
    Float low = load(p), high = load(p + WIDTH);
#if defined(PSANN_AVX512)
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    a = (Float)_mm512_permutex2var_ps((__m512)low, even, (__m512)high);
    b = (Float)_mm512_permutex2var_ps((__m512)low, odd, (__m512)high);
#else
    for (int i = 0; i < WIDTH; i++) {
        a[i] = i < WIDTH / 2 ? low[2 * i] : high[2 * i - WIDTH];
        b[i] = i < WIDTH / 2 ? low[2 * i + 1] : high[2 * i + 1 - WIDTH];
    }
#endif
}
INLINE void split_pairs(const bf16* p, Float& a, Float& b) {
    Float pair[2];
    load_pair(p, pair);
    a = pair[0];
    b = pair[1];
}
template <class T> INLINE void join_pairs(T* p, Float a, Float b) {
    Float pair[2] = {a, b};
#if defined(PSANN_AVX512)
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    pair[0] = (Float)_mm512_permutex2var_ps((__m512)a, low, (__m512)b);
    pair[1] = (Float)_mm512_permutex2var_ps((__m512)a, high, (__m512)b);
#else
    straighten_pair(pair, static_cast<const bf16*>(nullptr));
#endif
    store(p, pair[0]);
    store(p + WIDTH, pair[1]);
}
INLINE void join_pairs(bf16* p, Float a, Float b) {
    *reinterpret_cast<UintAnywhere*>(p) = uints(narrow_bf16(a)) | (uints(narrow_bf16(b)) << 16);
}
template <class T> INLINE void split_pairs(const T* p, int64_t count, Float& a, Float& b) {
    if (count == WIDTH) return split_pairs(p, a, b);
    T lanes[2 * WIDTH] = {};
    for (int64_t i = 0; i < 2 * count; i++) lanes[i] = p[i];
    split_pairs(static_cast<const T*>(lanes), a, b);
}
template <class T> INLINE void join_pairs(T* p, int64_t count, Float a, Float b) {
    if (count == WIDTH) return join_pairs(p, a, b);
    T lanes[2 * WIDTH];
    join_pairs(static_cast<T*>(lanes), a, b);
    for (int64_t i = 0; i < 2 * count; i++) p[i] = lanes[i];
}

template <class In, class Out> static void turn(const TurnHeads& a) {
    int64_t half = a.head_dim / 2, per_token = a.heads * a.head_dim, tokens = a.batch * a.tokens;
    int64_t piece_tokens = PIECE / per_token + 1;
    bool is_rotated = a.rotary.cos != nullptr, is_inward = a.direction > 0, is_interleaved = a.rotary.interleaved;
    parallel(tokens * per_token < GRAIN ? 1 : a.threads, (tokens + piece_tokens - 1) / piece_tokens, [&](int64_t piece) {
        int64_t end = (piece + 1) * piece_tokens < tokens ? (piece + 1) * piece_tokens : tokens;
        for (int64_t n = piece * piece_tokens; n < end; n++) {
            int64_t b = n / a.tokens, t = n % a.tokens, place = a.offset + t;
            const In* in = static_cast<const In*>(a.in) + b * a.in_batch_stride + t * a.in_token_stride;
            Out* out = static_cast<Out*>(a.out) + b * a.out_batch_stride + t * a.out_token_stride;
            int64_t position = a.first == nullptr ? place : place - a.first[b * a.first_stride + place];
            const float *cos = is_rotated ? a.rotary.cos + position * half : nullptr;
            const float *sin = is_rotated ? a.rotary.sin + position * half : nullptr;
            for (int64_t h = 0; h < a.heads; h++, in += a.in_head_stride, out += a.out_head_stride) {
                bf16* narrow = a.narrow == nullptr ? nullptr : static_cast<bf16*>(a.narrow) + (out - static_cast<Out*>(a.out));
                if (!is_rotated) {
                    each_vector(0, a.head_dim, [&](int64_t c, int64_t count) INLINE_LAMBDA {
                        Float x = take(in + c, count) * a.factor;
                        give(out + c, x, count);
                        if (narrow != nullptr) give(narrow + c, x, count);
                    });
                    continue;
                }
                each_vector(0, half, [&](int64_t c, int64_t count) INLINE_LAMBDA {
                    Float x, y, of_x = take(cos + c, count) * a.factor, of_y = take(sin + c, count) * a.factor;
                    if (is_inward && is_interleaved) {
                        split_pairs(in + 2 * c, count, x, y);
                    } else {
                        x = take(in + c, count);
                        y = take(in + half + c, count);
                    }
                    if (!is_inward) of_y = -of_y;
                    Float first = x * of_x - y * of_y, second = y * of_x + x * of_y;
                    if (!is_inward && is_interleaved) {
                        join_pairs(out + 2 * c, count, first, second);
                    } else {
                        give(out + c, first, count);
                        give(out + half + c, second, count);
                    }
                    if (narrow != nullptr) {
                        give(narrow + c, first, count);
                        give(narrow + half + c, second, count);
                    }
                });
            }
        }
    });
}

// body(row, from, to, slope, at, own) for each row of scores: its query stands at key `at` and sees the keys from `from` to before
// `to`; `own` has room for a row, in this core's first cache, where the scores may lie in another's.
template <class Body> INLINE void each_row(const Scores& s, int threads, const Body& body) {
    int64_t rows = s.batch * s.heads * s.queries, piece_rows = PIECE / (s.keys + 1) + 1;
    parallel(rows * s.keys < GRAIN ? 1 : threads, (rows + piece_rows - 1) / piece_rows, [&](int64_t piece) {
        int64_t end = (piece + 1) * piece_rows < rows ? (piece + 1) * piece_rows : rows;
        int64_t row = piece * piece_rows, i = row % s.queries, h = row / s.queries % s.heads, b = row / s.queries / s.heads;
        Workspace own(s.keys);
        for (; row < end; row++, i++) {
            if (i == s.queries) {
                i = 0;
                if (++h == s.heads) h = 0, b++;
            }
            int64_t at = s.offset + i, from = s.first == nullptr ? 0 : s.first[b * s.first_stride + at];
            if (s.window > 0 && from < at - s.window + 1) from = at - s.window + 1;
            body(row, from, at + 1, s.slopes == nullptr ? 0.0f : s.slopes[h], at, own.data);
        }
    });
}

template <class T> INLINE void clear(T* p, int64_t begin, int64_t end) {
    each_vector(begin, end, [&](int64_t c, int64_t count) INLINE_LAMBDA { give(p + c, Float{}, count); });
}

template <class T> static void softmax(const SoftmaxScores& a) {
    each_row(a.scores, a.threads, [&](int64_t row, int64_t from, int64_t to, float slope, int64_t at, float* e) {
        const float* s = a.values + row * a.scores.keys;
        T* p = static_cast<T*>(a.p) + row * a.scores.keys;
        if (slope != 0.0f) {
            for (int64_t j = from; j < to; j++) e[j] = s[j] + slope * static_cast<float>(j - at);
            s = e;
        }
        Float highest = all(s[from]);
        each_vector(from, to, [&](int64_t c, int64_t count) INLINE_LAMBDA {
            highest = max(first_of(take(s + c, count), highest, count), highest);
        });
        float largest = maximum_of_every<1>(highest)[0];
        Float total = {};
        // NaN, and what infinity less infinity is, stay NaN, and so does their sum.
        each_vector(from, to, [&](int64_t c, int64_t count) INLINE_LAMBDA {
            Float below[1] = {first_of(take(s + c, count) - largest, all(-INFINITY), count) * LOG2_E}, part[1];
            exp2_at_most_one(below, part);
            give(e + c, part[0], count);
            total += part[0];
        });
        float share = 1.0f / sum(total);
        clear(p, 0, from);
        each_vector(from, to, [&](int64_t k, int64_t count) INLINE_LAMBDA { give(p + k, take(e + k, count) * share, count); });
        clear(p, to, a.scores.keys);
    });
}

template <class T> static void softmax_backward(const SoftmaxScoresBackward& a) {
    each_row(a.scores, a.threads, [&](int64_t row, int64_t from, int64_t to, float, int64_t, float*) {
        const T* p = static_cast<const T*>(a.p) + row * a.scores.keys;
        T* dp = static_cast<T*>(a.dp) + row * a.scores.keys;
        Float products = {};
        each_vector(from, to, [&](int64_t c, int64_t count) INLINE_LAMBDA {
            products = fma(take(p + c, count), take(dp + c, count), products);
        });
        float pull = sum(products);
        clear(dp, 0, from);
        each_vector(from, to, [&](int64_t c, int64_t count) INLINE_LAMBDA {
            give(dp + c, take(p + c, count) * (take(dp + c, count) - pull), count);
        });
        clear(dp, to, a.scores.keys);
    });
}

}  // namespace

void turn_heads(const TurnHeads& a) {
    with_type(a.in_type, [&](auto in) { with_type(a.out_type, [&](auto out) { turn<decltype(in), decltype(out)>(a); }); });
}

void softmax_scores(const SoftmaxScores& a) { a.type == Type::FLOAT32 ? softmax<float>(a) : softmax<bf16>(a); }

void softmax_scores_backward(const SoftmaxScoresBackward& a) {
    a.type == Type::FLOAT32 ? softmax_backward<float>(a) : softmax_backward<bf16>(a);
}

}  // namespace PSANN_NAMESPACE
