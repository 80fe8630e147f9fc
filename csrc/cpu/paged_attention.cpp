// Attention of the newest tokens of each sequence over its blocks; the definition is paged_attention.py's reference_attention.
//
// The time of one new token is that of reading its keys and values once: 2 * seq_len * kv_heads * head_dim * itemsize bytes. So a
// piece of work is one split of a sequence's keys for all heads, in the order in which they lie in memory, and the next tile is
// fetched while this one is used; each piece leaves its maximum, sum and unscaled output for a merge. Where splits lie depends on
// positions alone, so a sequence gets the same bits whoever shares the call. More than SPLIT_TOKENS new tokens reuse what they
// read: they are taken CHUNK at a time, one key/value head and all its keys a piece.
#include <float.h>
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
constexpr int64_t LONG_SPLIT = 512;   // beyond: a split costs its queries' preparation, and its first tile is waited for
constexpr int64_t SPLIT_TOKENS = 16;
constexpr int64_t CHUNK = 16;
static_assert(SPLIT % TILE_KEYS == 0 && LONG_SPLIT % TILE_KEYS == 0 && FINE % SPLIT == 0 && FINE % LONG_SPLIT == 0,
    "a tile lies in one split");

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t split_of(int64_t key) { return key < FINE ? key / SPLIT : (key - FINE) / LONG_SPLIT + FINE / SPLIT; }
static int64_t split_begin(int64_t split) {
    return split < FINE / SPLIT ? split * SPLIT : (split - FINE / SPLIT) * LONG_SPLIT + FINE;
}

// Where bf16 is multiplied as it is stored, and denormals count as 0: rotated queries are rounded to it, as an operation of its own
// would leave them, and so are the probabilities; the rounded ones are added up, so that the weights' sum stays 1. The scores are
// scaled after the product, so that a query that is not rotated is taken as it is.
template <class T> constexpr bool BY_PAIRS = false;
template <> constexpr bool BY_PAIRS<bf16> = MULTIPLIES_PAIRS;
static_assert(!MULTIPLIES_PAIRS || TILE_KEYS == WIDTH, "a row's scores are one vector");

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
    int64_t count, heads, per_head, first_head, stride;  // stride: head_dim padded to pairs of vectors
    float *q, *o;                                 // (count, stride), laid out as load_pair gives keys; q times
                                                  // softmax_scale * log2(e)
    float *scores;                                // (TILE_KEYS, R) for each R rows that `together` puts side by side
    float *largest, *sum;                         // (WIDTH) for the same rows, lane i that of row i % R: the maximum in units of
                                                  // log2; the sum's lanes belong to different keys until `totals` adds them up
    float *slope;                                 // (count): taken off per token of distance
    int64_t *from, *to;                           // (count): keys that the row sees
    int64_t *first, *last;                        // (count): those in the tile at hand, counted from its begin

    // BY_PAIRS: scores are (TILE_KEYS) for each row, before they are multiplied with `scale`, and the probabilities that replace
    // them bf16, (TILE_KEYS); o is laid out as `zip` gives values; q is bf16, (2 * stride) for each row alone in the order of
    // memory, and for each of several (stride / (2 * WIDTH), 4, WIDTH pairs), of which [i][j] holds in each four lanes the j-th of
    // the pairs that stand in these lanes of vector i.
    float scale;
};

constexpr int64_t LINE = 64;  // bytes of a line of a cache; a vector that lies across two takes twice the time to load
int64_t floats_for_rows(int64_t count, int64_t stride) {
    return count * (3 * stride + TILE_KEYS + 2 * WIDTH + 1 + 8) + LINE / static_cast<int64_t>(sizeof(float));
}

// Rows whose scores stand side by side, of those that are left of a head.
static int64_t together(int64_t left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }

Rows rows_in(float* memory, int64_t heads, int64_t per_head, int64_t first_head, int64_t stride, float scale) {
    Rows r = {};
    r.scale = scale;
    r.count = heads * per_head;
    r.heads = heads;
    r.per_head = per_head;
    r.first_head = first_head;
    r.stride = stride;
    r.q = memory + (-reinterpret_cast<uintptr_t>(memory) % LINE) / sizeof(float);
    r.o = r.q + r.count * 2 * stride;
    r.scores = r.o + r.count * stride;
    r.largest = r.scores + r.count * TILE_KEYS;
    r.sum = r.largest + r.count * WIDTH;
    r.from = reinterpret_cast<int64_t*>(r.sum + r.count * WIDTH);
    r.to = r.from + r.count;
    r.first = r.to + r.count;
    r.last = r.first + r.count;
    r.slope = reinterpret_cast<float*>(r.last + r.count);
    return r;
}

