// Every native CPU kernel and its arguments. Pointers are to the first element, strides count elements, sizes are not negative.
// Nothing here knows torch: whoever calls has checked shapes and keeps the memory alive.
#pragma once

#include <stdint.h>

enum class Type : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3 };

// y = amplitude * exp(-damping * g(z)) * sin(frequency * z); z (rows, features) with unit stride along a row, y contiguous.
struct DampedSineForward {
    const void* z;
    const float *amplitude, *frequency, *damping;  // (features)
    void* y;
    int64_t rows, features, z_stride;
    Type type;  // of z and y
    int mode;   // what the damping multiplies: 0 |z|, 1 max(z, 0), 2 nothing
    int threads;
};

struct DampedSineBackward {
    const void *z, *dy;
    const float *amplitude, *frequency, *damping;
    void* dz;                                   // (rows, features) contiguous
    float *damplitude, *dfrequency, *ddamping;  // (features)
    int64_t rows, features, z_stride, dy_stride;
    Type type;
    int mode;
    int threads;
};

// y = h / sqrt(mean(h^2) + eps) * weight with h = x + residual rounded to its type; rows with unit stride, y and h contiguous.
// Beside a FLOAT32 x, residual and y may have other types; beside others they have x's.
struct RmsNormForward {
    const void *x, *residual, *weight;  // residual may be null: h is x
    void *y, *h;                        // h is null where residual is
    int64_t rows, features, x_stride, residual_stride;
    float eps;
    Type type, weight_type, residual_type, y_type;  // type: of x and h
    int threads;
};

struct RmsNormBackward {
    const void *h, *dy, *dh_in, *weight;  // dh_in, a gradient of h itself, may be null
    void *dh, *dresidual;                 // contiguous; dresidual, the same gradient in the residual's type, may be null
    float* dweight;
    int64_t rows, features, h_stride, dy_stride, dh_in_stride;
    float eps;
    Type type, weight_type, residual_type, y_type;  // type: of h, dh_in and dh
    int threads;
};

// h = x + alpha * branch, each contiguous; x and h are FLOAT32 or have the branch's type.
struct ScaledAdd {
    const void *x, *branch;
    const float* alpha;  // (1)
    void* h;
    int64_t elements;
    Type type, branch_type;
    int threads;
};

struct ScaledAddBackward {
    const void *dh, *branch;
    const float* alpha;
    void* dbranch;
    float* dalpha;  // (1)
    int64_t elements;
    Type type, branch_type;
    int threads;
};

constexpr int WAVE_CONV_MAX_TAPS = 16;

// x (tokens, features) with unit stride along a row.
struct WaveConv {
    const void *x, *state;                         // state (documents, (taps - 1) * dilation, features) contiguous, or null: 0
    const float *weight, *bias;                    // (features, taps), (features) or null
    const float *amplitude, *frequency, *damping;  // (features)
    const int32_t* cu_seqlens;                     // (documents + 1), or null: each row of row_length tokens is a document
    int64_t tokens, features, taps, dilation, documents, row_length, x_stride;  // row_length 0: cu_seqlens alone bounds documents
    Type type;                                     // of x, state, y, dy, dx
    int mode;
};

struct WaveConvForward {
    WaveConv conv;
    void* y;  // contiguous
    int threads;
};

struct WaveConvBackward {
    WaveConv conv;
    const void* dy;
    void* dx;  // contiguous
    float *dweight, *dbias, *damplitude, *dfrequency, *ddamping;
    int64_t dy_stride;
    int threads;
};

// Rows of a key or value cache: slot s of block b, head h begins at b * block_stride + s * slot_stride + h * head_stride.
struct Cache {
    void* data;
    int64_t block_stride, slot_stride, head_stride;
};

struct Rotary {
    const float *cos, *sin;  // (max_position, head_dim / 2) contiguous; null: nothing is rotated
    bool interleaved;        // adjacent pairs, else halves
};

// k, v (tokens, heads, head_dim) with unit stride along a head.
struct PagedAppend {
    const void *k, *v;
    Cache k_cache, v_cache;
    const int64_t *slot_mapping, *positions;  // slot -1: skip; positions may be null where nothing is rotated
    Rotary rotary;
    int64_t tokens, heads, head_dim, block_size;
    int64_t k_stride, k_head_stride, v_stride, v_head_stride;
    Type type;
    int threads;
    int64_t num_blocks, max_position;  // what slot_mapping and positions must stay below
};

