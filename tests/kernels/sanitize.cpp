// Runs every native CPU kernel of one instruction set over awkward sizes, each buffer allocated to the byte, and prints all results
// as raw floats. Built by test_native_sanitizers.py with AddressSanitizer and UndefinedBehaviorSanitizer.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <vector>

#include "kernels.h"

namespace PSANN_NAMESPACE {
PSANN_KERNELS(PSANN_DECLARE)
}
using namespace PSANN_NAMESPACE;

static uint64_t state = 1;
static double uniform() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<double>(state >> 11) / 9007199254740992.0;
}

static float widen(Type type, const void* p, size_t i) {
    if (type == Type::FLOAT32) return static_cast<const float*>(p)[i];
    uint16_t h = static_cast<const uint16_t*>(p)[i];
    if (type == Type::BFLOAT16) {
        uint32_t bits = static_cast<uint32_t>(h) << 16;
        float x;
        memcpy(&x, &bits, 4);
        return x;
    }
    int exponent = h >> 10 & 31, fraction = h & 1023;
    float x = exponent == 31 ? (fraction ? NAN : INFINITY) : exponent ? ldexpf(1024 + fraction, exponent - 25) :
        ldexpf(fraction, -24);
    return h & 0x8000 ? -x : x;
}

// Exactly as many bytes as it holds, so that one element past the end is seen.
struct Buffer {
    Type type;
    size_t count;
    void* data;
    Buffer(Type t, size_t n, double low, double high)
        : type(t), count(n), data(malloc(n * (t == Type::FLOAT32 ? 4 : t == Type::INT8 ? 1 : 2))) {
        for (size_t i = 0; i < n; i++) {
            float x = static_cast<float>(low + (high - low) * uniform());
            if (t == Type::FLOAT32) static_cast<float*>(data)[i] = x;
            if (t == Type::INT8) static_cast<int8_t*>(data)[i] = static_cast<int8_t>(100 * x);
            uint32_t bits;
            memcpy(&bits, &x, 4);
            if (t == Type::BFLOAT16) static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(bits >> 16);
            if (t == Type::FLOAT16)
                static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(
                    (bits >> 16 & 0x8000) | (x == 0 ? 0 : ((bits >> 13 & 0x3ff) | ((bits >> 23 & 255) - 112) << 10)));
        }
    }
    ~Buffer() { free(data); }
    Buffer(const Buffer&) = delete;
    float* floats() const { return static_cast<float*>(data); }
    void print() const {
        for (size_t i = 0; i < count; i++) {
            float x = widen(type, data, i);
            fwrite(&x, 4, 1, stdout);
        }
    }
};

static void sines(Type type, int64_t rows, int64_t features, int mode) {
    size_t n = static_cast<size_t>(rows * features), f = static_cast<size_t>(features);
    Buffer z(type, n, -9, 9), dy(type, n, 0.25, 1), y(type, n, 0, 0), dz(type, n, 0, 0);
    Buffer a(Type::FLOAT32, f, 0.5, 2), w(Type::FLOAT32, f, -4, 4), d(Type::FLOAT32, f, 0, 30), sums(Type::FLOAT32, 3 * f, 0, 0);
    if (type == Type::FLOAT32 && n > 2) z.floats()[1] = 3e9f, z.floats()[2] = 1e-41f;
    damped_sine_forward({z.data, a.floats(), w.floats(), d.floats(), y.data, rows, features, features, type, mode, 2});
    damped_sine_backward({z.data, dy.data, a.floats(), w.floats(), d.floats(), dz.data, sums.floats(), sums.floats() + f,
        sums.floats() + 2 * f, rows, features, features, features, type, mode, 2});
    y.print(), dz.print(), sums.print();
}

static void norms(Type type, Type weight_type, int64_t rows, int64_t features) {
    size_t n = static_cast<size_t>(rows * features), f = static_cast<size_t>(features);
    Buffer x(type, n, 0.25, 2), r(type, n, 0.25, 2), weight(weight_type, f, 0.5, 2), y(type, n, 0, 0), h(type, n, 0, 0);
    Buffer dx(type, n, 0, 0), dresidual(type, n, 0, 0), dweight(Type::FLOAT32, f, 0, 0);
    rms_norm_forward({x.data, r.data, weight.data, y.data, h.data, rows, features, features, features, 1e-6f, type, weight_type,
        type, type, 2});
    rms_norm_backward({h.data, x.data, r.data, weight.data, dx.data, dresidual.data, dweight.floats(), rows, features, features,
        features, features, 1e-6f, type, weight_type, type, type, 2});
    y.print(), h.print(), dx.print(), dresidual.print(), dweight.print();
}

