// What a step of Muon does to memory around its products; the definition is psann_fast/train/muon.py's steps in torch.
//
// The update is not kept between the pass that adds up its norm and the one that writes it: it follows from gradient and momentum,
// which are in the caches where the matrices are small, and costs less than memory for it where they are large. Sums of squares are
// those of pieces that follow from the shape alone, added up in their order.
#include "../kernels.h"
#include "../memory.h"
#include "../threads.h"
#include "norm.h"
#include "simd.h"

namespace PSANN_NAMESPACE {
namespace {

constexpr int64_t TURNED_ROWS = 32;  // of a matrix that is written transposed: in bf16 a cache line
constexpr int64_t PIECE = 1 << 13;   // elements
constexpr int64_t GRAIN = 1 << 14;   // elements below which one thread is faster

// `elements` of a matrix as pieces, the last of which may be shorter.
struct Pieces {
    int64_t elements, size, count;
    Pieces(int64_t elements, int64_t size) : elements(elements), size(size), count((elements + size - 1) / size) {}
    int64_t begin(int64_t i) const { return i * size; }
    int64_t end(int64_t i) const { return (i + 1) * size < elements ? (i + 1) * size : elements; }
};

// Whole rows, so that a transposed matrix is written in runs.
static Pieces row_pieces(int64_t rows, int64_t columns) {
    int64_t at_once = PIECE / columns / TURNED_ROWS * TURNED_ROWS;
    return Pieces(rows * columns, (at_once > TURNED_ROWS ? at_once : TURNED_ROWS) * columns);
}

// The sum over [begin, end) of the squares of value(i, count).
template <class Value> INLINE float sum_of_squares(int64_t begin, int64_t end, const Value& value) {
    float squares[1];
    sum_row(end - begin, [&](int64_t i, int64_t count, Float (&out)[1]) INLINE_LAMBDA {
        Float x = value(begin + i, count);
        out[0] = x * x;
    }, squares);
    return squares[0];
}

template <int ROWS, int COLUMNS> INLINE void turn(const float (&from)[ROWS][COLUMNS], float (&to)[COLUMNS][ROWS]) {
    for (int c = 0; c < COLUMNS; c++)
        for (int r = 0; r < ROWS; r++) to[c][r] = from[r][c];
}

// body(row, column, height, width) for each tile of at most TURNED_ROWS rows and WIDTH columns in the rows [begin, end).
template <class Body> INLINE void each_tile(int64_t begin, int64_t end, int64_t columns, const Body& body) {
    for (; begin < end; begin += TURNED_ROWS) {
        int64_t height = begin + TURNED_ROWS < end ? TURNED_ROWS : end - begin;
        each_vector(0, columns, [&](int64_t c, int64_t width) INLINE_LAMBDA { body(begin, c, height, width); });
    }
}

template <class T> static void prepare(const MuonPrepare& a) {
    int64_t elements = a.rows * a.columns;
    if (a.n * elements == 0) return;
    Pieces pieces = row_pieces(a.rows, a.columns);
    int threads = a.n * elements < GRAIN ? 1 : a.threads;
    float rest = static_cast<float>(1.0 - a.momentum);
    Workspace partial(a.n * pieces.count);
    parallel(threads, a.n * pieces.count, [&](int64_t at) {
        const float* gradient = reinterpret_cast<const float*>(a.gradients[at / pieces.count]);
        float* momentum = reinterpret_cast<float*>(a.momenta[at / pieces.count]);
        int64_t piece = at % pieces.count;
        partial.data[at] = sum_of_squares(pieces.begin(piece), pieces.end(piece), [&](int64_t i, int64_t count) INLINE_LAMBDA {
            Float g = take(gradient + i, count), m = take(momentum + i, count);
            m += (g - m) * rest;
            give(momentum + i, m, count);
            return m + (g - m) * rest;
        });
    });
    parallel(threads, a.n * pieces.count, [&](int64_t at) {
        int64_t matrix = at / pieces.count, piece = at % pieces.count;
        const float* gradient = reinterpret_cast<const float*>(a.gradients[matrix]);
        const float* momentum = reinterpret_cast<const float*>(a.momenta[matrix]);
        T* x = static_cast<T*>(a.x) + matrix * elements;
        float factor = static_cast<float>(1.0 / norm(partial.data + matrix * pieces.count, pieces.count, a.least));
        auto update = [&](int64_t i, int64_t count) INLINE_LAMBDA {
            Float m = take(momentum + i, count);
            return (m + (take(gradient + i, count) - m) * rest) * factor;
        };
        int64_t begin = pieces.begin(piece), end = pieces.end(piece);
        if (a.rows >= a.columns) {
            each_vector(begin, end, [&](int64_t i, int64_t count) INLINE_LAMBDA { give(x + i, update(i, count), count); });
            return;
        }
        each_tile(begin / a.columns, end / a.columns, a.columns, [&](int64_t r, int64_t c, int64_t height, int64_t width) {
            float tile[TURNED_ROWS][WIDTH], turned[WIDTH][TURNED_ROWS];
            for (int64_t i = 0; i < height; i++) store(tile[i], update((r + i) * a.columns + c, width));
            turn(tile, turned);
            for (int64_t i = 0; i < width; i++)
                each_vector(0, height, [&](int64_t j, int64_t count) INLINE_LAMBDA {
                    give(x + (c + i) * a.rows + r + j, load(turned[i] + j), count);
                });
        });
    });
}

template <class T> static void apply(const MuonApply& a) {
    int64_t elements = a.rows * a.columns;
    if (a.n * elements == 0) return;
    Pieces pieces = row_pieces(a.rows, a.columns);
    parallel(a.n * elements < GRAIN ? 1 : a.threads, a.n * pieces.count, [&](int64_t at) {
        int64_t matrix = at / pieces.count, piece = at % pieces.count;
        float* p = reinterpret_cast<float*>(a.parameters[matrix]);
        const T* x = static_cast<const T*>(a.x) + matrix * elements;
        auto move = [&](int64_t i, Float update, int64_t count) INLINE_LAMBDA {
            give(p + i, fma(update, all(-a.scale), take(p + i, count) * a.keep), count);
        };
        int64_t begin = pieces.begin(piece), end = pieces.end(piece);
        if (a.rows >= a.columns) {
            each_vector(begin, end, [&](int64_t i, int64_t count) INLINE_LAMBDA { move(i, take(x + i, count), count); });
            return;
        }
        each_tile(begin / a.columns, end / a.columns, a.columns, [&](int64_t r, int64_t c, int64_t height, int64_t width) {
            float tile[WIDTH][TURNED_ROWS], turned[TURNED_ROWS][WIDTH];
            for (int64_t i = 0; i < width; i++)
                each_vector(0, height, [&](int64_t j, int64_t count) INLINE_LAMBDA {
                    store(tile[i] + j, take(x + (c + i) * a.rows + r + j, count));
                });
            turn(tile, turned);
            for (int64_t i = 0; i < height; i++) move((r + i) * a.columns + c, load(turned[i]), width);
        });
    });
}

}  // namespace

void muon_prepare(const MuonPrepare& a) { a.type == Type::BFLOAT16 ? prepare<bf16>(a) : prepare<float>(a); }

void muon_apply(const MuonApply& a) { a.type == Type::BFLOAT16 ? apply<bf16>(a) : apply<float>(a); }

}  // namespace PSANN_NAMESPACE
