// Damped sine, forward and backward; the definition is damped_sine.py's reference.
//
// Forward reads z and writes y. Backward reads z and dy, recomputes exp, sin and cos, writes dz and adds up the three parameter
// gradients: over rows in the order of memory within a block, blocks in order within a slab, slabs in order. Blocks and slabs
// follow from the number of rows alone, so the result does not depend on the number of threads.
#include "../kernels.h"
#include "../memory.h"
#include "../threads.h"
#include "damped_sine.h"

namespace PSANN_NAMESPACE {
namespace {

// Features of a piece, where there are so many: as wide as the constants' place in the second-level cache allows. Threads on
// neighbouring columns of the same rows take lines from each other that the hardware fetched ahead for one of them, and each row
// of a narrow piece stops its stream: 1024 x 2048 in pieces of 512 took 1.2 to 1.6 times as long.
constexpr int TILE = 2048;
constexpr int BLOCK_ROWS = 64;   // rows added up in float before they join their slab's sum
constexpr int MAX_SLABS = 32;
// Below it, elements, a second thread costs more than it saves.
constexpr int64_t GRAIN = 1 << 14;

using Tile = Features<TILE>;

// Rows that go through each step together, so that a constant is fetched once for both; more would leave the registers.
constexpr int ROWS = 2, BACKWARD_ROWS = 2;
// Of a piece of forward, at most: what a tile's constants cost is that of two rows.
constexpr int64_t PIECE_ROWS = 96;

// What the short way does not serve: a part of a vector, or a lane that needs care.
template <class T, int MODE>
static __attribute__((noinline)) void forward_carefully(const Tile& t, int64_t c, int64_t lanes, const T* z, T* y) {
    Float in[1] = {lanes == WIDTH ? load(z) : load(z, lanes)}, out[1];
    forward_vectors<MODE, false>(t, c, in, out);
    lanes == WIDTH ? store(y, out[0]) : store(y, out[0], lanes);
}

template <class T, int MODE, int R>
static void forward_rows(const Tile& t, const T* z, T* y, int64_t columns, int64_t z_stride, int64_t y_stride) {
    int64_t c = 0;
    for (; c + WIDTH <= columns; c += WIDTH) {
        Float in[R], out[R];
        EACH(R) in[i] = load(z + i * z_stride + c);
        if (!near(t, c, in)) {
            EACH(R) forward_carefully<T, MODE>(t, c, WIDTH, z + i * z_stride + c, y + i * y_stride + c);
            continue;
        }
        forward_vectors<MODE, true>(t, c, in, out);
        // Never past the caches, however large the output: it was measured at half the speed.
        EACH(R) store_number(y + i * y_stride + c, out[i]);
    }
    if (c < columns) EACH(R) forward_carefully<T, MODE>(t, c, columns - c, z + i * z_stride + c, y + i * y_stride + c);
}

template <class T, int MODE>
static void forward_tile(const Tile& t, const T* z, T* y, int64_t rows, int64_t columns, int64_t z_stride, int64_t y_stride) {
    int64_t r = 0;
    for (; r + ROWS <= rows; r += ROWS)
        forward_rows<T, MODE, ROWS>(t, z + r * z_stride, y + r * y_stride, columns, z_stride, y_stride);
    for (; r < rows; r++) forward_rows<T, MODE, 1>(t, z + r * z_stride, y + r * y_stride, columns, z_stride, y_stride);
}

// Features of a piece: whole tiles where rows suffice to feed the threads, narrower ones where they do not.
static int64_t tile_of(int64_t row_pieces, int64_t features, int threads) {
    int64_t tile = TILE;
    while (tile > 64 && row_pieces * ((features + tile - 1) / tile) < 4 * threads) tile /= 2;
    return tile;
}

template <class T, int MODE> static void forward(const DampedSineForward& a) {
    // A whole number of pieces for each thread, all but the last of the same even number of rows.
    int64_t row_pieces = ((a.rows + PIECE_ROWS - 1) / PIECE_ROWS + a.threads - 1) / a.threads * a.threads;
    if (row_pieces == 0) return;
    int64_t piece_rows = (a.rows + row_pieces * ROWS - 1) / (row_pieces * ROWS) * ROWS;
    row_pieces = (a.rows + piece_rows - 1) / piece_rows;
    int64_t tile = tile_of(row_pieces, a.features, a.threads), tiles = (a.features + tile - 1) / tile;
    const T* z = static_cast<const T*>(a.z);
    T* y = static_cast<T*>(a.y);
    expect_writes(y, static_cast<size_t>(a.rows * a.features) * sizeof(T));
    parallel(a.rows * a.features < GRAIN ? 1 : a.threads, row_pieces * tiles, [&](int64_t piece) {
        int64_t row = piece % row_pieces * piece_rows, column = piece / row_pieces * tile;
        int64_t rows = a.rows - row < piece_rows ? a.rows - row : piece_rows;
        int64_t columns = a.features - column < tile ? a.features - column : tile;
        Tile t;
        t.fill(a.amplitude + column, a.frequency + column, a.damping + column, columns);
        forward_tile<T, MODE>(t, z + row * a.z_stride + column, y + row * a.features + column, rows, columns, a.z_stride,
            a.features);
    });
}

// Sums over rows, per feature: of dy e sin, dy e z cos and dy e g sin.
struct Sums {
    alignas(64) float amplitude[Tile::ROOM], frequency[Tile::ROOM], damping[Tile::ROOM];