static void additions(Type type, Type branch_type, int64_t elements) {
    size_t n = static_cast<size_t>(elements);
    Buffer x(type, n, 0.25, 2), branch(branch_type, n, 0.25, 2), alpha(Type::FLOAT32, 1, 0.5, 1), h(type, n, 0, 0);
    Buffer dbranch(branch_type, n, 0, 0), dalpha(Type::FLOAT32, 1, 0, 0), norm(Type::FLOAT32, 1, 0, 0);
    scaled_add({x.data, branch.data, alpha.floats(), h.data, elements, type, branch_type, 2});
    scaled_add_backward({h.data, branch.data, alpha.floats(), dbranch.data, dalpha.floats(), elements, type, branch_type, 2});
    h.print(), dbranch.print(), dalpha.print();
    if (type != Type::FLOAT32) return;
    std::vector<uintptr_t> tensors = {reinterpret_cast<uintptr_t>(x.data), reinterpret_cast<uintptr_t>(h.data)};
    std::vector<int64_t> sizes = {elements, elements};
    total_norm({tensors.data(), sizes.data(), norm.floats(), 2, 2});
    norm.print();
}

// What a step does to parameters beside products: clipped gradients, and AdamW.
static void updates(int64_t elements) {
    std::vector<int64_t> sizes = {elements, 1, elements};
    std::vector<std::unique_ptr<Buffer>> buffers;
    std::vector<uintptr_t> lists[5];  // parameters, gradients, moments, counts of steps
    for (auto& list : lists) {
        for (int64_t size : sizes) {
            size_t count = &list == lists + 4 ? 1 : static_cast<size_t>(size);
            buffers.push_back(std::make_unique<Buffer>(Type::FLOAT32, count, 0.25, 1));
            list.push_back(reinterpret_cast<uintptr_t>(buffers.back()->data));
        }
        list.shrink_to_fit();
    }
    scale_list({lists[1].data(), sizes.data(), 0.5f, 3, 2});
    adamw({lists[0].data(), lists[1].data(), lists[2].data(), lists[3].data(), lists[4].data(), sizes.data(), 0.1, 0.9, 0.99, 1e-8,
        0.1, 3, 2});
    for (const auto& buffer : buffers) buffer->print();
}

// Heads there and back, and a softmax over scores with all the rules of what a query sees.
static void short_attention(Type type, Type narrow, int64_t heads, int64_t tokens, int64_t head_dim, bool interleaved,
                            int64_t window) {
    size_t n = static_cast<size_t>(2 * tokens * heads * head_dim), half = static_cast<size_t>(tokens * head_dim / 2);
    size_t pairs = static_cast<size_t>(2 * heads * tokens * tokens);
    Buffer q(type, n, 0.25, 2), wide(Type::FLOAT32, n, 0, 0), small(Type::BFLOAT16, n, 0, 0), back(type, n, 0, 0);
    Buffer cos(Type::FLOAT32, half, 0, 1), sin(Type::FLOAT32, half, 0, 1);
    Buffer slopes(Type::FLOAT32, static_cast<size_t>(heads), 0, 0.1);
    Buffer scores(Type::FLOAT32, pairs, 0.25, 9), p(narrow, pairs, 0, 0), dp(narrow, pairs, 0.25, 1);
    std::vector<int64_t> first;
    for (int64_t i = 0; i < 2 * tokens; i++) first.push_back(i % tokens / 5 * 5);
    first.shrink_to_fit();
    int64_t row = tokens * heads * head_dim;
    Rotary rotary = {head_dim % 2 ? nullptr : cos.floats(), sin.floats(), interleaved};
    turn_heads({q.data, wide.data, small.data, first.data(), rotary, 2, tokens, heads, head_dim, 0, tokens, row, heads * head_dim,
        head_dim, row, head_dim, tokens * head_dim, 0.5f, 1, type, Type::FLOAT32, 2});
    turn_heads({wide.data, back.data, nullptr, first.data(), rotary, 2, tokens, heads, head_dim, 0, tokens, row, head_dim,
        tokens * head_dim, row, heads * head_dim, head_dim, 2.0f, -1, Type::FLOAT32, type, 2});
    Scores rules = {first.data(), slopes.floats(), 2, heads, tokens, tokens, 0, tokens, window};
    softmax_scores({rules, scores.floats(), p.data, narrow, 2});
    softmax_scores_backward({rules, p.data, dp.data, narrow, 2});
    wide.print(), small.print(), back.print(), p.print(), dp.print();
}

