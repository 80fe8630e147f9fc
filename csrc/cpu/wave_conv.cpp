// Causal depthwise dilated convolution, then the damped sine; the definition is wave_conv.py's reference.
//
// Tokens lie in one row after another, (tokens, features). A tap that reaches past its document's first token reads the state,
// or 0. Forward reads x (its taps come from the caches) and writes y. Backward has two passes: the first recomputes the
// convolution, writes its gradient dz in float and adds up the parameters' gradients, in blocks and slabs of tokens that follow
// from their number alone; the second gathers dx from dz.
#include "../kernels.h"
#include "../memory.h"
#include "../threads.h"
#include "damped_sine.h"

namespace PSANN_NAMESPACE {
namespace {

constexpr int TILE = 512;
constexpr int PAIR = 2;  // tokens that go through each step together
constexpr int MAX_TAPS = WAVE_CONV_MAX_TAPS;
constexpr int64_t BLOCK_TOKENS = 64;
constexpr int64_t MAX_SLABS = 32;
constexpr int64_t GRAIN = 1 << 13;

// First token of each token's document, and the document's number.
struct Documents {
    int64_t *start, *number;
};

static Documents find_documents(const WaveConv& a, int64_t* memory) {
    Documents d = {memory, memory + a.tokens};
    int64_t document = 0;
    for (int64_t t = 0; t < a.tokens; t++) {
        int64_t row = a.row_length > 0 ? t / a.row_length : 0;
        d.start[t] = row * a.row_length;
        d.number[t] = row;
        if (a.cu_seqlens == nullptr) continue;
        // Of empty documents at one place the last one counts.
        while (document + 1 < a.documents && a.cu_seqlens[document + 1] <= t) document++;
        int64_t begin = a.cu_seqlens[document];
        if (begin > d.start[t] && begin <= t) d.start[t] = begin;
        if (a.row_length == 0) d.number[t] = document;
    }
    return d;
}

struct Taps {
    alignas(64) float weight[MAX_TAPS][TILE];
    alignas(64) float bias[TILE];
    alignas(64) char zeros[TILE * 4];

