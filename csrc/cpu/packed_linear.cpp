// A linear layer for any number of rows, from weights that were packed once; the definition is linear.py's reference.
//
// A panel holds PANEL outputs, input by input: (inputs, PANEL). A tile of up to TILE_ROWS rows of x and one panel keeps its sums in
// registers; each weight that is loaded serves every row of the tile, each element of x that is loaded serves the whole panel.
// BLOCK inputs of a panel stay in the first cache while all tiles of a chunk of rows use them; the next block is asked for
// meanwhile. Where one or two rows leave registers free, several panels go together: more sums hide an addition's latency, and
// memory is read as several streams.
//
// An output's products are added up in order within a block of inputs, and blocks in order, whatever else is computed beside it. So
// it depends on its own row alone, bit for bit: not on how many rows there are, on the threads, or on the instruction set where all
// have fma.
#include "../kernels.h"
#include "../memory.h"
#include "../threads.h"
#include "simd.h"

namespace PSANN_NAMESPACE {
namespace {

constexpr int PANEL = PACKED_LINEAR_PANEL, VECTORS = PANEL / WIDTH;
static_assert(PANEL % WIDTH == 0 && (VECTORS == 1 || VECTORS % 2 == 0), "a panel is one vector, or pairs of them");

// Sums, the weights and one element of x fill the 16 registers of AVX2; AVX-512 has twice as many.
constexpr int TILE_ROWS = VECTORS > 2 ? 3 : 6;
constexpr int64_t CHUNK_ROWS = 120;       // a multiple of TILE_ROWS; the sums of a chunk take 8 KB
constexpr int64_t BLOCK = 256;            // inputs: 16 KB of floats of a panel
constexpr int64_t GRAIN = 1 << 15;        // products below which one thread is faster
static_assert(CHUNK_ROWS % TILE_ROWS == 0, "chunks are whole tiles");

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// One input's weights of a panel, in the order of load_pair.
template <class W> INLINE void load_panel(const W* p, Float (&out)[VECTORS]) {
    if constexpr (VECTORS == 1) {
        out[0] = load(p);
    } else {
        UNROLL for (int i = 0; i < VECTORS; i += 2) {
            Float pair[2];
            load_pair(p + i * WIDTH, pair);
            out[i] = pair[0];
            out[i + 1] = pair[1];
        }
    }
}

// What a panel's vectors become in the order of its outputs.
template <class W> INLINE void straighten(Float (&panel)[VECTORS], const W* kind) {
    if constexpr (VECTORS > 1) {
        UNROLL for (int v = 0; v < VECTORS; v += 2) {
            Float pair[2] = {panel[v], panel[v + 1]};
            straighten_pair(pair, kind);
            panel[v] = pair[0];
            panel[v + 1] = pair[1];
        }
    }
}

// The last panel's outputs of one row, where they are fewer than PANEL. Called, not inlined: it would be there for every tile.
static __attribute__((noinline)) void write_part(const PackedLinear& a, float* to, int64_t output, const float* sums) {
    for (int64_t n = 0; output + n < a.outputs; n++) {
        float value = sums[n];
        if (a.scale != nullptr) value *= a.scale[output + n];
        if (a.bias != nullptr) value += a.bias[output + n];
        to[n] = value;
    }
}

// Writes a panel's outputs of one row, from `output` on.
template <class W> INLINE void write(const PackedLinear& a, int64_t row, int64_t output, Float (&panel)[VECTORS]) {
    straighten(panel, static_cast<const W*>(nullptr));
    float* to = static_cast<float*>(a.y) + row * a.outputs + output;
    if (output + PANEL > a.outputs) {
        float y[PANEL];
        UNROLL for (int v = 0; v < VECTORS; v++) store(y + v * WIDTH, panel[v]);
        return write_part(a, to, output, y);
    }
    UNROLL for (int v = 0; v < VECTORS; v++) {
        if (a.scale != nullptr) panel[v] *= load(a.scale + output + v * WIDTH);
        if (a.bias != nullptr) panel[v] += load(a.bias + output + v * WIDTH);
        store(to + v * WIDTH, panel[v]);
    }
}

// A block of inputs of up to TILE_ROWS rows and of one panel, or several.
template <class W> struct Tile {
    const float* x;  // the block's first input of the first row
    int64_t x_stride;
    const W* weight;
    int64_t panel_stride;
    int64_t inputs;
    const char* ahead;  // asked for meanwhile
    float* widened;     // (inputs, PANEL): gets the weights as floats, for the tiles that follow
    const float* sums;  // (panels, rows, PANEL): of the blocks before; null: there are none
    bool is_last;       // outputs are written; else the sums are kept
};

// A cache line is asked for at every fourth input. write_row(p, r, panel) writes the outputs of row r and panel p.
template <int R, int P, bool WIDENS, class W, class Write>
INLINE void add_products(const Tile<W>& t, float* sums, const Write& write_row) {
    Float s[P][R][VECTORS];
    UNROLL for (int p = 0; p < P; p++)
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int v = 0; v < VECTORS; v++) s[p][r][v] = Float{};
    const float* x = t.x;
    const W* weight = t.weight;
    const char* ahead = t.ahead;
    float* widened = t.widened;
    int64_t x_stride = t.x_stride, panel_stride = t.panel_stride;
    auto add = [&](int64_t i) INLINE_LAMBDA {
        UNROLL for (int p = 0; p < P; p++) {
            Float w[VECTORS];
            load_panel(weight + p * panel_stride + i * PANEL, w);
            if constexpr (WIDENS) {
                UNROLL for (int v = 0; v < VECTORS; v++) store(widened + i * PANEL + v * WIDTH, w[v]);
            }
            UNROLL for (int r = 0; r < R; r++) {
                Float own = all(x[r * x_stride + i]);
                UNROLL for (int v = 0; v < VECTORS; v++) s[p][r][v] = fma(own, w[v], s[p][r][v]);
            }
        }
    };
    int64_t left = t.inputs;
    for (; left >= 4; left -= 4) {
        __builtin_prefetch(ahead, 0, 3);
        UNROLL for (int i = 0; i < 4; i++) add(i);
        ahead += 64;
        x += 4;
        weight += 4 * PANEL;
        if (WIDENS) widened += 4 * PANEL;
    }
    for (; left > 0; left--) {
        add(0);
        x++;
        weight += PANEL;
        if (WIDENS) widened += PANEL;
    }
    if (t.sums != nullptr) {
        UNROLL for (int p = 0; p < P; p++)
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int v = 0; v < VECTORS; v++) s[p][r][v] += load(t.sums + (p * R + r) * PANEL + v * WIDTH);
    }
    if (t.is_last) {
        UNROLL for (int p = 0; p < P; p++)
            UNROLL for (int r = 0; r < R; r++) write_row(p, r, s[p][r]);
    } else {
        UNROLL for (int p = 0; p < P; p++)
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int v = 0; v < VECTORS; v++) store(sums + (p * R + r) * PANEL + v * WIDTH, s[p][r][v]);
    }
}