static void losses(Type type, int64_t rows, int64_t classes, float soft_cap) {
    Buffer logits(type, static_cast<size_t>(rows * classes), 0.25, 9), dloss(Type::FLOAT32, static_cast<size_t>(rows), 0.5, 1);
    Buffer found(Type::FLOAT32, static_cast<size_t>(rows), 0, 0);
    std::vector<int64_t> targets;
    for (int64_t r = 0; r < rows; r++) targets.push_back(r % 3 == 2 ? -100 : (r * 7) % classes);
    targets.shrink_to_fit();
    cross_entropy({logits.data, targets.data(), found.floats(), rows % 2 ? dloss.floats() : nullptr, rows, classes, -100, 0.1f,
        0.01f, soft_cap, true, type, 2});
    logits.print(), found.print();
}

static void waves(Type type, int64_t rows, int64_t tokens, int64_t features, int64_t taps, int64_t dilation, bool has_state) {
    size_t n = static_cast<size_t>(rows * tokens * features), f = static_cast<size_t>(features), k = static_cast<size_t>(taps);
    Buffer x(type, n, 0.25, 2), dy(type, n, 0.25, 1), y(type, n, 0, 0), dx(type, n, 0, 0);
    Buffer state(type, static_cast<size_t>(rows * (taps - 1) * dilation) * f, 0.25, 1);
    Buffer weight(Type::FLOAT32, f * k, -1, 1), bias(Type::FLOAT32, f, -1, 1), a(Type::FLOAT32, f, 0.5, 2);
    Buffer w(Type::FLOAT32, f, 0.5, 4), d(Type::FLOAT32, f, 0, 1), sums(Type::FLOAT32, (k + 4) * f, 0, 0);
    WaveConv conv = {x.data, has_state ? state.data : nullptr, weight.floats(), bias.floats(), a.floats(), w.floats(), d.floats(),
        nullptr, rows * tokens, features, taps, dilation, 0, tokens, features, type, 0};
    wave_conv_forward({conv, y.data, 2});
    float* s = sums.floats();
    wave_conv_backward({conv, dy.data, dx.data, s, s + k * f, s + (k + 1) * f, s + (k + 2) * f, s + (k + 3) * f, features, 2});
    y.print(), dx.print(), sums.print();
}

static void pages(Type type, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t block_size, int64_t length, int64_t tokens,
                  int64_t window) {
    int64_t blocks = (length + block_size - 1) / block_size, width = kv_heads * head_dim;
    size_t cache = static_cast<size_t>(blocks * block_size * width), half = static_cast<size_t>(length * head_dim / 2);
    Buffer k(type, static_cast<size_t>(length * width), 0.25, 1), v(type, static_cast<size_t>(length * width), 0.25, 1);
    Buffer k_cache(type, cache, 0, 0), v_cache(type, cache, 0, 0);
    Buffer q(type, static_cast<size_t>(tokens * heads * head_dim), 0.25, 1);
    Buffer o(type, static_cast<size_t>(tokens * heads * head_dim), 0, 0), cos(Type::FLOAT32, half, 0, 1);
    Buffer sin(Type::FLOAT32, half, 0, 1), slopes(Type::FLOAT32, static_cast<size_t>(heads), 0, 0.1);
    std::vector<int64_t> slots, positions;
    std::vector<int32_t> table;
    for (int64_t b = 0; b < blocks; b++) table.push_back(static_cast<int32_t>(blocks - 1 - b));
    for (int64_t t = 0; t < length; t++) {
        slots.push_back(table[static_cast<size_t>(t / block_size)] * block_size + t % block_size);
        positions.push_back(t);
    }
    std::vector<int32_t> lengths = {static_cast<int32_t>(length)}, bounds = {0, static_cast<int32_t>(tokens)};
    slots.shrink_to_fit(), table.shrink_to_fit();
    Cache kc = {k_cache.data, block_size * width, width, head_dim}, vc = {v_cache.data, block_size * width, width, head_dim};
    Rotary rotary = {cos.floats(), sin.floats(), window == 0};
    paged_append({k.data, v.data, kc, vc, slots.data(), positions.data(), rotary, length, kv_heads, head_dim, block_size, width,
        head_dim, width, head_dim, type, 2});
    paged_attention({q.data, kc, vc, table.data(), lengths.data(), bounds.data(), slopes.floats(), o.data, rotary, tokens, 1, heads,
        kv_heads, head_dim, block_size, blocks, heads * head_dim, head_dim, window, 0.2f, type, 2});
    k_cache.print(), v_cache.print(), o.print();
}