    void clear(int64_t columns) {
        for (int64_t c = 0; c < columns; c += WIDTH)
            store(amplitude + c, Float{}), store(frequency + c, Float{}), store(damping + c, Float{});
    }
};

template <int MODE> INLINE void add(Sums& sums, int64_t c, const Gradient& g) {
    store(sums.amplitude + c, load(sums.amplitude + c) + g.amplitude);
    store(sums.frequency + c, load(sums.frequency + c) + g.frequency);
    if constexpr (MODE != NONE) store(sums.damping + c, load(sums.damping + c) + g.damping);
}

template <class T, int MODE>
static __attribute__((noinline)) Gradient backward_carefully(const Tile& t, int64_t c, int64_t lanes, const T* z, const T* dy,
                                                             T* dz) {
    Float in[1] = {lanes == WIDTH ? load(z) : load(z, lanes)}, down[1] = {lanes == WIDTH ? load(dy) : load(dy, lanes)};
    Gradient out[1];
    backward_vectors<MODE, false>(t, c, in, down, out);
    lanes == WIDTH ? store(dz, out[0].dz) : store(dz, out[0].dz, lanes);
    return out[0];
}

template <class T, int MODE, int R>
static void backward_rows(const Tile& t, Sums& sums, const T* z, const T* dy, T* dz, int64_t columns,
                          int64_t z_stride, int64_t dy_stride, int64_t dz_stride) {
    int64_t c = 0;
    auto carefully = [&](int64_t lanes) {
        EACH(R)
            add<MODE>(sums, c, backward_carefully<T, MODE>(t, c, lanes, z + i * z_stride + c, dy + i * dy_stride + c,
                dz + i * dz_stride + c));
    };
    for (; c + WIDTH <= columns; c += WIDTH) {
        Float in[R], down[R];
        EACH(R) in[i] = load(z + i * z_stride + c), down[i] = load(dy + i * dy_stride + c);
        if (!near(t, c, in)) {
            carefully(WIDTH);
            continue;
        }
        Gradient out[R];
        backward_vectors<MODE, true>(t, c, in, down, out);
        EACH(R) store(dz + i * dz_stride + c, out[i].dz);
        EACH(R) add<MODE>(sums, c, out[i]);
    }
    if (c < columns) carefully(columns - c);
}

template <class T, int MODE>
static void backward_tile(const Tile& t, Sums& sums, const T* z, const T* dy, T* dz, int64_t rows, int64_t columns,
                          int64_t z_stride, int64_t dy_stride, int64_t dz_stride) {
    int64_t r = 0;
    for (; r + BACKWARD_ROWS <= rows; r += BACKWARD_ROWS)
        backward_rows<T, MODE, BACKWARD_ROWS>(t, sums, z + r * z_stride, dy + r * dy_stride, dz + r * dz_stride, columns, z_stride,
            dy_stride, dz_stride);
    for (; r < rows; r++)
        backward_rows<T, MODE, 1>(t, sums, z + r * z_stride, dy + r * dy_stride, dz + r * dz_stride, columns, z_stride, dy_stride,
            dz_stride);
}

static void add_sums(Sums& into, const Sums& from, int64_t columns) {
    for (int64_t c = 0; c < columns; c += WIDTH) {
        store(into.amplitude + c, load(into.amplitude + c) + load(from.amplitude + c));
        store(into.frequency + c, load(into.frequency + c) + load(from.frequency + c));
        store(into.damping + c, load(into.damping + c) + load(from.damping + c));
    }
}

template <class T, int MODE> static void backward(const DampedSineBackward& a) {
    int64_t blocks = (a.rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    int64_t slab_rows = (blocks + MAX_SLABS - 1) / MAX_SLABS * BLOCK_ROWS;
    int64_t slabs = (a.rows + slab_rows - 1) / slab_rows;
    int64_t tile = tile_of(slabs, a.features, a.threads), tiles = (a.features + tile - 1) / tile;
    int threads = a.rows * a.features < GRAIN ? 1 : a.threads;
    const T *z = static_cast<const T*>(a.z), *dy = static_cast<const T*>(a.dy);
    T* dz = static_cast<T*>(a.dz);
    expect_writes(dz, static_cast<size_t>(a.rows * a.features) * sizeof(T));

    Workspace partial(slabs * 3 * a.features);  // (slabs, 3, features)
    parallel(threads, slabs * tiles, [&](int64_t piece) {
        int64_t slab = piece % slabs, column = piece / slabs * tile;
        int64_t columns = a.features - column < tile ? a.features - column : tile;
        int64_t end = (slab + 1) * slab_rows < a.rows ? (slab + 1) * slab_rows : a.rows;
        Tile t;
        t.fill(a.amplitude + column, a.frequency + column, a.damping + column, columns);
        Sums total, sums;
        total.clear(columns);
        for (int64_t row = slab * slab_rows; row < end; row += BLOCK_ROWS) {
            sums.clear(columns);
            backward_tile<T, MODE>(t, sums, z + row * a.z_stride + column, dy + row * a.dy_stride + column,
                dz + row * a.features + column, end - row < BLOCK_ROWS ? end - row : BLOCK_ROWS, columns, a.z_stride, a.dy_stride,
                a.features);
            add_sums(total, sums, columns);
        }
        float* out = partial.data + slab * 3 * a.features + column;
        for (int64_t c = 0; c < columns; c++) {
            out[c] = total.amplitude[c];
            out[a.features + c] = total.frequency[c];
            out[2 * a.features + c] = total.damping[c];
        }
    });
    for (int64_t c = 0; c < a.features; c++) {
        float sums[3] = {};
        for (int64_t slab = 0; slab < slabs; slab++)
            for (int k = 0; k < 3; k++) sums[k] += partial.data[(slab * 3 + k) * a.features + c];
        a.damplitude[c] = sums[0];
        a.dfrequency[c] = a.amplitude[c] * sums[1];
        a.ddamping[c] = -a.amplitude[c] * sums[2];
    }
}

template <class T> static void forward_of(const DampedSineForward& a) {
    a.mode == ABS ? forward<T, ABS>(a) : a.mode == RELU ? forward<T, RELU>(a) : forward<T, NONE>(a);
}

template <class T> static void backward_of(const DampedSineBackward& a) {
    a.mode == ABS ? backward<T, ABS>(a) : a.mode == RELU ? backward<T, RELU>(a) : backward<T, NONE>(a);
}

}  // namespace

void damped_sine_forward(const DampedSineForward& a) {
    a.type == Type::FLOAT32 ? forward_of<float>(a) : a.type == Type::BFLOAT16 ? forward_of<bf16>(a) : forward_of<fp16>(a);
}

void damped_sine_backward(const DampedSineBackward& a) {
    a.type == Type::FLOAT32 ? backward_of<float>(a) : a.type == Type::BFLOAT16 ? backward_of<bf16>(a) : backward_of<fp16>(a);
}

}  // namespace PSANN_NAMESPACE