// Row r's query to where the products will look for it.
template <class T> void place_query(const Rows& rows, int64_t r, const float* query, int64_t head_dim, const T* type) {
    if constexpr (BY_PAIRS<T>) {
        constexpr int64_t STEP = 2 * WIDTH;
        T* to = reinterpret_cast<T*>(rows.q + r * 2 * rows.stride);
        int64_t within = r % rows.per_head;
        bool is_alone = within == rows.per_head - 1 && rows.per_head % 2 == 1;
        for (int64_t d = 0; d < rows.stride; d += STEP) {
            float lanes[STEP] = {};
            for (int64_t i = 0; i < smaller(STEP, head_dim - d); i++) lanes[i] = query[d + i];
            Uint pairs = rounded_pair(load(lanes), load(lanes + WIDTH));
            if (is_alone) store_bits(to + d, pairs);
            else UNROLL for (int j = 0; j < 4; j++) {
                Uint same;
                for (int i = 0; i < WIDTH; i++) same[i] = pairs[i / 4 * 4 + j];
                store_bits(to + 4 * d + j * STEP, same);
            }
        }
    } else {
        float* to = rows.q + r * rows.stride;
        for (int64_t d = 0; d < rows.stride; d++) to[place(d, type)] = d < head_dim ? query[d] : 0.0f;
    }
}