static void linears(Type type, Type weight_type, int64_t rows, int64_t inputs, int64_t outputs) {
    Buffer x(type, static_cast<size_t>(rows * inputs), 0.25, 1);
    Buffer weight(weight_type, static_cast<size_t>(inputs * outputs), 0.25, 1), y(type, static_cast<size_t>(rows * outputs), 0, 0);
    Buffer scale(Type::FLOAT32, static_cast<size_t>(outputs), 0.1, 1), bias(Type::FLOAT32, static_cast<size_t>(outputs), 0, 1);
    linear({x.data, weight.data, weight_type == Type::INT8 ? scale.floats() : nullptr, bias.floats(), y.data, rows, inputs, outputs,
        inputs, inputs, type, weight_type, 2});
    y.print();
}

static void packed_linears(Type type, Type weight_type, int64_t rows, int64_t inputs, int64_t outputs) {
    int64_t panels = (outputs + PACKED_LINEAR_PANEL - 1) / PACKED_LINEAR_PANEL;
    Buffer x(type, static_cast<size_t>(rows * inputs), 0.25, 1);
    Buffer weight(weight_type, static_cast<size_t>(inputs * panels * PACKED_LINEAR_PANEL), 0.25, 1);
    Buffer y(type, static_cast<size_t>(rows * outputs), 0, 0);
    Buffer scale(Type::FLOAT32, static_cast<size_t>(outputs), 0.1, 1), bias(Type::FLOAT32, static_cast<size_t>(outputs), 0, 1);
    packed_linear({x.data, weight.data, weight_type == Type::INT8 ? scale.floats() : nullptr, bias.floats(), y.data, rows, inputs,
        outputs, inputs, type, weight_type, 2});
    y.print();
}

static void samples(int64_t rows, int64_t vocabulary, bool is_double) {
    size_t count = static_cast<size_t>(rows);
    std::vector<float> logits;
    for (int64_t i = 0; i < rows * vocabulary; i++) logits.push_back(static_cast<float>((i * 7919) % 101) * 0.1f);
    std::vector<double> wide(logits.begin(), logits.end()), temperature(count, 0.7), top_p(count, 0.9), min_p(count, 0.01), draws;
    std::vector<int64_t> top_k(count, 40), tokens(count);
    for (int64_t r = 0; r < rows; r++) draws.push_back((static_cast<double>(r) + 0.5) / static_cast<double>(rows));
    temperature[0] = 0;
    logits.shrink_to_fit(), wide.shrink_to_fit();
    const void* read = logits.data();
    if (is_double) read = wide.data();
    sample_tokens({read, temperature.data(), top_p.data(), min_p.data(), draws.data(), top_k.data(), tokens.data(), rows,
        vocabulary, vocabulary, is_double, 2});
    for (int64_t token : tokens) {
        float x = static_cast<float>(token);
        fwrite(&x, 4, 1, stdout);
    }
}

