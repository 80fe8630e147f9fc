// Attention of the newest tokens of each sequence over its blocks; the definition is paged_attention.py's reference_attention.
//
// The time of one new token is that of reading its keys and values once: 2 * seq_len * kv_heads * head_dim * itemsize bytes. So a
// piece of work is one sequence's keys from SPLIT * s to SPLIT * (s + 1), for one key/value head and all the queries that share
// it; the next tile's rows are fetched while this one's are used; and each piece leaves its maximum, sum and unscaled output for a
// merge. Where splits lie depends on positions alone, so a sequence gets the same bits whoever shares the call. More than
// SPLIT_TOKENS new tokens are pieces enough by themselves: those are taken CHUNK at a time and see all their keys in one piece.
#include <math.h>

#include "../kernels.h"
#include "../threads.h"
#include "rotary.h"
#include "sine.h"

namespace PSANN_NAMESPACE {
namespace {

constexpr int64_t TILE_KEYS = 64;
constexpr int64_t SPLIT = 256;
constexpr int64_t SPLIT_TOKENS = 16;
constexpr int64_t CHUNK = 16;
static_assert(SPLIT % TILE_KEYS == 0, "a tile lies in one split");

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// One sequence's share of the pieces.
struct Sequence {
    int64_t first_row, tokens, length;
    int64_t oldest;             // first key that any of its new tokens sees
    int64_t chunks, splits, first_split;
    int64_t first_piece, first_partial;
    bool is_split;
};

static int64_t oldest_seen(const PagedAttention& a, int64_t position) { return a.window > 0 ? larger(0, position - a.window + 1) : 0; }

// Queries that share a key/value head, in one piece: row r is new token r / group, query head r % group of the head's.
struct Rows {
    int64_t count, stride;      // stride: head_dim padded to whole vectors
    float *q, *o;               // (count, stride); q times softmax_scale * log2(e)
    float *scores;              // (count, TILE_KEYS)
    float *largest, *sum;       // (count): in units of log2
    int64_t *from, *to;         // (count): keys that the row sees
    float *slope;               // (count): taken off per token of distance
};

static int64_t floats_for_rows(int64_t count, int64_t stride) { return count * (2 * stride + TILE_KEYS + 3 + 4); }

static Rows rows_in(float* memory, int64_t count, int64_t stride) {
    Rows r = {count, stride, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    r.from = reinterpret_cast<int64_t*>(memory);
    r.to = r.from + count;
    r.q = reinterpret_cast<float*>(r.to + count);
    r.o = r.q + count * stride;
    r.scores = r.o + count * stride;
    r.largest = r.scores + count * TILE_KEYS;
    r.sum = r.largest + count;
    r.slope = r.sum + count;
    return r;
}

template <class T> static void fill_rows(const PagedAttention& a, const Sequence& s, int64_t kv_head, int64_t first_token, const Rows& rows) {
    int64_t group = a.heads / a.kv_heads;
    for (int64_t r = 0; r < rows.count; r++) {
        int64_t token = first_token + r / group, head = kv_head * group + r % group, position = s.length - s.tokens + token;
        const T* q = static_cast<const T*>(a.q) + (s.first_row + token) * a.q_stride + head * a.q_head_stride;
        for (int64_t d = a.head_dim; d < rows.stride; d++) rows.q[r * rows.stride + d] = 0.0f;
        for (int64_t d = 0; d < rows.stride; d++) rows.o[r * rows.stride + d] = 0.0f;
        rotate(a.rotary, position, a.head_dim, q, rows.q + r * rows.stride, a.softmax_scale * LOG2_E);
        rows.largest[r] = -INFINITY;
        rows.sum[r] = 0.0f;
        rows.from[r] = oldest_seen(a, position);
        rows.to[r] = position + 1;
        rows.slope[r] = a.alibi_slopes != nullptr ? a.alibi_slopes[head] * LOG2_E : 0.0f;
    }
}

template <class T> struct Tile {
    int64_t begin, end;  // keys
    const T *k[TILE_KEYS], *v[TILE_KEYS];
};

template <class T> static void find_tile(const PagedAttention& a, int64_t sequence, int64_t kv_head, int64_t begin, int64_t end, Tile<T>& tile) {
    tile.begin = begin;
    tile.end = end;
    const int32_t* table = a.block_table + sequence * a.table_stride;
    for (int64_t key = begin; key < end; key++) {
        int64_t block = table[key / a.block_size], slot = key % a.block_size;
        const Cache &k = a.k_cache, &v = a.v_cache;
        tile.k[key - begin] = static_cast<const T*>(k.data) + block * k.block_stride + slot * k.slot_stride + kv_head * k.head_stride;
        tile.v[key - begin] = static_cast<const T*>(v.data) + block * v.block_stride + slot * v.slot_stride + kv_head * v.head_stride;
        for (int64_t d = 0; d < a.head_dim; d += 64 / static_cast<int64_t>(sizeof(T))) {
            __builtin_prefetch(tile.k[key - begin] + d, 0, 2);
            __builtin_prefetch(tile.v[key - begin] + d, 0, 2);
        }
    }
}

// Scores of R rows with the tile's keys first to last - 1.
template <int R, class T> INLINE void score(const Rows& rows, int64_t row, const Tile<T>& tile, int64_t head_dim, int64_t first, int64_t last) {
    const float* q = rows.q + row * rows.stride;
    float* out = rows.scores + row * TILE_KEYS;
    for (int64_t key = first; key < last; key++) {
        Float sums[R] = {};
        const T* k = tile.k[key];
        int64_t d = 0;
        for (; d + WIDTH <= head_dim; d += WIDTH) {
            Float x = load(k + d);
            for (int r = 0; r < R; r++) sums[r] = fma(load(q + r * rows.stride + d), x, sums[r]);
        }
        if (d < head_dim) {
            Float x = load(k + d, head_dim - d);
            for (int r = 0; r < R; r++) sums[r] = fma(load(q + r * rows.stride + d), x, sums[r]);
        }
        for (int r = 0; r < R; r++) out[r * TILE_KEYS + key] = sum(sums[r]);
    }
}

// Turns a row's scores first to last - 1 into probabilities (unscaled), and brings its earlier sum and output to the new maximum.
INLINE void renew(const Rows& rows, int64_t row, int64_t tile_begin, int64_t first, int64_t last) {
    float *s = rows.scores + row * TILE_KEYS, *o = rows.o + row * rows.stride, largest = rows.largest[row];
    if (rows.slope[row] != 0.0f) {
        for (int64_t key = first; key < last; key++) s[key] -= rows.slope[row] * static_cast<float>(rows.to[row] - 1 - (tile_begin + key));
    }
    for (int64_t key = first; key < last; key++) largest = s[key] > largest ? s[key] : largest;
    // The lanes around the row's keys become 0.
    int64_t begin = first / WIDTH * WIDTH, end = (last + WIDTH - 1) / WIDTH * WIDTH;
    for (int64_t key = begin; key < first; key++) s[key] = -INFINITY;
    for (int64_t key = last; key < end; key++) s[key] = -INFINITY;
    float factor = rows.largest[row] == largest ? 1.0f : exp2f(rows.largest[row] - largest);
    Float total = {};
    for (int64_t key = begin; key < end; key += WIDTH) {
        Float x = load(s + key) - largest, p = exp2_product_any(x, all(1.0f));
        p = x == x ? p : x;
        store(s + key, p);
        total += p;
    }
    rows.sum[row] = rows.sum[row] * factor + sum(total);
    rows.largest[row] = largest;
    if (factor == 1.0f) return;
    for (int64_t d = 0; d < rows.stride; d += WIDTH) store(o + d, load(o + d) * factor);
}

// Adds to R rows' outputs, features d to d + N * WIDTH (the last `lanes` of them exist), their probabilities times the values.
template <int R, int N, class T> INLINE void gather(const Rows& rows, int64_t row, const Tile<T>& tile, int64_t d, int64_t lanes, int64_t first, int64_t last) {
    float *o = rows.o + row * rows.stride + d, *p = rows.scores + row * TILE_KEYS;
    Float sums[R][N];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) sums[r][n] = load(o + r * rows.stride + n * WIDTH);
    for (int64_t key = first; key < last; key++) {
        for (int n = 0; n < N; n++) {
            Float v = lanes == WIDTH ? load(tile.v[key] + d + n * WIDTH) : load(tile.v[key] + d, lanes);
            for (int r = 0; r < R; r++) sums[r][n] = fma(all(p[r * TILE_KEYS + key]), v, sums[r][n]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) store(o + r * rows.stride + n * WIDTH, sums[r][n]);
}

template <int R, class T> INLINE void gather_all(const Rows& rows, int64_t row, const Tile<T>& tile, int64_t head_dim, int64_t first, int64_t last) {
    constexpr int N = R == 1 ? 8 : 4;
    int64_t d = 0;
    for (; d + N * WIDTH <= head_dim; d += N * WIDTH) gather<R, N>(rows, row, tile, d, WIDTH, first, last);
    for (; d < head_dim; d += WIDTH) gather<R, 1>(rows, row, tile, d, smaller(WIDTH, head_dim - d), first, last);
}

// A row's keys within the tile, counted from its begin.
template <class T> INLINE void seen(const Rows& rows, int64_t row, const Tile<T>& tile, int64_t& first, int64_t& last) {
    first = larger(rows.from[row], tile.begin) - tile.begin;
    last = larger(first, smaller(rows.to[row], tile.end) - tile.begin);
}

template <class T> static void attend(const Rows& rows, const Tile<T>& tile, int64_t head_dim) {
    for (int64_t r = 0; r < rows.count;) {
        // Scores of keys that a row does not see are computed with its neighbours' and left out of its sums.
        int64_t n = rows.count - r >= 4 ? 4 : rows.count - r >= 2 ? 2 : 1, first = TILE_KEYS, last = 0;
        for (int64_t i = r; i < r + n; i++) {
            int64_t f, l;
            seen(rows, i, tile, f, l);
            if (f < l) first = smaller(first, f), last = larger(last, l);
        }
        if (first < last) n == 4 ? score<4>(rows, r, tile, head_dim, first, last) : n == 2 ? score<2>(rows, r, tile, head_dim, first, last) : score<1>(rows, r, tile, head_dim, first, last);
        r += n;
    }
    for (int64_t r = 0; r < rows.count; r++) {
        int64_t f, l;
        seen(rows, r, tile, f, l);
        if (f < l) renew(rows, r, tile.begin, f, l);
    }
    for (int64_t r = 0; r < rows.count; r++) {
        int64_t f, l, next_f = -1, next_l = -1;
        seen(rows, r, tile, f, l);
        if (f >= l) continue;
        // Only rows that see the same keys go together: a key that one of them must not see could be NaN, and 0 * NaN is NaN.
        if (r + 1 < rows.count) seen(rows, r + 1, tile, next_f, next_l);
        if (next_f == f && next_l == l) gather_all<2>(rows, r++, tile, head_dim, f, l);
        else gather_all<1>(rows, r, tile, head_dim, f, l);
    }
}

template <class T> static void attend_range(const PagedAttention& a, int64_t sequence, int64_t kv_head, const Rows& rows, int64_t begin, int64_t end) {
    Tile<T> tiles[2];
    int64_t tile_end = smaller(begin / TILE_KEYS * TILE_KEYS + TILE_KEYS, end);
    find_tile(a, sequence, kv_head, begin, tile_end, tiles[0]);
    for (int i = 0; begin < end; i ^= 1) {
        begin = tile_end;
        tile_end = smaller(begin + TILE_KEYS, end);
        if (begin < end) find_tile(a, sequence, kv_head, begin, tile_end, tiles[i ^ 1]);
        attend(rows, tiles[i], a.head_dim);
    }
}

template <class T> INLINE void store_row(T* to, const float* from, int64_t count, float factor) {
    int64_t d = 0;
    for (; d + WIDTH <= count; d += WIDTH) store(to + d, load(from + d) * factor);
    if (d < count) store(to + d, load(from + d) * factor, count - d);
}

template <class T> INLINE T* output_row(const PagedAttention& a, const Sequence& s, int64_t kv_head, int64_t first_token, int64_t r) {
    int64_t group = a.heads / a.kv_heads;
    return static_cast<T*>(a.o) + ((s.first_row + first_token + r / group) * a.heads + kv_head * group + r % group) * a.head_dim;
}

template <class T> static void merge(const PagedAttention& a, const Sequence& s, int64_t kv_head, int64_t stride, const float* partials) {
    int64_t count = s.tokens * (a.heads / a.kv_heads), step = a.kv_heads * count * (stride + 2);
    Workspace row(stride);
    for (int64_t r = 0; r < count; r++) {
        const float* first = partials + s.first_partial + (kv_head * count + r) * (stride + 2);
        float largest = -INFINITY, total = 0.0f;
        for (int64_t i = 0; i < s.splits; i++) largest = first[i * step] > largest ? first[i * step] : largest;
        for (int64_t d = 0; d < stride; d++) row.data[d] = 0.0f;
        for (int64_t i = 0; i < s.splits; i++) {
            const float* p = first + i * step;
            if (p[1] == 0.0f) continue;  // saw no key
            float factor = p[0] == largest ? 1.0f : exp2f(p[0] - largest);
            total += p[1] * factor;
            for (int64_t d = 0; d < stride; d += WIDTH) store(row.data + d, fma(all(factor), load(p + 2 + d), load(row.data + d)));
        }
        store_row(output_row<T>(a, s, kv_head, 0, r), row.data, a.head_dim, 1.0f / total);
    }
}

template <class T> static void zero_rows(const PagedAttention& a, int64_t begin, int64_t end) {
    T* o = static_cast<T*>(a.o);
    for (int64_t i = begin * a.heads * a.head_dim; i < end * a.heads * a.head_dim; i++) o[i] = T{};
}

template <class T> static void run(const PagedAttention& a) {
    int64_t stride = (a.head_dim + WIDTH - 1) / WIDTH * WIDTH, group = a.heads / a.kv_heads;
    Workspace memory(a.sequences * static_cast<int64_t>(sizeof(Sequence) / sizeof(float)));
    Sequence* sequences = reinterpret_cast<Sequence*>(memory.data);
    int64_t pieces = 0, partial_floats = 0, work = 0;
    for (int64_t b = 0; b < a.sequences; b++) {
        Sequence& s = sequences[b];
        s.first_row = a.cu_seqlens_q[b];
        s.tokens = a.cu_seqlens_q[b + 1] - a.cu_seqlens_q[b];
        s.length = a.seq_lens[b];
        if (s.length == 0) {
            zero_rows<T>(a, s.first_row, s.first_row + s.tokens);
            s.tokens = 0;
        }
        s.oldest = s.tokens > 0 ? oldest_seen(a, s.length - s.tokens) : 0;
        s.first_split = s.oldest / SPLIT;
        s.is_split = s.tokens <= SPLIT_TOKENS;
        s.splits = s.tokens == 0 ? 0 : s.is_split ? (s.length + SPLIT - 1) / SPLIT - s.first_split : 1;
        s.chunks = s.is_split ? 1 : (s.tokens + CHUNK - 1) / CHUNK;
        s.first_piece = pieces;
        s.first_partial = partial_floats;
        pieces += s.chunks * s.splits * a.kv_heads;
        if (s.is_split) partial_floats += s.splits * s.tokens * a.heads * (stride + 2);
        work += s.tokens * s.length * a.heads * a.head_dim;
    }
    zero_rows<T>(a, a.cu_seqlens_q[a.sequences], a.rows);
    int threads = work < (1 << 16) ? 1 : a.threads;
    Workspace partials(partial_floats);

    parallel(threads, pieces, [&](int64_t piece) {
        int64_t b = 0;
        for (int64_t high = a.sequences; high - b > 1;) {
            int64_t middle = (b + high) / 2;
            (sequences[middle].first_piece <= piece ? b : high) = middle;
        }
        const Sequence& s = sequences[b];
        piece -= s.first_piece;
        int64_t kv_head = piece % a.kv_heads, split = piece / a.kv_heads % s.splits, chunk = piece / a.kv_heads / s.splits;
        int64_t first_token = chunk * CHUNK, tokens = s.is_split ? s.tokens : smaller(CHUNK, s.tokens - first_token), count = tokens * group;
        Workspace scratch(floats_for_rows(count, stride));
        Rows rows = rows_in(scratch.data, count, stride);
        fill_rows<T>(a, s, kv_head, first_token, rows);
        int64_t begin = rows.from[0], end = rows.to[count - 1];
        if (s.is_split) {
            begin = larger(begin, (s.first_split + split) * SPLIT);
            end = smaller(end, (s.first_split + split + 1) * SPLIT);
        }
        attend_range<T>(a, b, kv_head, rows, begin, end);
        for (int64_t r = 0; r < count; r++) {
            if (!s.is_split) {
                store_row(output_row<T>(a, s, kv_head, first_token, r), rows.o + r * stride, a.head_dim, 1.0f / rows.sum[r]);
                continue;
            }
            float* p = partials.data + s.first_partial + ((split * a.kv_heads + kv_head) * count + r) * (stride + 2);
            p[0] = rows.largest[r];
            p[1] = rows.sum[r];
            for (int64_t d = 0; d < stride; d += WIDTH) store(p + 2 + d, load(rows.o + r * stride + d));
        }
    });
    parallel(threads, a.sequences * a.kv_heads, [&](int64_t i) {
        const Sequence& s = sequences[i / a.kv_heads];
        if (s.is_split && s.tokens > 0) merge<T>(a, s, i % a.kv_heads, stride, partials.data);
    });
}

}  // namespace

void paged_attention(const PagedAttention& a) {
    a.type == Type::FLOAT32 ? run<float>(a) : a.type == Type::BFLOAT16 ? run<bf16>(a) : run<fp16>(a);
}

}  // namespace PSANN_NAMESPACE
