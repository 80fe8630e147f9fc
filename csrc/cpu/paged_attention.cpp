// Attention of the newest tokens of each sequence over its blocks; the definition is paged_attention.py's reference_attention.
//
// The time of one new token is that of reading its keys and values once: 2 * seq_len * kv_heads * head_dim * itemsize bytes. So a
// piece of work is one split of a sequence's keys for all heads, in the order in which they lie in memory, and the next tile is
// fetched while this one is used; each piece leaves its maximum, sum and unscaled output for a merge. Where splits lie depends on
// positions alone, so a sequence gets the same bits whoever shares the call. More than SPLIT_TOKENS new tokens reuse what they
// read: they are taken CHUNK at a time, one key/value head and all its keys a piece.
#include <math.h>

#include "../kernels.h"
#include "../memory.h"
#include "../threads.h"
#include "rotary.h"
#include "sine.h"

namespace PSANN_NAMESPACE {
namespace {

constexpr int64_t TILE_KEYS = 16;
constexpr int64_t SPLIT = 128;        // keys of a split among the first FINE, so that short sequences feed several threads
constexpr int64_t FINE = 1024;
constexpr int64_t LONG_SPLIT = 512;   // beyond: a split costs its queries' preparation, and its first tile is fetched by nobody
constexpr int64_t SPLIT_TOKENS = 16;
constexpr int64_t CHUNK = 16;
constexpr int64_t GATHERED = 16;  // keys whose values are added to one row before the next row's turn
static_assert(SPLIT % TILE_KEYS == 0 && LONG_SPLIT % TILE_KEYS == 0 && FINE % SPLIT == 0 && FINE % LONG_SPLIT == 0,
    "a tile lies in one split");

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t split_of(int64_t key) { return key < FINE ? key / SPLIT : (key - FINE) / LONG_SPLIT + FINE / SPLIT; }
static int64_t split_begin(int64_t split) {
    return split < FINE / SPLIT ? split * SPLIT : (split - FINE / SPLIT) * LONG_SPLIT + FINE;
}

// One sequence's share of the pieces.
struct Sequence {
    int64_t first_row, tokens, length;
    int64_t oldest;             // first key that any of its new tokens sees
    int64_t chunks, splits, first_split;
    int64_t first_piece, first_partial;
    bool is_split;
};

static int64_t oldest_seen(const PagedAttention& a, int64_t position) {
    return a.window > 0 ? larger(0, position - a.window + 1) : 0;
}

// The queries of one piece, head after head: row (head - first_head) * per_head + r is new token r / group of query head
// head * group + r % group, where `head` is the key/value head that the group shares.
struct Rows {
    int64_t count, per_head, first_head, stride;  // stride: head_dim padded to pairs of vectors
    float *q, *o;                                 // (count, stride), laid out as load_pair gives keys; q times
                                                  // softmax_scale * log2(e)
    float *scores;                                // (count, TILE_KEYS)
    float *largest, *sum;                         // (count): in units of log2
    float *slope;                                 // (count): taken off per token of distance
    int64_t *from, *to;                           // (count): keys that the row sees
    int64_t *first, *last;                        // (count): those in the tile at hand, counted from its begin
};

int64_t floats_for_rows(int64_t count, int64_t stride) { return count * (2 * stride + TILE_KEYS + 3 + 8); }

Rows rows_in(float* memory, int64_t heads, int64_t per_head, int64_t first_head, int64_t stride) {
    Rows r = {};
    r.count = heads * per_head;
    r.per_head = per_head;
    r.first_head = first_head;
    r.stride = stride;
    r.from = reinterpret_cast<int64_t*>(memory);
    r.to = r.from + r.count;
    r.first = r.to + r.count;
    r.last = r.first + r.count;
    r.q = reinterpret_cast<float*>(r.last + r.count);
    r.o = r.q + r.count * stride;
    r.scores = r.o + r.count * stride;
    r.largest = r.scores + r.count * TILE_KEYS;
    r.sum = r.largest + r.count;
    r.slope = r.sum + r.count;
    return r;
}

template <class T> void fill_rows(const PagedAttention& a, const Sequence& s, int64_t first_token, const Rows& rows) {
    int64_t group = a.heads / a.kv_heads;
    for (int64_t r = 0; r < rows.count; r++) {
        int64_t within = r % rows.per_head, token = first_token + within / group, position = s.length - s.tokens + token;
        int64_t head = (rows.first_head + r / rows.per_head) * group + within % group;
        const T* q = static_cast<const T*>(a.q) + (s.first_row + token) * a.q_stride + head * a.q_head_stride;
        float *turned = rows.o + r * rows.stride, *to = rows.q + r * rows.stride;
        rotate(a.rotary, position, a.head_dim, q, turned, a.softmax_scale * LOG2_E);
        for (int64_t d = 0; d < rows.stride; d++) to[place(d, q)] = d < a.head_dim ? turned[d] : 0.0f;
        for (int64_t d = 0; d < rows.stride; d++) turned[d] = 0.0f;
        rows.largest[r] = -INFINITY;
        rows.sum[r] = 0.0f;
        rows.from[r] = oldest_seen(a, position);
        rows.to[r] = position + 1;
        rows.slope[r] = a.alibi_slopes != nullptr ? a.alibi_slopes[head] * LOG2_E : 0.0f;
    }
}

// Where each key's and value's first head of the piece lies.
template <class T> struct Tile {
    int64_t begin, end;  // keys
    const T *k[TILE_KEYS], *v[TILE_KEYS];
};

template <class T>
void find_tile(const PagedAttention& a, int64_t sequence, const Rows& rows, int64_t begin, int64_t end, Tile<T>& tile) {
    tile.begin = begin;
    tile.end = end;
    const int32_t* table = a.block_table + sequence * a.table_stride + begin / a.block_size;
    int64_t slot = begin % a.block_size;
    auto place = [&](const Cache& cache) {
        return static_cast<const T*>(cache.data) + *table * cache.block_stride + slot * cache.slot_stride +
            rows.first_head * cache.head_stride;
    };
    for (int64_t i = 0; i < end - begin; i++) {
        tile.k[i] = place(a.k_cache);
        tile.v[i] = place(a.v_cache);
        if (++slot == a.block_size) slot = 0, table++;
    }
}

// Fetches the rows of a tile's keys (or values) line by line, in the order of memory.
template <class T> struct Ahead {
    const T* const* places;
    int64_t keys, heads, head_stride, bytes;  // bytes: that lie side by side, of one head or of all
    int64_t key, head;
    const char *line = nullptr, *end = nullptr;

    INLINE_LAMBDA Ahead(const T* const* p, int64_t count, int64_t all_heads, int64_t stride, int64_t head_dim) {
        bool together = stride == head_dim;
        places = p, keys = count, heads = together ? 1 : all_heads, head_stride = stride;
        bytes = head_dim * (together ? all_heads : 1) * static_cast<int64_t>(sizeof(T));
        key = head = 0;
        if (keys > 0) enter();
    }
    INLINE_LAMBDA void enter() {
        line = reinterpret_cast<const char*>(places[key] + head * head_stride);
        end = line + bytes;
    }
    INLINE_LAMBDA void fetch(int64_t lines) {
        for (; lines > 0 && key < keys; lines--) {
            __builtin_prefetch(line, 0, 2);
            line += 64;
            if (line < end) continue;
            if (++head == heads) head = 0, key++;
            if (key < keys) enter();
        }
    }
};

// Scores of R rows with K keys.
template <int R, int K, class T>
INLINE void score(const float* q, int64_t stride, const T* const* keys, int64_t offset, int64_t head_dim, float* out) {
    Float sums[R][K] = {};
    const T* k[K];
    UNROLL for (int i = 0; i < K; i++) k[i] = keys[i] + offset;
    // Keys whose features stand in registers at once; with many rows what is loaded of a row serves two of them.
    constexpr int TOGETHER = R == 4 ? 2 : 1;
    auto add = [&](int64_t d, int64_t count) INLINE_LAMBDA {
        UNROLL for (int i = 0; i < K; i += TOGETHER) {
            Float x[TOGETHER][2];
            UNROLL for (int j = 0; j < TOGETHER; j++) {
                if (count == 2 * WIDTH) load_pair(k[i + j] + d, x[j]);
                else load_pair(k[i + j] + d, count, x[j]);
            }
            UNROLL for (int r = 0; r < R; r++) {
                UNROLL for (int half = 0; half < 2; half++) {
                    Float own = load(q + r * stride + d + half * WIDTH);
                    UNROLL for (int j = 0; j < TOGETHER; j++) sums[r][i + j] = fma(own, x[j][half], sums[r][i + j]);
                }
            }
        }
    };
    int64_t d = 0;
    for (; d + 2 * WIDTH <= head_dim; d += 2 * WIDTH) add(d, 2 * WIDTH);
    if (d < head_dim) add(d, head_dim - d);
    if constexpr (K == 4) {
        UNROLL for (int r = 0; r < R; r++) sum_each(sums[r], out + r * TILE_KEYS);
    } else if constexpr (K == 2 && R % 2 == 0) {
        UNROLL for (int r = 0; r < R; r += 2) {
            float pairs[4];
            sum_each({sums[r][0], sums[r][1], sums[r + 1][0], sums[r + 1][1]}, pairs);
            for (int i = 0; i < 4; i++) out[(r + i / 2) * TILE_KEYS + i % 2] = pairs[i];
        }
    } else {
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int i = 0; i < K; i++) out[r * TILE_KEYS + i] = sum(sums[r][i]);
    }
}

// Scores of all rows of the piece with K keys, from key `key` of the tile.
template <int K, class T>
INLINE void score_all(const PagedAttention& a, const Rows& rows, const Tile<T>& tile, Ahead<T>& ahead, int64_t key) {
    int64_t heads = rows.count / rows.per_head, lines = K * a.head_dim * static_cast<int64_t>(sizeof(T)) / 64 + 1;
    for (int64_t h = 0; h < heads; h++) {
        int64_t offset = h * a.k_cache.head_stride;
        ahead.fetch(lines);
        int64_t r = h * rows.per_head, end = r + rows.per_head;
        if constexpr (K == 4) {
            for (; end - r >= 4; r += 4) {
                score<4, 2>(rows.q + r * rows.stride, rows.stride, tile.k + key, offset, a.head_dim,
                    rows.scores + r * TILE_KEYS + key);
                score<4, 2>(rows.q + r * rows.stride, rows.stride, tile.k + key + 2, offset, a.head_dim,
                    rows.scores + r * TILE_KEYS + key + 2);
            }
        }
        for (; end - r >= 2; r += 2)
            score<2, K>(rows.q + r * rows.stride, rows.stride, tile.k + key, offset, a.head_dim, rows.scores + r * TILE_KEYS + key);
        if (r < end)
            score<1, K>(rows.q + r * rows.stride, rows.stride, tile.k + key, offset, a.head_dim, rows.scores + r * TILE_KEYS + key);
    }
}

// 2^x of an x that is at most 0, or NaN: it is 0 below the least normal number.
INLINE Float exp2_at_most_one(Float x) {
    Float n = x + ROUNDER, p[1];
    Float f[1] = {x - (n - ROUNDER)};
    horner(EXP2, f, p);
    // A product, since a NaN must stay one. What x below -126 makes of f and of the scale is never seen.
    return (Float)((Int)(p[0] * (Float)(((Uint)n << 23) + 0x3f800000u)) & ~(x < -126.0f));
}

// Turns scores first to last - 1 of R rows, which see the same keys, into probabilities (unscaled), and brings the rows' earlier
// sums and outputs to the new maxima. Several rows together, since each waits for its own maximum and sum.
template <int R> INLINE void renew(const Rows& rows, int64_t row, int64_t tile_begin) {
    float* s = rows.scores + row * TILE_KEYS;
    int64_t first = rows.first[row], last = rows.last[row];
    // The lanes around the rows' keys become 0.
    int64_t begin = first / WIDTH * WIDTH, end = (last + WIDTH - 1) / WIDTH * WIDTH;
    Float highest[R];
    float largest[R], total[R];
    EACH(R) {
        float* own = s + i * TILE_KEYS;
        if (float slope = rows.slope[row + i]; slope != 0.0f) {
            int64_t distance = rows.to[row + i] - 1 - tile_begin;
            for (int64_t key = first; key < last; key++) own[key] -= slope * static_cast<float>(distance - key);
        }
        for (int64_t key = begin; key < first; key++) own[key] = -INFINITY;
        for (int64_t key = last; key < end; key++) own[key] = -INFINITY;
        highest[i] = all(rows.largest[row + i]);
    }
    for (int64_t key = begin; key < end; key += WIDTH) EACH(R) highest[i] = max(load(s + i * TILE_KEYS + key), highest[i]);
    EACH(R) largest[i] = maximum(highest[i]), highest[i] = all(largest[i]);
    Float sums[R] = {};
    for (int64_t key = begin; key < end; key += WIDTH) {
        EACH(R) {
            Float p = exp2_at_most_one(load(s + i * TILE_KEYS + key) - highest[i]);
            store(s + i * TILE_KEYS + key, p);
            sums[i] += p;
        }
    }
    if constexpr (R == 4) sum_each(sums, total);
    else EACH(R) total[i] = sum(sums[i]);
    EACH(R) {
        float before = rows.largest[row + i];
        if (before == largest[i]) {
            rows.sum[row + i] += total[i];
            continue;
        }
        float factor = exp2_at_most_one(all(before - largest[i]))[0], *o = rows.o + (row + i) * rows.stride;
        rows.sum[row + i] = rows.sum[row + i] * factor + total[i];
        rows.largest[row + i] = largest[i];
        for (int64_t d = 0; d < rows.stride; d += WIDTH) store(o + d, load(o + d) * factor);
    }
}

// Rows from `row` to `end`, of at most four, that see the same keys of the tile.
INLINE int64_t alike(const Rows& rows, int64_t row, int64_t end) {
    int64_t count = 1;
    auto same = [&](int64_t other) { return rows.first[other] == rows.first[row] && rows.last[other] == rows.last[row]; };
    while (count < 4 && row + count < end && same(row + count)) count++;
    return count;
}

// Adds to R rows' outputs, from feature d on N pairs of vectors (the last of `count` elements), probabilities times the values of
// keys first to last - 1.
template <int R, int N, bool IS_WHOLE, class T>
INLINE void gather(const Rows& rows, int64_t row, const T* const* v, int64_t offset, int64_t d, int64_t count, int64_t first,
                   int64_t last) {
    float *o = rows.o + row * rows.stride + d, *p = rows.scores + row * TILE_KEYS;
    Float sums[R][N][2];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int n = 0; n < N; n++) EACH(2) sums[r][n][i] = load(o + r * rows.stride + (2 * n + i) * WIDTH);
    for (int64_t key = first; key < last; key++) {
        const T* at = v[key] + offset + d;
        Float weight[R];
        EACH(R) weight[i] = all(p[i * TILE_KEYS + key]);
        UNROLL for (int n = 0; n < N; n++) {
            Float x[2];
            if (IS_WHOLE) load_pair(at + 2 * n * WIDTH, x);
            else load_pair(at, count, x);
            UNROLL for (int r = 0; r < R; r++) EACH(2) sums[r][n][i] = fma(weight[r], x[i], sums[r][n][i]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int n = 0; n < N; n++) EACH(2) store(o + r * rows.stride + (2 * n + i) * WIDTH, sums[r][n][i]);
}

template <int R, class T>
INLINE void gather_all(const Rows& rows, int64_t row, const T* const* v, int64_t offset, int64_t head_dim, int64_t first,
                       int64_t last) {
    constexpr int N = R == 1 ? 4 : R == 2 ? 2 : 1, STEP = 2 * WIDTH;
    int64_t d = 0;
    for (; d + N * STEP <= head_dim; d += N * STEP) gather<R, N, true>(rows, row, v, offset, d, STEP, first, last);
    for (; d + STEP <= head_dim; d += STEP) gather<R, 1, true>(rows, row, v, offset, d, STEP, first, last);
    if (d < head_dim) gather<R, 1, false>(rows, row, v, offset, d, head_dim - d, first, last);
}

// `next` is fetched meanwhile, a little beside each piece of work: all of it at once would only be waited for.
template <class T> void attend(const PagedAttention& a, const Rows& rows, const Tile<T>& tile, const Tile<T>& next) {
    int64_t keys = tile.end - tile.begin, heads = rows.count / rows.per_head;
    for (int64_t r = 0; r < rows.count; r++) {
        rows.first[r] = larger(rows.from[r], tile.begin) - tile.begin;
        rows.last[r] = larger(rows.first[r], smaller(rows.to[r], tile.end) - tile.begin);
    }
    // Scores of keys that a row does not see are computed too and then left out.
    int64_t key = 0;
    Ahead<T> k(next.k, next.end - next.begin, heads, a.k_cache.head_stride, a.head_dim);
    for (; key + 4 <= keys; key += 4) score_all<4>(a, rows, tile, k, key);
    for (; key < keys; key++) score_all<1>(a, rows, tile, k, key);
    for (int64_t r = 0; r < rows.count;) {
        bool together = alike(rows, r, rows.count) == 4;
        if (rows.first[r] < rows.last[r]) together ? renew<4>(rows, r, tile.begin) : renew<1>(rows, r, tile.begin);
        r += together ? 4 : 1;
    }
    Ahead<T> v(next.v, next.end - next.begin, heads, a.v_cache.head_stride, a.head_dim);
    int64_t lines = GATHERED * a.head_dim * static_cast<int64_t>(sizeof(T)) / 64 + 1;
    for (int64_t begin = 0; begin < keys; begin += GATHERED) {
        for (int64_t r = 0; r < rows.count; r++) {
            int64_t offset = r / rows.per_head * a.v_cache.head_stride;
            int64_t first = larger(rows.first[r], begin), last = smaller(rows.last[r], begin + GATHERED);
            if (r % rows.per_head == 0) v.fetch(lines);
            if (first >= last) continue;
            // Only rows that see the same keys go together: a key that one of them must not see could be NaN, and 0 * NaN is NaN.
            int64_t together = alike(rows, r, (r / rows.per_head + 1) * rows.per_head);
            if (together == 4) gather_all<4>(rows, r, tile.v, offset, a.head_dim, first, last), r += 3;
            else if (together >= 2) gather_all<2>(rows, r++, tile.v, offset, a.head_dim, first, last);
            else gather_all<1>(rows, r, tile.v, offset, a.head_dim, first, last);
        }
    }
}

template <class T> void attend_range(const PagedAttention& a, int64_t sequence, const Rows& rows, int64_t begin, int64_t end) {
    Tile<T> tiles[2];
    int64_t tile_end = smaller(begin / TILE_KEYS * TILE_KEYS + TILE_KEYS, end);
    if (begin < end) find_tile(a, sequence, rows, begin, tile_end, tiles[0]);
    for (int i = 0; begin < end; i ^= 1) {
        begin = tile_end;
        tile_end = smaller(begin + TILE_KEYS, end);
        find_tile(a, sequence, rows, begin, tile_end, tiles[i ^ 1]);  // of no keys, after the last
        attend(a, rows, tiles[i], tiles[i ^ 1]);
    }
}

// from: laid out as load_pair gives values.
template <class T> INLINE void store_row(T* to, const float* from, int64_t count, float factor) {
    constexpr int64_t STEP = 2 * WIDTH;
    float lanes[STEP];
    for (int64_t d = 0; d < count; d += STEP) {
        for (int64_t i = 0; i < STEP; i++) lanes[i] = from[d + place(i, to)] * factor;
        for (int64_t half = d; half < smaller(d + STEP, count); half += WIDTH) {
            if (half + WIDTH <= count) store(to + half, load(lanes + half - d));
            else store(to + half, load(lanes + half - d), count - half);
        }
    }
}

// Where row r of a key/value head goes.
template <class T>
INLINE T* output_row(const PagedAttention& a, const Sequence& s, int64_t kv_head, int64_t first_token, int64_t r) {
    int64_t group = a.heads / a.kv_heads;
    return static_cast<T*>(a.o) + ((s.first_row + first_token + r / group) * a.heads + kv_head * group + r % group) * a.head_dim;
}

template <class T>
static void merge(const PagedAttention& a, const Sequence& s, int64_t kv_head, int64_t stride, const float* partials) {
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
    int64_t stride = padded(a.head_dim), group = a.heads / a.kv_heads;
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
        s.first_split = split_of(s.oldest);
        s.is_split = s.tokens <= SPLIT_TOKENS;
        s.splits = s.tokens == 0 ? 0 : s.is_split ? split_of(s.length - 1) + 1 - s.first_split : 1;
        s.chunks = s.is_split ? 1 : (s.tokens + CHUNK - 1) / CHUNK;
        s.first_piece = pieces;
        s.first_partial = partial_floats;
        pieces += s.is_split ? s.splits : s.chunks * a.kv_heads;
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
        int64_t split = piece, first_token = 0, tokens = s.tokens, heads = a.kv_heads, first_head = 0;
        if (!s.is_split) {
            heads = 1;
            first_head = piece % a.kv_heads;
            first_token = piece / a.kv_heads * CHUNK;
            tokens = smaller(CHUNK, s.tokens - first_token);
        }
        int64_t per_head = tokens * group;
        Workspace scratch(floats_for_rows(heads * per_head, stride));
        Rows rows = rows_in(scratch.data, heads, per_head, first_head, stride);
        fill_rows<T>(a, s, first_token, rows);
        int64_t begin = rows.from[0], end = rows.to[per_head - 1];
        if (s.is_split) {
            begin = larger(begin, split_begin(s.first_split + split));
            end = smaller(end, split_begin(s.first_split + split + 1));
        }
        attend_range<T>(a, b, rows, begin, end);
        for (int64_t r = 0; r < rows.count; r++) {
            if (!s.is_split) {
                store_row(output_row<T>(a, s, first_head, first_token, r), rows.o + r * stride, a.head_dim, 1.0f / rows.sum[r]);
                continue;
            }
            float* p = partials.data + s.first_partial + (split * rows.count + r) * (stride + 2);
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