struct PagedAttention {
    const void* q;  // (rows, heads, head_dim) with unit stride along a head
    Cache k_cache, v_cache;
    const int32_t *block_table, *seq_lens, *cu_seqlens_q;
    const float* alibi_slopes;  // (heads), or null
    void* o;                    // (rows, heads, head_dim) contiguous
    Rotary rotary;
    int64_t rows, sequences, heads, kv_heads, head_dim, block_size, table_stride, q_stride, q_head_stride;
    int64_t window;  // tokens seen at most; 0: all
    float softmax_scale;
    Type type;
    int threads;
    int64_t num_blocks, max_blocks, max_position;  // blocks in the cache, in a row of block_table; rows of the rotary tables
};

// Heads, rotated, from `in` to `out`: element (b, t, h, d) is b * batch_stride + t * token_stride + h * head_stride + d in each.
struct TurnHeads {
    const void* in;
    void *out, *narrow;    // narrow: null, or bf16 that receives what `out` does, in the same places
    const int64_t* first;  // (batch, first_stride): in place p of row b, the place where its document begins; null: 0
    Rotary rotary;
    int64_t batch, tokens, heads, head_dim, offset, first_stride;  // token t stands in place offset + t of its row
    int64_t in_batch_stride, in_token_stride, in_head_stride, out_batch_stride, out_token_stride, out_head_stride;
    float factor;   // of every number
    int direction;  // 1 forward, out in halves; -1 back, in from halves (matters where something is rotated)
    Type in_type, out_type;
    int threads;
};

// Scores (batch, heads, queries, keys) contiguous: query i stands at key offset + i and sees those from first to itself.
struct Scores {
    const int64_t* first;  // (batch, first_stride), by place; null: 0
    const float* slopes;   // (heads), or null: what a key is worth for each place that it is further on
    int64_t batch, heads, queries, keys, offset, first_stride;
    int64_t window;  // keys seen at most; 0: all
};

struct SoftmaxScores {
    Scores scores;
    const float* values;
    void* p;        // float or bf16
    Type type;      // of p
    int threads;
};

// dp = p * (dp - sum(p * dp)) of every row.
struct SoftmaxScoresBackward {
    Scores scores;
    const void* p;
    void* dp;
    Type type;  // of both, float or bf16
    int threads;
};

// losses (rows) of logits (rows, classes) contiguous, which become their gradient where that is wanted.
struct CrossEntropy {
    void* logits;
    const int64_t* targets;  // each below classes, or ignore_index
    float* losses;
    const float* dloss;  // (rows), what the gradient is multiplied by, or null: 1
    int64_t rows, classes, ignore_index;
    float label_smoothing, z_loss, soft_cap;  // soft_cap 0: none
    bool wants_gradient;
    Type type;  // of the logits
    int threads;
};

// y (rows, outputs) = x (rows, inputs) weight^T * scale + bias, summed in float.
struct Linear {
    const void *x, *weight;
    const float *scale, *bias;  // (outputs) or null
    void* y;                    // contiguous
    int64_t rows, inputs, outputs, x_stride, weight_stride;
    Type type, weight_type;
    int threads;
};

// The same with the weight packed as (outputs / PACKED_LINEAR_PANEL rounded up, inputs, PACKED_LINEAR_PANEL),
// zeros past the last output.
constexpr int PACKED_LINEAR_PANEL = 16;
struct PackedLinear {
    const void *x, *weight;
    const float *scale, *bias;  // (outputs) or null
    void* y;                    // contiguous
    int64_t rows, inputs, outputs, x_stride;
    Type type, weight_type;
    int threads;
};

// A token of each row of logits (rows, vocabulary), floats or doubles with unit stride along a row;
// -1: a logit is NaN or the highest infinite.
struct SampleTokens {
    const void* logits;
    const double *temperature, *top_p, *min_p, *draws;  // (rows); 0, 1 and 0 leave the first three out; draws are in [0, 1)
    const int64_t* top_k;                               // (rows), at least 1
    int64_t* tokens;                                    // (rows)
    int64_t rows, vocabulary, stride;
    bool is_double;
    int threads;
};