    void fill(const WaveConv& a, int64_t column, int64_t columns) {
        for (int64_t c = 0; c < TILE; c++) {
            bool inside = c < columns;
            for (int j = 0; j < a.taps; j++) weight[j][c] = inside ? a.weight[(column + c) * a.taps + j] : 0.0f;
            bias[c] = inside && a.bias != nullptr ? a.bias[column + c] : 0.0f;
        }
        for (char& z : zeros) z = 0;
    }
};

// Where token t's taps stand, oldest first.
template <class T>
INLINE void find_taps(const WaveConv& a, const Documents& d, const Taps& taps, int64_t t, int64_t column, const T** from) {
    int64_t length = (a.taps - 1) * a.dilation;
    for (int j = 0; j < a.taps; j++) {
        int64_t source = t - (a.taps - 1 - j) * a.dilation;
        if (source >= d.start[t])
            from[j] = static_cast<const T*>(a.x) + source * a.x_stride + column;
        else if (a.state != nullptr)
            from[j] = static_cast<const T*>(a.state) + (d.number[t] * length + source - d.start[t] + length) * a.features + column;
        else
            from[j] = reinterpret_cast<const T*>(taps.zeros);
    }
}

template <class T> INLINE Float convolve(const Taps& taps, int count, const T* const* from, int64_t c, int64_t lanes) {
    Float z = load(taps.bias + c);
    for (int j = 0; j < count; j++)
        z = fma(load(taps.weight[j] + c), lanes == WIDTH ? load(from[j] + c) : load(from[j] + c, lanes), z);
    return z;
}

template <class T, int MODE> static void forward(const WaveConvForward& f) {
    const WaveConv& a = f.conv;
    T* y = static_cast<T*>(f.y);
    Workspace memory(4 * a.tokens);
    Documents documents = find_documents(a, reinterpret_cast<int64_t*>(memory.data));
    int64_t piece_tokens = 32, tiles = (a.features + TILE - 1) / TILE;
    int threads = a.tokens * a.features < GRAIN ? 1 : f.threads;
    parallel(threads, (a.tokens + piece_tokens - 1) / piece_tokens * tiles, [&](int64_t piece) {
        int64_t column = piece % tiles * TILE, columns = a.features - column < TILE ? a.features - column : TILE;
        int64_t begin = piece / tiles * piece_tokens, end = begin + piece_tokens < a.tokens ? begin + piece_tokens : a.tokens;
        Taps taps;
        Features<TILE> features;
        taps.fill(a, column, columns);
        features.fill(a.amplitude + column, a.frequency + column, a.damping + column, columns);
        for (int64_t t = begin; t < end; t += PAIR) {
            int64_t second = t + 1 < end ? t + 1 : t;
            const T* from[PAIR][MAX_TAPS];
            find_taps(a, documents, taps, t, column, from[0]);
            find_taps(a, documents, taps, second, column, from[1]);
            T* to[PAIR] = {y + t * a.features + column, y + second * a.features + column};
            for (int64_t c = 0; c < columns; c += WIDTH) {
                int64_t lanes = columns - c < WIDTH ? columns - c : WIDTH;
                Float z[PAIR], out[PAIR];
                for (int i = 0; i < PAIR; i++) z[i] = convolve(taps, static_cast<int>(a.taps), from[i], c, lanes);
                if (near(features, c, z)) forward_vectors<MODE, true>(features, c, z, out);
                else forward_vectors<MODE, false>(features, c, z, out);
                for (int i = 0; i < PAIR; i++) lanes == WIDTH ? store(to[i] + c, out[i]) : store(to[i] + c, out[i], lanes);
            }
        }
    });
}

// What is added up over tokens, per feature. A call uses the first of the weights.
struct Sums {
    alignas(64) float bias[TILE], amplitude[TILE], frequency[TILE], damping[TILE], weight[MAX_TAPS][TILE];
};
constexpr int64_t OTHERS = 4, SUMS = OTHERS + MAX_TAPS;  // of which the weights are the last

INLINE void add(float* into, Float x) { store(into, load(into) + x); }

template <class T, int MODE> static void backward(const WaveConvBackward& b) {
    const WaveConv& a = b.conv;
    const T* dy = static_cast<const T*>(b.dy);
    T* dx = static_cast<T*>(b.dx);
    Workspace memory(4 * a.tokens), gradient(a.tokens * a.features);
    float* dz = gradient.data;
    Documents documents = find_documents(a, reinterpret_cast<int64_t*>(memory.data));
    int taps_count = static_cast<int>(a.taps);
    int64_t tiles = (a.features + TILE - 1) / TILE;
    int64_t blocks = (a.tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    int64_t slab_tokens = (blocks + MAX_SLABS - 1) / MAX_SLABS * BLOCK_TOKENS;
    int64_t slabs = (a.tokens + slab_tokens - 1) / slab_tokens;
    int threads = a.tokens * a.features < GRAIN ? 1 : b.threads;
    Workspace partial(slabs * tiles * SUMS * TILE);  // one Sums per slab and tile

    parallel(threads, slabs * tiles, [&](int64_t piece) {
        int64_t column = piece % tiles * TILE, columns = a.features - column < TILE ? a.features - column : TILE;
        int64_t begin = piece / tiles * slab_tokens, end = begin + slab_tokens < a.tokens ? begin + slab_tokens : a.tokens;
        Taps taps;
        Features<TILE> features;
        taps.fill(a, column, columns);
        features.fill(a.amplitude + column, a.frequency + column, a.damping + column, columns);
        Sums block;
        float *total = partial.data + piece * SUMS * TILE, *sums = block.bias;
        for (int64_t k = 0; k < OTHERS + taps_count; k++)
            for (int64_t c = 0; c < columns; c += WIDTH) store(total + k * TILE + c, Float{}), store(sums + k * TILE + c, Float{});
        for (int64_t t = begin; t < end; t += PAIR) {
            bool pair = t + 1 < end;
            const T* from[PAIR][MAX_TAPS];
            for (int i = 0; i < PAIR; i++) find_taps(a, documents, taps, t + (i & pair), column, from[i]);
            for (int64_t c = 0; c < columns; c += WIDTH) {
                int64_t lanes = columns - c < WIDTH ? columns - c : WIDTH;
                Float z[PAIR], down[PAIR];
                for (int i = 0; i < PAIR; i++) {
                    const T* p = dy + (t + (i & pair)) * b.dy_stride + column + c;
                    z[i] = convolve(taps, taps_count, from[i], c, lanes);
                    down[i] = lanes == WIDTH ? load(p) : load(p, lanes);
                }
                Gradient out[PAIR];
                if (near(features, c, z)) backward_vectors<MODE, true>(features, c, z, down, out);
                else backward_vectors<MODE, false>(features, c, z, down, out);
                for (int i = 0; i < PAIR; i++) {
                    float* p = dz + (t + (i & pair)) * a.features + column + c;
                    lanes == WIDTH ? store(p, out[i].dz) : store(p, out[i].dz, lanes);
                }
                // A lone token counts once.
                if (!pair) out[1] = Gradient{};
                for (int j = 0; j < taps_count; j++) {
                    Float products = {};
                    for (int i = 0; i < PAIR; i++) {
                        if (i == 1 && !pair) break;
                        products = fma(out[i].dz, lanes == WIDTH ? load(from[i][j] + c) : load(from[i][j] + c, lanes), products);
                    }
                    add(block.weight[j] + c, products);
                }
                add(block.bias + c, out[0].dz + out[1].dz);
                add(block.amplitude + c, out[0].amplitude + out[1].amplitude);
                add(block.frequency + c, out[0].frequency + out[1].frequency);
                add(block.damping + c, out[0].damping + out[1].damping);
            }
            if ((t + PAIR) % BLOCK_TOKENS == 0 || t + PAIR >= end) {
                for (int64_t k = 0; k < OTHERS + taps_count; k++)
                    for (int64_t c = 0; c < columns; c += WIDTH) {
                        add(total + k * TILE + c, load(sums + k * TILE + c));
                        store(sums + k * TILE + c, Float{});
                    }
            }
        }
    });

    int64_t piece_tokens = 32;
    parallel(threads, (a.tokens + piece_tokens - 1) / piece_tokens * tiles, [&](int64_t piece) {
        int64_t column = piece % tiles * TILE, columns = a.features - column < TILE ? a.features - column : TILE;
        int64_t begin = piece / tiles * piece_tokens, end = begin + piece_tokens < a.tokens ? begin + piece_tokens : a.tokens;
        Taps taps;
        taps.fill(a, column, columns);
        for (int64_t t = begin; t < end; t++) {
            const float* from[MAX_TAPS];
            const float* weights[MAX_TAPS];
            int count = 0;
            for (int j = taps_count - 1; j >= 0; j--) {
                int64_t reader = t + (a.taps - 1 - j) * a.dilation;
                if (reader >= a.tokens || documents.start[reader] > t) break;
                from[count] = dz + reader * a.features + column;
                weights[count++] = taps.weight[j];
            }
            for (int64_t c = 0; c < columns; c += WIDTH) {
                int64_t lanes = columns - c < WIDTH ? columns - c : WIDTH;
                Float d = {};
                for (int j = 0; j < count; j++)
                    d = fma(load(weights[j] + c), lanes == WIDTH ? load(from[j] + c) : load(from[j] + c, lanes), d);
                T* p = dx + t * a.features + column + c;
                lanes == WIDTH ? store(p, d) : store(p, d, lanes);
            }
        }
    });

    for (int64_t f = 0; f < a.features; f++) {
        float sums[SUMS] = {};
        for (int64_t slab = 0; slab < slabs; slab++)
            for (int64_t k = 0; k < OTHERS + taps_count; k++)
                sums[k] += partial.data[((slab * tiles + f / TILE) * SUMS + k) * TILE + f % TILE];
        b.dbias[f] = sums[0];
        b.damplitude[f] = sums[1];
        b.dfrequency[f] = a.amplitude[f] * sums[2];
        b.ddamping[f] = -a.amplitude[f] * sums[3];
        for (int j = 0; j < taps_count; j++) b.dweight[f * a.taps + j] = sums[OTHERS + j];
    }
}

template <class T> static void forward_of(const WaveConvForward& a) {
    a.conv.mode == ABS ? forward<T, ABS>(a) : a.conv.mode == RELU ? forward<T, RELU>(a) : forward<T, NONE>(a);
}

template <class T> static void backward_of(const WaveConvBackward& a) {
    a.conv.mode == ABS ? backward<T, ABS>(a) : a.conv.mode == RELU ? backward<T, RELU>(a) : backward<T, NONE>(a);
}

}  // namespace

void wave_conv_forward(const WaveConvForward& a) {
    Type type = a.conv.type;
    type == Type::FLOAT32 ? forward_of<float>(a) : type == Type::BFLOAT16 ? forward_of<bf16>(a) : forward_of<fp16>(a);
}

void wave_conv_backward(const WaveConvBackward& a) {
    Type type = a.conv.type;
    type == Type::FLOAT32 ? backward_of<float>(a) : type == Type::BFLOAT16 ? backward_of<bf16>(a) : backward_of<fp16>(a);
}

}  // namespace PSANN_NAMESPACE
