// Damped sine, forward and backward; the definition is damped_sine.py's reference.
//
// Forward reads z and writes y. Backward reads z and dy, recomputes exp, sin and cos, writes dz and adds up the three parameter
// gradients: over rows in the order of memory within a block, blocks in order within a slab, slabs in order. Blocks and slabs
// follow from the number of rows alone, so the result does not depend on the number of threads.
#include "../kernels.h"
#include "../threads.h"
#include "damped_sine.h"

namespace PSANN_NAMESPACE {
namespace {

constexpr int TILE = 512;        // features whose constants stay in the first-level cache
constexpr int BLOCK_ROWS = 64;   // rows added up in float before they join their slab's sum
constexpr int MAX_SLABS = 32;
// Below it, elements, a second thread costs more than it saves.
constexpr int64_t GRAIN = 1 << 14;
// An output this large, bytes, is not read again from a cache; written past them, it spares reading its lines first.
constexpr int64_t STREAM_BYTES = 32 << 20;

using Tile = Features<TILE>;

template <class T, int MODE> static void forward_tile(const Tile& t, const T* z, T* y, int64_t rows, int64_t columns, int64_t z_stride, int64_t y_stride, bool streams) {
    for (int64_t r = 0; r < rows; r += PAIR) {
        // A last row without a partner is computed beside itself and stored once.
        bool pair = r + 1 < rows;
        const T* from[PAIR] = {z + r * z_stride, z + (r + pair) * z_stride};
        T* to[PAIR] = {y + r * y_stride, y + (r + pair) * y_stride};
        for (int64_t c = 0; c < columns; c += WIDTH) {
            bool whole = c + WIDTH <= columns;
            Float in[PAIR], out[PAIR];
            for (int i = 0; i < PAIR; i++) in[i] = whole ? load(from[i] + c) : load(from[i] + c, columns - c);
            forward_vectors<MODE>(t, c, in, out);
            for (int i = 0; i < PAIR; i++) {
                if (streams) stream(to[i] + c, out[i]);
                else if (whole) store(to[i] + c, out[i]);
                else store(to[i] + c, out[i], columns - c);
            }
        }
    }
    if (streams) stream_end();
}

// Features of a piece: whole tiles where rows suffice to feed the threads, narrower ones where they do not.
static int64_t tile_of(int64_t row_pieces, int64_t features, int threads) {
    int64_t tile = TILE;
    while (tile > 64 && row_pieces * ((features + tile - 1) / tile) < 4 * threads) tile /= 2;
    return tile;
}

template <class T, int MODE> static void forward(const DampedSineForward& a) {
    int64_t piece_rows = 32, row_pieces = (a.rows + piece_rows - 1) / piece_rows;
    int64_t tile = tile_of(row_pieces, a.features, a.threads), tiles = (a.features + tile - 1) / tile;
    const T* z = static_cast<const T*>(a.z);
    T* y = static_cast<T*>(a.y);
    bool streams = a.rows * a.features * static_cast<int64_t>(sizeof(T)) >= STREAM_BYTES && a.features % WIDTH == 0 && can_stream(y, WIDTH * sizeof(T));
    parallel(a.rows * a.features < GRAIN ? 1 : a.threads, row_pieces * tiles, [&](int64_t piece) {
        int64_t row = piece / tiles * piece_rows, column = piece % tiles * tile;
        int64_t rows = a.rows - row < piece_rows ? a.rows - row : piece_rows;
        int64_t columns = a.features - column < tile ? a.features - column : tile;
        Tile t;
        t.fill(a.amplitude + column, a.frequency + column, a.damping + column, columns);
        forward_tile<T, MODE>(t, z + row * a.z_stride + column, y + row * a.features + column, rows, columns, a.z_stride, a.features, streams);
    });
}

// Sums over rows, per feature: of dy e sin, dy e z cos and dy e g sin.
struct Sums {
    alignas(64) float amplitude[TILE], frequency[TILE], damping[TILE];
};

template <class T, int MODE> static void backward_tile(
    const Tile& t, Sums& sums, const T* z, const T* dy, T* dz, int64_t rows, int64_t columns, int64_t z_stride, int64_t dy_stride, int64_t dz_stride, bool streams) {
    for (int64_t r = 0; r < rows; r += PAIR) {
        bool pair = r + 1 < rows;
        const T *from[PAIR] = {z + r * z_stride, z + (r + pair) * z_stride}, *down[PAIR] = {dy + r * dy_stride, dy + (r + pair) * dy_stride};
        T* to[PAIR] = {dz + r * dz_stride, dz + (r + pair) * dz_stride};
        for (int64_t c = 0; c < columns; c += WIDTH) {
            bool whole = c + WIDTH <= columns;
            Float in[PAIR], grad[PAIR];
            for (int i = 0; i < PAIR; i++) {
                in[i] = whole ? load(from[i] + c) : load(from[i] + c, columns - c);
                grad[i] = whole ? load(down[i] + c) : load(down[i] + c, columns - c);
            }
            Gradient out[PAIR];
            backward_vectors<MODE>(t, c, in, grad, out);
            for (int i = 0; i < PAIR; i++) {
                if (streams) stream(to[i] + c, out[i].dz);
                else if (whole) store(to[i] + c, out[i].dz);
                else store(to[i] + c, out[i].dz, columns - c);
            }
            // A lone row counts once.
            if (!pair) out[1] = Gradient{};
            store(sums.amplitude + c, load(sums.amplitude + c) + (out[0].amplitude + out[1].amplitude));
            store(sums.frequency + c, load(sums.frequency + c) + (out[0].frequency + out[1].frequency));
            if constexpr (MODE != NONE) store(sums.damping + c, load(sums.damping + c) + (out[0].damping + out[1].damping));
        }
    }
    if (streams) stream_end();
}

static void add_sums(Sums& into, const Sums& from) {
    for (int64_t c = 0; c < TILE; c += WIDTH) {
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
    bool streams = a.rows * a.features * static_cast<int64_t>(sizeof(T)) >= STREAM_BYTES && a.features % WIDTH == 0 && can_stream(dz, WIDTH * sizeof(T));

    Workspace partial(slabs * 3 * a.features);  // (slabs, 3, features)
    parallel(threads, slabs * tiles, [&](int64_t piece) {
        int64_t slab = piece / tiles, column = piece % tiles * tile;
        int64_t columns = a.features - column < tile ? a.features - column : tile;
        int64_t end = (slab + 1) * slab_rows < a.rows ? (slab + 1) * slab_rows : a.rows;
        Tile t;
        t.fill(a.amplitude + column, a.frequency + column, a.damping + column, columns);
        Sums total = {};
        for (int64_t row = slab * slab_rows; row < end; row += BLOCK_ROWS) {
            Sums sums = {};
            backward_tile<T, MODE>(t, sums, z + row * a.z_stride + column, dy + row * a.dy_stride + column, dz + row * a.features + column,
                end - row < BLOCK_ROWS ? end - row : BLOCK_ROWS, columns, a.z_stride, a.dy_stride, a.features, streams);
            add_sums(total, sums);
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