static void muons(Type type, int64_t n, int64_t rows, int64_t columns) {
    size_t elements = static_cast<size_t>(rows * columns), count = static_cast<size_t>(n);
    int64_t narrow = rows < columns ? rows : columns, wide = rows < columns ? columns : rows;
    std::vector<std::unique_ptr<Buffer>> buffers;
    std::vector<uintptr_t> lists[3];  // gradients, momenta, parameters
    for (auto& list : lists) {
        for (int64_t i = 0; i < n; i++) {
            buffers.push_back(std::make_unique<Buffer>(Type::FLOAT32, elements, 0.25, 1));
            list.push_back(reinterpret_cast<uintptr_t>(buffers.back()->data));
        }
        list.shrink_to_fit();
    }
    Buffer x(type, count * elements, 0, 0);
    muon_prepare({lists[0].data(), lists[1].data(), x.data, n, rows, columns, 0.95, 1e-7f, type, 2});
    x.print();
    // Tame ones, so that a rounding stays one; two, so that x is multiplied again after it was replaced.
    const double quintics[] = {1.0, -0.125, 0.0625, 1.0, 0.125, -0.0625};
    muon_rounds({x.data, quintics, n, wide, narrow, 2, 1e-7f, type, 2});
    muon_apply({lists[2].data(), x.data, n, rows, columns, 0.9f, 0.5f, type, 2});
    x.print();
    for (const auto& buffer : buffers) buffer->print();
}

int main() {
    for (int64_t elements : {1, 15, 33, 20000}) updates(elements);
    for (Type type : {Type::FLOAT32, Type::BFLOAT16})
        for (int64_t n : {1, 9})
            for (int64_t rows : {1, 7, 33, 300})
                for (int64_t columns : {1, 16, 35, 290}) muons(type, n, rows, columns);
    for (int64_t rows : {1, 5})
        for (int64_t vocabulary : {1, 7, 40, 4099}) samples(rows, vocabulary, false), samples(rows, vocabulary, true);
    const Type types[] = {Type::FLOAT32, Type::BFLOAT16, Type::FLOAT16};
    for (Type type : types) {
        for (int64_t rows : {1, 2, 3, 70})
            for (int64_t features : {1, 7, 16, 33, 520}) {
                for (int mode : {0, 1, 2}) sines(type, rows, features, mode);
                norms(type, Type::FLOAT32, rows, features);
                norms(type, type, rows, features);
            }
        for (int64_t elements : {1, 15, 33, 4097, 20000}) {
            additions(type, type, elements);
            additions(Type::FLOAT32, type, elements);
        }
        for (int64_t tokens : {1, 16, 19, 70})
            for (int64_t head_dim : {1, 2, 24, 64, 66})
                for (int64_t window : {0, 3})
                    for (Type narrow : {Type::FLOAT32, Type::BFLOAT16}) {
                        short_attention(type, narrow, 1, tokens, head_dim, true, window);
                        short_attention(type, narrow, 3, tokens, head_dim, false, window);
                    }
        for (int64_t rows : {1, 3, 40})
            for (int64_t classes : {1, 16, 19, 1030})
                for (float soft_cap : {0.0f, 3.0f}) losses(type, rows, classes, soft_cap);
        for (int64_t features : {1, 16, 19, 260})
            for (int64_t tokens : {1, 2, 5, 67})
                for (bool has_state : {false, true}) {
                    waves(type, 2, tokens, features, 4, 3, has_state);
                    waves(type, 1, tokens, features, 1, 1, has_state);
                }
        for (int64_t head_dim : {2, 24, 64, 130})
            for (int64_t length : {1, 31, 33, 129, 300})
                for (int64_t tokens : {1, 3, 20})
                    for (int64_t window : {0, 1, 40})
                        if (tokens <= length) {
                            pages(type, 6, 2, head_dim, 8, length, tokens, window);
                            pages(type, 1, 1, head_dim, 1, length, tokens, window);
                        }
        for (Type weight_type : {Type::FLOAT32, Type::BFLOAT16, Type::FLOAT16, Type::INT8})
            for (int64_t rows : {1, 2, 3, 8})
                for (int64_t inputs : {1, 15, 33, 300})
                    for (int64_t outputs : {1, 3, 18}) linears(type, weight_type, rows, inputs, outputs);
        for (Type weight_type : {Type::FLOAT32, Type::BFLOAT16, Type::FLOAT16, Type::INT8})
            for (int64_t rows : {1, 2, 3, 7, 25, 130})
                for (int64_t inputs : {1, 15, 259})
                    for (int64_t outputs : {1, 16, 70}) packed_linears(type, weight_type, rows, inputs, outputs);
    }
    return 0;
}