// A type whose panels have their lanes in the same order.
template <class W> struct Order { using As = float; };
template <> struct Order<bf16> { using As = bf16; };

// One panel and 1 to R rows, from `row` on. WEIGHT: in whose order the panel's lanes are; not W where another tile widened them.
template <class WEIGHT, bool WIDENS, int R, class W>
static void add_tile(const PackedLinear& a, int64_t row, int64_t rows, int64_t output, const Tile<W>& t, float* sums) {
    if constexpr (R > 1) {
        if (rows < R) return add_tile<WEIGHT, WIDENS, R - 1>(a, row, rows, output, t, sums);
    }
    add_products<R, 1, WIDENS>(t, sums,
        [&](int, int r, Float (&panel)[VECTORS]) INLINE_LAMBDA { write<WEIGHT>(a, row + r, output, panel); });
}

// P panels, `step` apart, for the R rows that there are.
template <int R, int P, class W>
INLINE void few_rows(const PackedLinear& a, const float* x, int64_t x_stride, int64_t panel, int64_t step) {
    int64_t stride = a.inputs * PANEL;
    alignas(64) float sums[P * R * PANEL];
    for (int64_t k = 0; k == 0 || k < a.inputs; k += BLOCK) {
        const W* weight = static_cast<const W*>(a.weight) + panel * stride + k * PANEL;
        // The hardware fetches ahead within each panel.
        Tile<W> t = {x + k, x_stride, weight, step * stride, smaller(BLOCK, a.inputs - k), reinterpret_cast<const char*>(x),
                     nullptr, k == 0 ? nullptr : sums, k + BLOCK >= a.inputs};
        add_products<R, P, false>(t, sums,
            [&](int p, int r, Float (&own)[VECTORS]) INLINE_LAMBDA { write<W>(a, r, (panel + p * step) * PANEL, own); });
    }
}