// The root of the sum of the squares of all elements of `count` tensors, each contiguous.
struct TotalNorm {
    const uintptr_t* tensors;
    const int64_t* sizes;  // elements of each
    float* norm;           // (1)
    int64_t count;
    int threads;
};

// All elements of such tensors *= factor.
struct ScaleList {
    const uintptr_t* tensors;
    const int64_t* sizes;
    float factor;
    int64_t count;
    int threads;
};

// Of each such parameter: steps += 1, firsts += (g - firsts) * (1 - beta1), seconds += (g^2 - seconds) * (1 - beta2) and
// p = p * (1 - lr * weight_decay) - lr * first' / (sqrt(second') + eps), where first' = firsts / (1 - beta1^steps), second' alike.
struct AdamW {
    const uintptr_t *parameters, *gradients, *firsts, *seconds, *steps;  // a step is one float
    const int64_t* sizes;
    double lr, beta1, beta2, eps, weight_decay;
    int64_t count;
    int threads;
};

// n matrices (rows, columns) of floats, contiguous, each where its address says. m += (g - m) * (1 - momentum) in place, and
// x (n, max(rows, columns), min(rows, columns)) contiguous: u = m + (g - m) * (1 - momentum), transposed where rows < columns, over
// its Frobenius norm, or over `least` if that is more.
struct MuonPrepare {
    const uintptr_t *gradients, *momenta;  // (n)
    void* x;
    int64_t n, rows, columns;
    double momentum;
    float least;
    Type type;  // of x: FLOAT32 or BFLOAT16
    int threads;
};

// Matrices x (n, rows, columns), each of a norm of 1 at most, contiguous, rows >= columns, in place: x = x / sqrt(s), s the
// Frobenius norm of x^T x or `least`; then, for each (a, b, c) of `quintics`, x = a x + b x g + c x g^2, g = x^T x.
struct MuonRounds {
    void* x;
    const double* quintics;  // (rounds, 3)
    int64_t n, rows, columns, rounds;
    float least;
    Type type;  // of x: FLOAT32 or BFLOAT16
    int threads;
};

// p = p * keep - scale * x, matrices and x as in MuonPrepare.
struct MuonApply {
    const uintptr_t* parameters;  // (n)
    const void* x;
    int64_t n, rows, columns;
    float keep, scale;
    Type type;  // of x
    int threads;
};

#define PSANN_KERNELS(X)                        \
    X(damped_sine_forward, DampedSineForward)   \
    X(damped_sine_backward, DampedSineBackward) \
    X(rms_norm_forward, RmsNormForward)         \
    X(rms_norm_backward, RmsNormBackward)       \
    X(scaled_add, ScaledAdd)                    \
    X(scaled_add_backward, ScaledAddBackward)   \
    X(wave_conv_forward, WaveConvForward)       \
    X(wave_conv_backward, WaveConvBackward)     \
    X(paged_append, PagedAppend)                \
    X(paged_attention, PagedAttention)          \
    X(turn_heads, TurnHeads)                    \
    X(softmax_scores, SoftmaxScores)            \
    X(softmax_scores_backward, SoftmaxScoresBackward) \
    X(cross_entropy, CrossEntropy)              \
    X(linear, Linear)                           \
    X(packed_linear, PackedLinear)              \
    X(sample_tokens, SampleTokens)              \
    X(total_norm, TotalNorm)                    \
    X(scale_list, ScaleList)                    \
    X(adamw, AdamW)                             \
    X(muon_prepare, MuonPrepare)                \
    X(muon_rounds, MuonRounds)                  \
    X(muon_apply, MuonApply)

#define PSANN_DECLARE(name, Arguments) void name(const Arguments&);
#define PSANN_MEMBER(name, Arguments) void (*name)(const Arguments&);
#define PSANN_ENTRY(name, Arguments) name,

// The kernels of one instruction set.
struct Kernels {
    const char* isa;
    int width;  // floats in a vector
    PSANN_KERNELS(PSANN_MEMBER)
};

// Those that this process uses: the widest that the processor has, until `use_isa` says otherwise.
const Kernels& kernels();
// False where this build or this processor lacks it.
bool use_isa(const char* isa);
// The built names that this processor can run, widest first, separated by spaces.
const char* usable_isas();