template <class T> void fill_rows(const PagedAttention& a, const Sequence& s, int64_t first_token, const Rows& rows) {
    int64_t group = a.heads / a.kv_heads;
    for (int64_t r = 0; r < rows.count; r++) {
        int64_t within = r % rows.per_head, token = first_token + within / group, position = s.length - s.tokens + token;
        int64_t head = (rows.first_head + r / rows.per_head) * group + within % group;
        const T* q = static_cast<const T*>(a.q) + (s.first_row + token) * a.q_stride + head * a.q_head_stride;
        float* turned = rows.o + r * rows.stride;
        rotate(a.rotary, position, a.head_dim, q, turned, BY_PAIRS<T> ? 1.0f : a.softmax_scale * LOG2_E);
        place_query(rows, r, turned, a.head_dim, q);
        for (int64_t d = 0; d < rows.stride; d++) turned[d] = 0.0f;
        // Not -infinity, so that a key that the row does not see has the probability 2^(-infinity - largest) = 0. A row of nothing
        // but scores of -infinity ends as the definition's softmax does: 0 / 0 = NaN.
        store(rows.largest + r * WIDTH, all(-FLT_MAX));
        store(rows.sum + r * WIDTH, all(0.0f));
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

// Fetches a line of each block as well: blocks are seldom neighbours, and a page's address must be looked up before its other lines
// can be fetched, which a processor does for few of them at once and forgets the rest.
template <class T>
void find_tile(const PagedAttention& a, int64_t sequence, const Rows& rows, int64_t begin, int64_t end, Tile<T>& tile) {
    tile.begin = begin;
    tile.end = end;
    const int32_t* table = a.block_table + sequence * a.table_stride + begin / a.block_size;
    int64_t slot = begin % a.block_size;
    for (int64_t i = 0; i < end - begin; table++, slot = 0) {
        auto place = [&](const Cache& cache) {
            return static_cast<const T*>(cache.data) + *table * cache.block_stride + slot * cache.slot_stride +
                rows.first_head * cache.head_stride;
        };
        const T *k = place(a.k_cache), *v = place(a.v_cache);
        __builtin_prefetch(k, 0, 2);
        __builtin_prefetch(v, 0, 2);
        for (int64_t last = smaller(end - begin, i + a.block_size - slot); i < last; i++) {
            tile.k[i] = k;
            tile.v[i] = v;
            k += a.k_cache.slot_stride;
            v += a.v_cache.slot_stride;
        }
    }
}

// Fetches the rows of a tile's keys (or values) line by line, in the order of memory.
template <class T> struct Ahead {
    const T* const* places;
    int64_t keys, heads, head_stride, bytes;  // bytes: that lie side by side, of one head or of all
    int64_t key = 0, head = 0;                // what comes after `end`
    const char *line = nullptr, *end = nullptr;

    INLINE_LAMBDA Ahead(const T* const* p, int64_t count, int64_t all_heads, int64_t stride, int64_t head_dim) {
        bool beside = stride == head_dim;
        places = p, keys = count, heads = beside ? 1 : all_heads, head_stride = stride;
        bytes = head_dim * (beside ? all_heads : 1) * static_cast<int64_t>(sizeof(T));
        if (keys > 0) advance();
    }
    // Takes up what lies side by side next; false after the last.
    INLINE_LAMBDA bool advance() {
        if (key == keys) return false;
        line = reinterpret_cast<const char*>(places[key] + head * head_stride);
        end = line;
        do {
            end += bytes;
            if (++head == heads) head = 0, key++;
        } while (key < keys && reinterpret_cast<const char*>(places[key] + head * head_stride) == end);
        return true;
    }
    INLINE_LAMBDA void fetch(int64_t lines) {
        while (lines > 0) {
            if (line >= end && !advance()) return;
            int64_t now = smaller(lines, (end - line + 63) / 64);
            lines -= now;
            for (; now > 0; now--, line += 64) __builtin_prefetch(line, 0, 2);
        }
    }
    // What the caller will fetch line by line while it works; where so much does not lie side by side, it is fetched at once
    // and `instead` is returned, which costs nothing to fetch.
    INLINE_LAMBDA const char* take(int64_t amount, const void* instead) {
        if (end - line < amount) {
            fetch((amount + 63) / 64);
            return static_cast<const char*>(instead);
        }
        line += amount;
        return line - amount;
    }
};

template <class T> INLINE Ahead<T> keys_of(const PagedAttention& a, const Rows& rows, const Tile<T>& tile) {
    return {tile.k, tile.end - tile.begin, rows.heads, a.k_cache.head_stride, a.head_dim};
}
template <class T> INLINE Ahead<T> values_of(const PagedAttention& a, const Rows& rows, const Tile<T>& tile) {
    return {tile.v, tile.end - tile.begin, rows.heads, a.v_cache.head_stride, a.head_dim};
}

// Fetches the next BYTES.
template <size_t BYTES> INLINE void fetch_each(const char*& soon) {
    UNROLL for (size_t i = 0; i < BYTES; i += 64) __builtin_prefetch(soon + i, 0, 2);
    soon += BYTES;
}

// Keys that all heads take before the next ones, so that memory is read nearly in order.
constexpr int GROUP = 4;

// Of them those whose scores with R rows are added up at once.
constexpr int keys_at_once(int rows) { return HAS_MANY_REGISTERS || rows < 4 ? GROUP : 2; }

// Scores of R rows with so many keys, key after key.
template <int R, class T>
INLINE void score(const float* q, int64_t stride, const T* const* keys, int64_t offset, int64_t head_dim, const char* soon,
                  float* out) {
    constexpr int K = keys_at_once(R);
    Float sums[K * R] = {};
    const T* k[K];
    UNROLL for (int i = 0; i < K; i++) k[i] = keys[i] + offset;
    auto add = [&](int64_t d, int64_t count) INLINE_LAMBDA {
        auto features = [&](int i, Float (&x)[2]) INLINE_LAMBDA {
            if (count == 2 * WIDTH) load_pair(k[i] + d, x);
            else load_pair(k[i] + d, count, x);
        };
        // What there is less of stays in registers: the keys' features or the rows'.
        if constexpr (R > K) {
            Float x[K][2];
            UNROLL for (int i = 0; i < K; i++) features(i, x[i]);
            UNROLL for (int half = 0; half < 2; half++) {
                UNROLL for (int r = 0; r < R; r++) {
                    Float own = held(load(q + r * stride + d + half * WIDTH));
                    UNROLL for (int i = 0; i < K; i++) sums[i * R + r] = fma(own, x[i][half], sums[i * R + r]);
                }
            }
        } else {
            Float own[R][2];
            UNROLL for (int r = 0; r < R; r++) EACH(2) own[r][i] = load(q + r * stride + d + i * WIDTH);
            UNROLL for (int i = 0; i < K; i++) {
                Float x[2];
                features(i, x);
                UNROLL for (int half = 0; half < 2; half++)
                    UNROLL for (int r = 0; r < R; r++) sums[i * R + r] = fma(own[r][half], x[half], sums[i * R + r]);
            }
        }
    };
    int64_t d = 0;
    for (; d + 2 * WIDTH <= head_dim; d += 2 * WIDTH) {
        fetch_each<K * 2 * WIDTH * sizeof(T)>(soon);
        add(d, 2 * WIDTH);
    }
    if (d < head_dim) add(d, head_dim - d);
    sum_each(sums, out);
}

// Scores of R rows with `count` keys, of at most GROUP, of the tile's from `key` on; behind them stands what will be left out.
template <int R, class T>
INLINE void score_rows(const PagedAttention& a, const Rows& rows, int64_t row, const T* const* keys, int64_t offset, int64_t key,
                       int64_t count, Ahead<T>& ahead) {
    for (int64_t i = 0; i < count; i += keys_at_once(R)) {
        float* scores = rows.scores + row * TILE_KEYS + (key + i) * R;
        const char* soon = ahead.take(keys_at_once(R) * a.head_dim * static_cast<int64_t>(sizeof(T)), scores);
        score<R>(rows.q + row * rows.stride, rows.stride, keys + i, offset, a.head_dim, soon, scores);
    }
}

// Scores of one row with ALONE keys. It takes fewer instructions than what serves several rows. Inlined into what calls them,
// these two would be short of registers.
constexpr int ALONE = 8;
__attribute__((noinline)) void score_alone(const bf16* q, const bf16* const* keys, int64_t offset, int64_t head_dim,
                                           const char* soon, float* out) {
    Float sums[ALONE] = {};
    auto add = [&](int64_t d, int64_t count) INLINE_LAMBDA {
        Uint own = load_bits(q + d);
        EACH(ALONE) {
            const bf16* k = keys[i] + offset + d;
            sums[i] = add_products(sums[i], own, count == 2 * WIDTH ? load_bits(k) : load_bits(k, count));
        }
    };
    int64_t d = 0;
    for (; d + 2 * WIDTH <= head_dim; d += 2 * WIDTH) {
        fetch_each<ALONE * 2 * WIDTH * sizeof(bf16)>(soon);
        add(d, 2 * WIDTH);
    }
    if (d < head_dim) add(d, head_dim - d);
    sum_each(sums, out);
}

// The same of R rows, (R, TILE_KEYS). Four keys' pairs change places until four lanes of a vector hold one pair of each key: this
// is done once for all rows, and a row's sums are then complete but for the lanes a multiple of four away.
template <int R>
__attribute__((noinline)) void score_several(const bf16* q, int64_t stride, const bf16* const* keys, int64_t offset,
                                             int64_t head_dim, const char* soon, float* out) {
    constexpr int64_t STEP = 2 * WIDTH;
    Float half[2][R];
    UNROLL for (int h = 0; h < 2; h++) {
        const bf16* const* k = keys + 8 * h;
        Float sums[2][R] = {};
        auto add = [&](int64_t d, int64_t count) INLINE_LAMBDA {
            Uint x[2][4];
            UNROLL for (int i = 0; i < 8; i++)
                x[i / 4][i % 4] = count == STEP ? load_bits(k[i] + offset + d) : load_bits(k[i] + offset + d, count);
            EACH(2) transpose_fours(x[i]);
            UNROLL for (int j = 0; j < 4; j++)
                UNROLL for (int r = 0; r < R; r++) {
                    Uint own = load_bits(q + r * 4 * stride + 4 * d + j * STEP);
                    EACH(2) sums[i][r] = add_products(sums[i][r], x[i][j], own);
                }
        };
        int64_t d = 0;
        for (; d + STEP <= head_dim; d += STEP) {
            fetch_each<8 * STEP * sizeof(bf16)>(soon);
            add(d, STEP);
        }
        if (d < head_dim) add(d, head_dim - d);
        UNROLL for (int r = 0; r < R; r++) half[h][r] = add_halves(sums[0][r], sums[1][r]);
    }
    UNROLL for (int r = 0; r < R; r++) store(out + r * TILE_KEYS, add_quarters(half[0][r], half[1][r]));
}

INLINE void score_pairs(const PagedAttention& a, const Rows& rows, const Tile<bf16>& tile, Ahead<bf16>& ahead) {
    int64_t keys = tile.end - tile.begin, heads = rows.heads;
    const bf16* places[TILE_KEYS];
    for (int64_t i = 0; i < TILE_KEYS; i++) places[i] = tile.k[i < keys ? i : keys - 1];
    if (rows.per_head == 1) {
        for (int64_t key = 0; key < keys; key += ALONE)
            for (int64_t h = 0; h < heads; h++) {
                float* scores = rows.scores + h * TILE_KEYS + key;
                const char* soon = ahead.take(ALONE * a.head_dim * static_cast<int64_t>(sizeof(bf16)), scores);
                const bf16* q = reinterpret_cast<const bf16*>(rows.q + h * 2 * rows.stride);
                score_alone(q, places + key, h * a.k_cache.head_stride, a.head_dim, soon, scores);
            }
        return;
    }
    for (int64_t h = 0; h < heads; h++) {
        int64_t offset = h * a.k_cache.head_stride, end = (h + 1) * rows.per_head;
        for (int64_t r = h * rows.per_head; r < end; r += together(end - r)) {
            int64_t side = together(end - r);
            float* scores = rows.scores + r * TILE_KEYS;
            const bf16* q = reinterpret_cast<const bf16*>(rows.q + r * 2 * rows.stride);
            const char* soon = ahead.take(TILE_KEYS * a.head_dim * static_cast<int64_t>(sizeof(bf16)), scores);
            if (side == 4) score_several<4>(q, rows.stride, places, offset, a.head_dim, soon, scores);
            else if (side == 2) score_several<2>(q, rows.stride, places, offset, a.head_dim, soon, scores);
            else
                for (int64_t key = 0; key < TILE_KEYS; key += ALONE)
                    score_alone(q, places + key, offset, a.head_dim, soon, scores + key);
        }
    }
}

template <class T> INLINE void score_all(const PagedAttention& a, const Rows& rows, const Tile<T>& tile, Ahead<T>& ahead) {
    if constexpr (BY_PAIRS<T>) return score_pairs(a, rows, tile, ahead);
    int64_t keys = tile.end - tile.begin, heads = rows.heads;
    for (int64_t key = 0; key < keys; key += GROUP) {
        // Past the last key the last one stands again.
        int64_t count = smaller(GROUP, keys - key);
        const T* places[GROUP];
        EACH(GROUP) places[i] = tile.k[key + (i < count ? i : count - 1)];
        for (int64_t h = 0; h < heads; h++) {
            int64_t offset = h * a.k_cache.head_stride, end = (h + 1) * rows.per_head;
            for (int64_t r = h * rows.per_head; r < end; r += together(end - r)) {
                int64_t side = together(end - r);
                if (side == 4) score_rows<4>(a, rows, r, places, offset, key, count, ahead);
                else if (side == 2) score_rows<2>(a, rows, r, places, offset, key, count, ahead);
                else score_rows<1>(a, rows, r, places, offset, key, count, ahead);
            }
        }
    }
}

// Turns scores of B times R rows into probabilities (unscaled), and brings the rows' earlier sums and outputs to the new maxima.
// Several rows at once, since each waits for its own maximum.
template <int R, int B> INLINE void renew(const Rows& rows, int64_t row, int64_t tile_begin) {
    constexpr int VECTORS = TILE_KEYS * R / WIDTH;
    float* s = rows.scores + row * TILE_KEYS;
    for (int64_t i = 0; i < B * R; i++) {
        float* own = s + i / R * R * TILE_KEYS + i % R;
        int64_t first = rows.first[row + i], last = rows.last[row + i];
        if (float slope = rows.slope[row + i]; slope != 0.0f) {
            int64_t distance = rows.to[row + i] - 1 - tile_begin;
            for (int64_t key = first; key < last; key++) own[key * R] -= slope * static_cast<float>(distance - key);
        }
        for (int64_t key = 0; key < first; key++) own[key * R] = -INFINITY;
        for (int64_t key = last; key < TILE_KEYS; key++) own[key * R] = -INFINITY;
    }
    Float highest[B];
    UNROLL for (int b = 0; b < B; b++) {
        float *largest = rows.largest + (row + b * R) * WIDTH, *sum = rows.sum + (row + b * R) * WIDTH;
        Float before = load(largest);
        highest[b] = before;
        UNROLL for (int v = 0; v < VECTORS; v++) highest[b] = max(load(s + (b * VECTORS + v) * WIDTH), highest[b]);
        if (every(highest[b] == before)) continue;
        highest[b] = maximum_of_every<R>(highest[b]);
        store(largest, highest[b]);
        Float difference[1] = {before - highest[b]}, factor[1];
        exp2_at_most_one(difference, factor);
        store(sum, load(sum) * factor[0]);
        UNROLL for (int r = 0; r < R; r++) {
            float* o = rows.o + (row + b * R + r) * rows.stride;
            for (int64_t d = 0; d < rows.stride; d += WIDTH) store(o + d, load(o + d) * factor[0][r]);
        }
    }
    constexpr int AT_ONCE = B * VECTORS < 4 ? B * VECTORS : 4;
    UNROLL for (int v = 0; v < B * VECTORS; v += AT_ONCE) {
        Float x[AT_ONCE], p[AT_ONCE];
        EACH(AT_ONCE) x[i] = load(s + (v + i) * WIDTH) - highest[(v + i) / VECTORS];
        exp2_at_most_one(x, p);
        EACH(AT_ONCE) store(s + (v + i) * WIDTH, p[i]);
    }
    UNROLL for (int b = 0; b < B; b++) {
        float* sum = rows.sum + (row + b * R) * WIDTH;
        Float sums = load(sum);
        UNROLL for (int v = 0; v < VECTORS; v++) sums += load(s + (b * VECTORS + v) * WIDTH);
        store(sum, sums);
    }
}

// The same of B rows BY_PAIRS. The maximum follows only where a score exceeds it by LAG: until then the probabilities are at most
// 2^LAG, which costs no accuracy, and nothing need be rescaled.
constexpr float LAG = 8.0f;
template <int B> INLINE void renew_pairs(const Rows& rows, int64_t row, int64_t tile_begin) {
    float *s = rows.scores + row * TILE_KEYS, *largest = rows.largest + row * WIDTH, *sum = rows.sum + row * WIDTH;
    Float x[B], p[B];
    EACH(B) x[i] = load(s + i * TILE_KEYS) * rows.scale;
    for (int64_t i = 0; i < B; i++) {
        int64_t first = rows.first[row + i], last = rows.last[row + i];
        float slope = rows.slope[row + i];
        if (first == 0 && last == TILE_KEYS && slope == 0.0f) continue;
        float distance = static_cast<float>(rows.to[row + i] - 1 - tile_begin);
        Int key;
        for (int j = 0; j < WIDTH; j++) key[j] = j;
        if (slope != 0.0f) x[i] -= slope * (distance - __builtin_convertvector(key, Float));
        x[i] = (key >= static_cast<int>(first)) & (key < static_cast<int>(last)) ? x[i] : all(-INFINITY);
    }
    Int exceeds[B], any = {};
    EACH(B) exceeds[i] = x[i] > load(largest + i * WIDTH) + LAG, any |= exceeds[i];
    if (!every(~any)) {
        for (int64_t i = 0; i < B; i++) {
            // A row that goes along with another would get its bits from that one, which may be a later token.
            if (every(~exceeds[i])) continue;
            Float before = load(largest + i * WIDTH), now = maximum_of_every<1>(max(x[i], before));
            Float difference[1] = {before - now}, factor[1];
            exp2_at_most_one(difference, factor);
            store(largest + i * WIDTH, now);
            store(sum + i * WIDTH, load(sum + i * WIDTH) * factor[0]);
            float* o = rows.o + (row + i) * rows.stride;
            for (int64_t d = 0; d < rows.stride; d += WIDTH) store(o + d, load(o + d) * factor[0]);
        }
    }
    EACH(B) x[i] -= load(largest + i * WIDTH);
    exp2_at_most_one(x, p);
    EACH(B) {
        Uint pairs = rounded_pair(p[i], Float{});
        store(sum + i * WIDTH, add_products(load(sum + i * WIDTH), pairs, Uint{} + 0x3f803f80u));
        store(s + i * TILE_KEYS, (Float)pairs);
    }
}

template <class T> void renew_all(const Rows& rows, int64_t tile_begin) {
    if (rows.per_head == 1 || BY_PAIRS<T>) {
        constexpr auto one = BY_PAIRS<T> ? renew_pairs<1> : renew<1, 1>, four = BY_PAIRS<T> ? renew_pairs<4> : renew<1, 4>;
        int64_t row = 0;
        for (; row + 4 <= rows.count; row += 4) four(rows, row, tile_begin);
        for (; row < rows.count; row++) one(rows, row, tile_begin);
        return;
    }
    for (int64_t row = 0; row < rows.count;) {
        int64_t side = together(rows.per_head - row % rows.per_head);
        if (side == 4) renew<4, 1>(rows, row, tile_begin);
        else if (side == 2) renew<2, 1>(rows, row, tile_begin);
        else renew<1, 1>(rows, row, tile_begin);
        row += side;
    }
}

// In place of a value that no row of a pair of keys sees: 0 times what stands in its slot could be NaN.
const bf16 NOTHING[4 * 2 * WIDTH] = {};

// Adds to R rows' outputs, from feature d on N pairs of vectors (the last of `count` elements), probabilities times the values of
// keys first to last - 1. p: the first row's probabilities, one every `side`; BY_PAIRS two in each, and `side` is
// from one row to the next.
template <int R, int N, bool IS_WHOLE, class T>
INLINE void gather(float* o, int64_t stride, const float* p, int64_t side, const T* const* v, int64_t offset, int64_t count,
                   int64_t first, int64_t last, const char* soon) {
    Float sums[R][N][2];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int n = 0; n < N; n++) EACH(2) sums[r][n][i] = load(o + r * stride + (2 * n + i) * WIDTH);
    if constexpr (BY_PAIRS<T>) {
        for (int64_t key = first & ~int64_t{1}; key < last; key += 2) {
            const T *at = key < first ? NOTHING : v[key] + offset, *after = key + 1 < last ? v[key + 1] + offset : NOTHING;
            if (IS_WHOLE) fetch_each<2 * N * 2 * WIDTH * sizeof(T)>(soon);
            Uint weight[R];
            EACH(R) weight[i] = (Uint)all(p[i * side + key / 2]);
            UNROLL for (int n = 0; n < N; n++) {
                int64_t d = 2 * n * WIDTH;
                Uint x[2];
                if (IS_WHOLE) zip(load_bits(at + d), load_bits(after + d), x);
                else zip(load_bits(at, count), load_bits(after, count), x);
                UNROLL for (int r = 0; r < R; r++) EACH(2) sums[r][n][i] = add_products(sums[r][n][i], weight[r], x[i]);
            }
        }
    } else for (int64_t key = first; key < last; key++) {
        const T* at = v[key] + offset;
        if (IS_WHOLE) fetch_each<N * 2 * WIDTH * sizeof(T)>(soon);
        Float weight[R];
        EACH(R) weight[i] = all(p[key * side + i]);
        UNROLL for (int n = 0; n < N; n++) {
            Float x[2];
            if (IS_WHOLE) load_pair(at + 2 * n * WIDTH, x);
            else load_pair(at, count, x);
            UNROLL for (int r = 0; r < R; r++) EACH(2) sums[r][n][i] = fma(weight[r], x[i], sums[r][n][i]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int n = 0; n < N; n++) EACH(2) store(o + r * stride + (2 * n + i) * WIDTH, sums[r][n][i]);
}

// The same on all features. R rows that see the same keys.
template <int R, class T>
INLINE void gather_rows(const Rows& rows, int64_t row, const float* p, int64_t side, const T* const* v, int64_t offset,
                        int64_t head_dim, Ahead<T>& ahead) {
    constexpr int N = R == 1 ? 4 : R == 2 || HAS_MANY_REGISTERS ? 2 : 1, STEP = 2 * WIDTH;
    float* o = rows.o + row * rows.stride;
    int64_t d = 0, first = rows.first[row], last = rows.last[row];
    for (; d + N * STEP <= head_dim; d += N * STEP) {
        const char* soon = ahead.take((last - first) * N * STEP * static_cast<int64_t>(sizeof(T)), p);
        gather<R, N, true>(o + d, rows.stride, p, side, v, offset + d, STEP, first, last, soon);
    }
    for (; d + STEP <= head_dim; d += STEP) {
        const char* soon = ahead.take((last - first) * STEP * static_cast<int64_t>(sizeof(T)), p);
        gather<R, 1, true>(o + d, rows.stride, p, side, v, offset + d, STEP, first, last, soon);
    }
    if (d < head_dim) gather<R, 1, false>(o + d, rows.stride, p, side, v, offset + d, head_dim - d, first, last, nullptr);
}

template <class T> INLINE void gather_all(const PagedAttention& a, const Rows& rows, const Tile<T>& tile, Ahead<T>& ahead) {
    int64_t heads = rows.heads;
    for (int64_t h = 0; h < heads; h++) {
        int64_t offset = h * a.v_cache.head_stride, end = (h + 1) * rows.per_head;
        for (int64_t r = h * rows.per_head; r < end;) {
            const float* p = rows.scores + r * TILE_KEYS;
            int64_t side = together(end - r);
            // Only rows that see the same keys go together: a key that one of them must not see could be NaN, and 0 * NaN is NaN.
            int64_t step = BY_PAIRS<T> ? TILE_KEYS : 1, apart = BY_PAIRS<T> ? TILE_KEYS : side;
            bool alike = true;
            for (int64_t i = 1; i < side; i++)
                alike &= rows.first[r + i] == rows.first[r] && rows.last[r + i] == rows.last[r];
            if (!alike)
                for (int64_t i = 0; i < side; i++)
                    gather_rows<1>(rows, r + i, p + i * step, apart, tile.v, offset, a.head_dim, ahead);
            else if (side == 4) gather_rows<4>(rows, r, p, apart, tile.v, offset, a.head_dim, ahead);
            else if (side == 2) gather_rows<2>(rows, r, p, apart, tile.v, offset, a.head_dim, ahead);
            else gather_rows<1>(rows, r, p, apart, tile.v, offset, a.head_dim, ahead);
            r += side;
        }
    }
}

// `next` is fetched meanwhile, a little beside each piece of work: all of it at once would only be waited for.
template <class T> void attend(const PagedAttention& a, const Rows& rows, const Tile<T>& tile, const Tile<T>& next) {
    for (int64_t r = 0; r < rows.count; r++) {
        rows.first[r] = larger(rows.from[r], tile.begin) - tile.begin;
        rows.last[r] = larger(rows.first[r], smaller(rows.to[r], tile.end) - tile.begin);
    }
    // Scores of keys that a row does not see are computed too and then left out.
    Ahead<T> k = keys_of(a, rows, next);
    score_all(a, rows, tile, k);
    renew_all<T>(rows, tile.begin);
    Ahead<T> v = values_of(a, rows, next);
    gather_all(a, rows, tile, v);
}

// Row r's maximum and sum.
struct Totals { float largest, sum; };

template <class T> Totals totals(const Rows& rows, int64_t r) {
    if (BY_PAIRS<T>) return {rows.largest[r * WIDTH], sum(load(rows.sum + r * WIDTH))};
    int64_t within = r % rows.per_head, begin = 0;
    while (begin + together(rows.per_head - begin) <= within) begin += together(rows.per_head - begin);
    int64_t side = together(rows.per_head - begin), at = (r - within + begin) * WIDTH + within - begin;
    float sum = 0.0f;
    for (int64_t i = 0; i < WIDTH; i += side) sum += rows.sum[at + i];
    return {rows.largest[at], sum};
}

// A tile's places are found two tiles ahead, see find_tile.
template <class T> void attend_range(const PagedAttention& a, int64_t sequence, const Rows& rows, int64_t begin, int64_t end) {
    Tile<T> tiles[3];
    auto find = [&](int64_t from, Tile<T>& tile) {
        // Of no keys, after the last.
        find_tile(a, sequence, rows, from, smaller(from / TILE_KEYS * TILE_KEYS + TILE_KEYS, end), tile);
    };
    find(begin, tiles[0]);
    find(tiles[0].end, tiles[1]);
    // Nothing else is being done meanwhile, so all of the first tile is asked for at once.
    keys_of(a, rows, tiles[0]).fetch(INT64_MAX);
    values_of(a, rows, tiles[0]).fetch(INT64_MAX);
    for (int i = 0, next = 1; tiles[i].begin < end; i = next, next = next == 2 ? 0 : next + 1) {
        find(tiles[next].end, tiles[3 - i - next]);
        attend(a, rows, tiles[i], tiles[next]);
    }
}

// from: laid out as load_pair gives values.
template <class T> INLINE void store_row(T* to, const float* from, int64_t count, float factor) {
    constexpr int64_t STEP = 2 * WIDTH;
    float lanes[STEP];
    for (int64_t d = 0; d < count; d += STEP) {
        for (int64_t i = 0; i < STEP; i++) lanes[i] = from[d + (BY_PAIRS<T> ? zipped_place(i) : place(i, to))] * factor;
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
        float scale = BY_PAIRS<T> ? a.softmax_scale * LOG2_E : 1.0f;
        Rows rows = rows_in(scratch.data, heads, per_head, first_head, stride, scale);
        fill_rows<T>(a, s, first_token, rows);
        int64_t begin = rows.from[0], end = rows.to[per_head - 1];
        if (s.is_split) {
            begin = larger(begin, split_begin(s.first_split + split));
            end = smaller(end, split_begin(s.first_split + split + 1));
        }
        attend_range<T>(a, b, rows, begin, end);
        for (int64_t r = 0; r < rows.count; r++) {
            Totals total = totals<T>(rows, r);
            if (!s.is_split) {
                store_row(output_row<T>(a, s, first_head, first_token, r), rows.o + r * stride, a.head_dim, 1.0f / total.sum);
                continue;
            }
            float* p = partials.data + s.first_partial + (split * rows.count + r) * (stride + 2);
            p[0] = total.largest;
            p[1] = total.sum;
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