// Panels begin to end - 1 for `rows` rows from `first` on.
template <class W>
static void many_rows(const PackedLinear& a, const float* x, int64_t x_stride, int64_t first, int64_t rows, int64_t begin,
                      int64_t end) {
    constexpr bool IS_NARROW = sizeof(W) < sizeof(float);
    alignas(64) float sums[CHUNK_ROWS * PANEL], widened[IS_NARROW ? BLOCK * PANEL : 1];
    int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t panel = begin; panel < end; panel++) {
        const W* weight = static_cast<const W*>(a.weight) + panel * a.inputs * PANEL;
        for (int64_t k = 0; k == 0 || k < a.inputs; k += BLOCK) {
            int64_t inputs = smaller(BLOCK, a.inputs - k), done = 0;
            // The next block is asked for by the first tiles in equal parts; the others ask for what is there.
            constexpr int PARTS = 4 * PANEL * sizeof(W) / 64;
            const char* ahead = reinterpret_cast<const char*>(weight + (k + inputs) * PANEL);
            for (int64_t tile = 0; tile < tiles; tile++) {
                int64_t of_tile = (rows - done + tiles - tile - 1) / (tiles - tile);
                float* own = sums + done * PANEL;
                const float *from = x + (first + done) * x_stride + k, *before = k == 0 ? nullptr : own;
                const char* asked = tile < PARTS ? ahead + tile * (inputs / 4 * 64) : reinterpret_cast<const char*>(from);
                bool is_last = k + BLOCK >= a.inputs;
                if (tile == 0) {
                    Tile<W> t = {from, x_stride, weight + k * PANEL, 0, inputs, asked, widened, before, is_last};
                    add_tile<W, IS_NARROW, TILE_ROWS>(a, first, of_tile, panel * PANEL, t, own);
                } else {
                    const float* floats = widened;
                    if constexpr (!IS_NARROW) floats = weight + k * PANEL;
                    Tile<float> t = {from, x_stride, floats, 0, inputs, asked, nullptr, before, is_last};
                    add_tile<typename Order<W>::As, false, TILE_ROWS>(a, first + done, of_tile, panel * PANEL, t, own);
                }
                done += of_tile;
            }
        }
    }
}

template <class W> static void run(const PackedLinear& a) {
    const float* x = static_cast<const float*>(a.x);
    int64_t x_stride = a.x_stride;
    int threads = a.rows * a.inputs * a.outputs < GRAIN ? 1 : a.threads;
    int64_t panels = (a.outputs + PANEL - 1) / PANEL;
    if (a.rows <= 2) {
        // Panels far apart in a piece are as many streams.
        constexpr int TOGETHER = 4;
        int64_t piece = panels / (4 * threads) / TOGETHER * TOGETHER;
        piece = piece < TOGETHER ? TOGETHER : piece > 4 * TOGETHER ? 4 * TOGETHER : piece;
        parallel(threads, (panels + piece - 1) / piece, [&](int64_t i) {
            int64_t panel = i * piece, end = smaller(panel + piece, panels), step = (end - panel) / TOGETHER;
            for (int64_t j = 0; j < step; j++) {
                if (a.rows == 1) {
                    few_rows<1, TOGETHER, W>(a, x, x_stride, panel + j, step);
                } else {
                    few_rows<2, 2, W>(a, x, x_stride, panel + j, step);
                    few_rows<2, 2, W>(a, x, x_stride, panel + 2 * step + j, step);
                }
            }
            for (panel += step * TOGETHER; panel < end; panel++)
                a.rows == 1 ? few_rows<1, 1, W>(a, x, x_stride, panel, 0) : few_rows<2, 1, W>(a, x, x_stride, panel, 0);
        });
        return;
    }
    int64_t chunks = (a.rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
    int64_t chunk = ((a.rows + chunks - 1) / chunks + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
    int64_t group = panels * chunks / (4 * threads);
    group = group < 1 ? 1 : group > 4 ? 4 : group;
    int64_t groups = (panels + group - 1) / group;
    parallel(threads, chunks * groups, [&](int64_t i) {
        int64_t row = i / groups * chunk, panel = i % groups * group;
        if (row < a.rows) many_rows<W>(a, x, x_stride, row, smaller(chunk, a.rows - row), panel, smaller(panel + group, panels));
    });
}

static void of_weight(const PackedLinear& a) {
    switch (a.weight_type) {
        case Type::FLOAT32: return run<float>(a);
        case Type::BFLOAT16: return run<bf16>(a);
        case Type::FLOAT16: return run<fp16>(a);
        case Type::INT8: return run<int8_t>(a);
    }
}

// x and y are widened and narrowed as a whole, so that the product is compiled for floats alone.
template <class T> static void of_halves(const PackedLinear& a) {
    Workspace wide(a.rows * a.inputs), sums(a.rows * a.outputs);
    for (int64_t r = 0; r < a.rows; r++) {
        const T* from = static_cast<const T*>(a.x) + r * a.x_stride;
        float* to = wide.data + r * a.inputs;
        int64_t k = 0;
        for (; k + WIDTH <= a.inputs; k += WIDTH) store(to + k, load(from + k));
        for (; k < a.inputs; k++) to[k] = scalar(from[k]);
    }
    PackedLinear floats = a;
    floats.x = wide.data;
    floats.x_stride = a.inputs;
    floats.y = sums.data;
    of_weight(floats);
    T* y = static_cast<T*>(a.y);
    int64_t i = 0, count = a.rows * a.outputs;
    for (; i + WIDTH <= count; i += WIDTH) store(y + i, load(sums.data + i));
    for (; i < count; i++) put(y + i, sums.data[i]);
}

}  // namespace

void packed_linear(const PackedLinear& a) {
    a.type == Type::FLOAT32 ? of_weight(a) : a.type == Type::BFLOAT16 ? of_halves<bf16>(a) : of_halves<fp16>(a);
}

}  // namespace PSANN_NAMESPACE
