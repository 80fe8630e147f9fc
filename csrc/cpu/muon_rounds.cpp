// The products of a step of Muon; the definition is `rounds` of psann_fast/train/muon.py.
//
// A matrix x (rows, columns), at least as high as wide, becomes x * p(x^T x), p a polynomial, several times over. x^T x and its
// square are symmetric, so only tiles on and below the diagonal are multiplied. All operands lie as the multiplying instruction
// reads them: in panels of PANEL columns, where a unit holds the elements of one column in as many neighbouring rows as the
// instruction adds up (two of bf16, one float). x^T x is then a sum over rows of units, and since the results are symmetric, they
// serve as either operand as they are. What a product gives is rounded to T once, as a stored matrix would be.
//
// With many matrices each is one thread's from end to end and stays in its core's cache; with few the threads share each step.
#include "../kernels.h"
#include "../memory.h"
#include "../threads.h"
#include "norm.h"
#include "simd.h"

namespace PSANN_NAMESPACE {
namespace {

constexpr int TILE = HAS_MANY_REGISTERS ? 8 : 4;  // rows of a tile; its columns are two vectors
constexpr int64_t PANEL = 2 * WIDTH;
constexpr int64_t BLOCK = 64;    // rows of x that are replaced together
constexpr int64_t CHUNK = 128;   // units of a sum, after which another tile has its turn: a panel's then stay in the first cache
constexpr int64_t GRAIN = 1 << 18;  // products below which one thread is faster
static_assert(BLOCK % TILE == 0 && PANEL % TILE == 0 && TILE % 4 == 0, "");

using Tile = Float[TILE][2];

template <class T> struct Units;  // how elements of T are multiplied
template <> struct Units<float> {
    static constexpr int DEPTH = 1;  // elements in one
    static INLINE_LAMBDA Float add(Float sum, Uint a, Uint b) { return fma((Float)a, (Float)b, sum); }
};
template <> struct Units<bf16> {
    static constexpr int DEPTH = 2;
    static INLINE_LAMBDA Float add(Float sum, Uint a, Uint b) { return add_products(sum, a, b); }
};

INLINE Uint load_units(const uint32_t* p) { return *reinterpret_cast<const UintAnywhere*>(p); }
INLINE void store_units(uint32_t* p, Uint x) { *reinterpret_cast<UintAnywhere*>(p) = x; }

// A matrix of `depth` rows of units.
struct Panels {
    uint32_t* data;
    int64_t depth;
    uint32_t* panel(int64_t column) const { return data + column / PANEL * depth * PANEL + column % PANEL; }
};

// Rows [row, row + TILE) of columns [column, column + PANEL), column a multiple of PANEL.
INLINE void put_tile(const Panels& to, int64_t row, int64_t column, const Tile& tile, const float*) {
    uint32_t* out = to.panel(column) + row * PANEL;
    UNROLL for (int r = 0; r < TILE; r++) EACH(2) store_units(out + r * PANEL + i * WIDTH, (Uint)tile[r][i]);
}
INLINE void put_tile(const Panels& to, int64_t row, int64_t column, const Tile& tile, const bf16*) {
    uint32_t* out = to.panel(column) + row / 2 * PANEL;
    UNROLL for (int r = 0; r < TILE; r += 2)
        EACH(2) store_units(out + r / 2 * PANEL + i * WIDTH, interleaved_pair(tile[r][i], tile[r + 1][i]));
}

// Rows of units as columns: unit u of row r goes to out[u * stride + r].
INLINE void put_turned(uint32_t* out, int64_t stride, const Uint (&rows)[TILE]) {
    UNROLL for (int r = 0; r < TILE; r += 4) {
        Uint fours[4];
        EACH(4) fours[i] = rows[r + i];
        transpose_fours(fours);
        EACH(4) {
            const char* lanes = reinterpret_cast<const char*>(&fours[i]);
            UNROLL for (int group = 0; group < WIDTH / 4; group++)
                __builtin_memcpy(out + (group * 4 + i) * stride + r, lanes + group * 16, 16);
        }
    }
}

// Columns [row, row + TILE) of rows [column, column + PANEL): the same tile on the other side of the diagonal.
INLINE void put_mirrored(const Panels& to, int64_t row, int64_t column, const Tile& tile, const float*) {
    uint32_t* out = to.panel(row) + column * PANEL;
    UNROLL for (int v = 0; v < 2; v++) {
        Uint rows[TILE];
        EACH(TILE) rows[i] = (Uint)tile[i][v];
        put_turned(out + v * WIDTH * PANEL, PANEL, rows);
    }
}
INLINE void put_mirrored(const Panels& to, int64_t row, int64_t column, const Tile& tile, const bf16*) {
    Uint rows[TILE];
    EACH(TILE) rows[i] = rounded_pair(tile[i][0], tile[i][1]);
    put_turned(to.panel(row) + column / 2 * PANEL, PANEL, rows);
}

// What was put at [row, row + TILE) and [column, column + PANEL).
INLINE void get_tile(const Panels& from, int64_t row, int64_t column, Tile& tile, const float*) {
    const uint32_t* in = from.panel(column) + row * PANEL;
    UNROLL for (int r = 0; r < TILE; r++) EACH(2) tile[r][i] = (Float)load_units(in + r * PANEL + i * WIDTH);
}
INLINE void get_tile(const Panels& from, int64_t row, int64_t column, Tile& tile, const bf16*) {
    const uint32_t* in = from.panel(column) + row / 2 * PANEL;
    UNROLL for (int r = 0; r < TILE; r += 2)
        EACH(2) {
            Uint pair = load_units(in + r / 2 * PANEL + i * WIDTH);
            tile[r][i] = (Float)(pair << 16), tile[r + 1][i] = (Float)(pair & 0xffff0000u);
        }
}

// tile += the sum over units [begin, end) of unit(r, u) times `panel`.
template <class T, class Unit>
INLINE void multiply(Tile& tile, int64_t begin, int64_t end, const uint32_t* panel, const Unit& unit) {
    for (int64_t u = begin; u < end; u++) {
        Uint b[2];
        EACH(2) b[i] = load_units(panel + u * PANEL + i * WIDTH);
        UNROLL for (int r = 0; r < TILE; r++) {
            Uint a = Uint{} + unit(r, u);
            EACH(2) tile[r][i] = Units<T>::add(tile[r][i], a, b[i]);
        }
    }
}

// finish(row, tile) for each tile of left^T right, which is symmetric, from the diagonal down, in panel `column`.
// sums   (columns, PANEL) floats of scratch
template <class T, class Finish>
INLINE void symmetric_product(const Panels& left, const Panels& right, int64_t columns, int64_t column, float* sums,
                              const Finish& finish) {
    int64_t depth = left.depth, chunks = (depth + CHUNK - 1) / CHUNK;
    const uint32_t* panel = right.panel(column);
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        for (int64_t row = column; row < columns; row += TILE) {
            const uint32_t* rows = left.panel(row);
            float* held = sums + row * PANEL;
            Tile tile = {};
            if (chunk > 0)
                UNROLL for (int r = 0; r < TILE; r++) EACH(2) tile[r][i] = load(held + r * PANEL + i * WIDTH);
            multiply<T>(tile, depth * chunk / chunks, depth * (chunk + 1) / chunks, panel,
                [&](int r, int64_t u) INLINE_LAMBDA { return rows[u * PANEL + r]; });
            if (chunk == chunks - 1) finish(row, tile);
            else UNROLL for (int r = 0; r < TILE; r++) EACH(2) store(held + r * PANEL + i * WIDTH, tile[r][i]);
        }
    }
}

// Where the operands of one matrix lie. Both sides are filled up with zeros, which stay zeros.
template <class T> struct Layout {
    int64_t rows, columns;  // filled up
    int64_t x, gram, polynomial, sums, squares, floats;  // where each begins, and the whole, in floats
    explicit Layout(const MuonRounds& a) {
        rows = (a.rows + TILE - 1) / TILE * TILE, columns = (a.columns + PANEL - 1) / PANEL * PANEL;
        constexpr int64_t DEPTH = Units<T>::DEPTH;
        x = 0;
        gram = x + rows / DEPTH * columns;
        polynomial = gram + columns / DEPTH * columns;
        sums = polynomial + columns / DEPTH * columns;
        squares = sums + columns * columns;
        floats = (squares + columns / PANEL + 15) / 16 * 16;
    }
    int64_t blocks() const { return (rows + BLOCK - 1) / BLOCK; }
    int64_t panels() const { return columns / PANEL; }
};

// One matrix on its way. A step's pieces may run in any order and at once; a step needs the one before.
template <class T> struct Matrix {
    static constexpr int64_t DEPTH = Units<T>::DEPTH;
    const MuonRounds& a;
    const Layout<T>& layout;
    T* x;
    float* scratch;

    Panels panels(int64_t at, int64_t rows) const { return {reinterpret_cast<uint32_t*>(scratch + at), rows / DEPTH}; }

    static int64_t steps(const MuonRounds& a) { return 1 + 3 * a.rounds; }
    static int64_t pieces(const Layout<T>& layout, int64_t step) { return step % 3 == 0 ? layout.blocks() : layout.panels(); }

    void run(int64_t step, int64_t piece) const {
        if (step % 3 == 1) gram(piece, step == 1);
        else if (step % 3 == 2) polynomial(piece, step / 3);
        else block(piece, step / 3 - 1);
    }

    // The first gram's columns also leave the sum of their squares: the columns beside the diagonal panel stand for two.
    void gram(int64_t piece, bool is_first) const {
        Panels from = panels(layout.x, layout.rows), to = panels(layout.gram, layout.columns);
        int64_t column = piece * PANEL;
        Float squares[2] = {};
        symmetric_product<T>(from, from, layout.columns, column, scratch + layout.sums + column * layout.columns,
            [&](int64_t row, Tile& tile) INLINE_LAMBDA {
                put_tile(to, row, column, tile, static_cast<T*>(nullptr));
                bool is_beside = row >= column + PANEL;
                if (is_beside) put_mirrored(to, row, column, tile, static_cast<T*>(nullptr));
                Float times = all(is_beside ? 2.0f : 1.0f);
                if (is_first)
                    UNROLL for (int r = 0; r < TILE; r++)
                        EACH(2) squares[i] = fma(tile[r][i] * tile[r][i], times, squares[i]);
            });
        if (is_first) scratch[layout.squares + piece] = sum(squares[0] + squares[1]);
    }

    // The norm by which the first round divides the gram: no singular value of x is above its root.
    double bound() const { return norm(scratch + layout.squares, layout.panels(), a.least); }

    // b * gram + c * gram^2.
    void polynomial(int64_t piece, int64_t round) const {
        Panels from = panels(layout.gram, layout.columns), to = panels(layout.polynomial, layout.columns);
        int64_t column = piece * PANEL;
        double s = round == 0 ? bound() : 1.0;
        const double* quintic = a.quintics + 3 * round;
        Float b = all(static_cast<float>(quintic[1] / s)), c = all(static_cast<float>(quintic[2] / (s * s)));
        symmetric_product<T>(from, from, layout.columns, column, scratch + layout.sums + column * layout.columns,
            [&](int64_t row, Tile& tile) INLINE_LAMBDA {
                Tile gram;
                get_tile(from, row, column, gram, static_cast<T*>(nullptr));
                UNROLL for (int r = 0; r < TILE; r++) EACH(2) tile[r][i] = fma(tile[r][i], c, gram[r][i] * b);
                put_tile(to, row, column, tile, static_cast<T*>(nullptr));
                if (row >= column + PANEL) put_mirrored(to, row, column, tile, static_cast<T*>(nullptr));
            });
    }

    // Rows of x become a * x + x * polynomial, as elements and, but for the last round, as units; round -1 only makes units.
    void block(int64_t piece, int64_t round) const {
        Panels to = panels(layout.x, layout.rows), factor = panels(layout.polynomial, layout.columns);
        int64_t begin = piece * BLOCK, end = begin + BLOCK < layout.rows ? begin + BLOCK : layout.rows;
        int64_t depth = layout.columns / DEPTH;
        double s = round == 0 ? sqrt(bound()) : 1.0;
        Float scale = all(static_cast<float>(1.0 / s));
        Float keep = all(round < 0 ? 1.0f : static_cast<float>(a.quintics[3 * round]));
        // The rows as they were, turned: x is replaced while they are still needed.
        Workspace copy(round < 0 ? 0 : (end - begin) * depth);
        uint32_t* turned = reinterpret_cast<uint32_t*>(copy.data);
        for (int64_t row = begin; row < end && round >= 0; row += TILE)
            for (int64_t u = 0; u < depth; u += WIDTH) {
                Uint rows[TILE];
                EACH(TILE) rows[i] = units(row + i, u * DEPTH);
                put_turned(turned + (row - begin) * depth + u * TILE, TILE, rows);
            }
        for (int64_t column = 0; column < layout.columns; column += PANEL) {
            for (int64_t row = begin; row < end; row += TILE) {
                const uint32_t* rows = turned + (row - begin) * depth;
                Tile tile = {};
                if (round >= 0)
                    multiply<T>(tile, 0, depth, factor.panel(column),
                        [&](int r, int64_t u) INLINE_LAMBDA { return rows[u * TILE + r]; });
                UNROLL for (int r = 0; r < TILE; r++)
                    EACH(2) {
                        int64_t count = given(row + r, column + i * WIDTH);
                        T* at = x + (row + r) * a.columns + column + i * WIDTH;
                        tile[r][i] = fma(count > 0 ? take(at, count) : Float{}, keep, tile[r][i]) * scale;
                        if (round >= 0 && count > 0) give(at, tile[r][i], count);
                    }
                if (round + 1 < a.rounds) put_tile(to, row, column, tile, static_cast<T*>(nullptr));
            }
        }
    }

    // How many lanes of a vector that begins here x has; the others are 0.
    int64_t given(int64_t row, int64_t column) const {
        int64_t rest = row < a.rows ? a.columns - column : 0;
        return rest < WIDTH ? rest : WIDTH;
    }

    // A vector of units of a row.
    Uint units(int64_t row, int64_t column) const {
        constexpr int64_t MOST = WIDTH * DEPTH;
        int64_t count = row < a.rows ? a.columns - column : 0;
        Uint whole;
        if (count >= MOST) {
            __builtin_memcpy(&whole, x + row * a.columns + column, sizeof(whole));
            return whole;
        }
        T lanes[MOST] = {};
        for (int64_t i = 0; i < count; i++) lanes[i] = x[row * a.columns + column + i];
        __builtin_memcpy(&whole, lanes, sizeof(whole));
        return whole;
    }
};

template <class T> static void run(const MuonRounds& a) {
    int64_t elements = a.rows * a.columns;
    if (a.n * elements == 0) return;
    Layout<T> layout(a);
    int threads = a.n * elements * a.columns < GRAIN ? 1 : a.threads;
    bool is_whole = threads == 1 || a.n >= 4 * threads;
    // Of scratch memory: one for each matrix that is under way.
    int64_t slots = a.n;
    if (is_whole && slots > threads) slots = threads;
    if (is_whole && slots > MAX_SHARES) slots = MAX_SHARES;
    // A vector that lies across two cache lines takes two loads.
    Workspace memory(slots * layout.floats + 16);
    float* scratch = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data) + 63) / 64 * 64);
    auto matrix = [&](int64_t i, int64_t slot) {
        return Matrix<T>{a, layout, static_cast<T*>(a.x) + i * elements, scratch + slot * layout.floats};
    };
    if (!is_whole) {
        for (int64_t step = 0; step < Matrix<T>::steps(a); step++) {
            int64_t pieces = Matrix<T>::pieces(layout, step);
            parallel(threads, a.n * pieces, [&](int64_t at) { matrix(at / pieces, at / pieces).run(step, at % pieces); });
        }
        return;
    }
    struct alignas(64) Slot {
        bool is_taken;
    } taken[MAX_SHARES] = {};
    parallel(threads, a.n, [&](int64_t i) {
        int64_t slot = 0;
        while (__atomic_test_and_set(&taken[slot].is_taken, __ATOMIC_ACQUIRE)) slot = (slot + 1) % slots;
        Matrix<T> m = matrix(i, slot);
        for (int64_t step = 0; step < Matrix<T>::steps(a); step++)
            for (int64_t piece = 0; piece < Matrix<T>::pieces(layout, step); piece++) m.run(step, piece);
        __atomic_clear(&taken[slot].is_taken, __ATOMIC_RELEASE);
    });
}

}  // namespace

void muon_rounds(const MuonRounds& a) { a.type == Type::BFLOAT16 ? run<bf16>(a) : run<float>(a); }

}  // namespace PSANN_NAMESPACE
