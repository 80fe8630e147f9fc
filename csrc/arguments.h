// What a kernel takes, from numbers as Python has them: addresses are integers; whoever calls checked what they point to. Both
// extension modules bind these, so that a GPU's kernels take what a CPU's do.
#pragma once

#include <stdint.h>

#include <array>
#include <vector>

#include "kernels.h"

namespace arguments {

template <class T> T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

inline DampedSineForward damped_sine_forward(uintptr_t z, uintptr_t amplitude, uintptr_t frequency, uintptr_t damping, uintptr_t y,
                                             int64_t rows, int64_t features, int64_t z_stride, int type, int mode) {
    return {at<void>(z), at<float>(amplitude), at<float>(frequency), at<float>(damping), at<void>(y), rows, features, z_stride,
            static_cast<Type>(type), mode, 0};
}

inline DampedSineBackward damped_sine_backward(uintptr_t z, uintptr_t dy, uintptr_t amplitude, uintptr_t frequency,
                                               uintptr_t damping, uintptr_t dz, uintptr_t damplitude, uintptr_t dfrequency,
                                               uintptr_t ddamping, int64_t rows, int64_t features, int64_t z_stride,
                                               int64_t dy_stride, int type, int mode) {
    return {at<void>(z), at<void>(dy), at<float>(amplitude), at<float>(frequency), at<float>(damping), at<void>(dz),
            at<float>(damplitude), at<float>(dfrequency), at<float>(ddamping), rows, features, z_stride, dy_stride,
            static_cast<Type>(type), mode, 0};
}

inline RmsNormForward rms_norm_forward(uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t y, uintptr_t h, int64_t rows,
                                       int64_t features, int64_t x_stride, int64_t residual_stride, float eps, int type,
                                       int weight_type, int residual_type, int y_type) {
    return {at<void>(x), at<void>(residual), at<void>(weight), at<void>(y), at<void>(h), rows, features, x_stride, residual_stride,
            eps, static_cast<Type>(type), static_cast<Type>(weight_type), static_cast<Type>(residual_type),
            static_cast<Type>(y_type), 0};
}

inline RmsNormBackward rms_norm_backward(uintptr_t h, uintptr_t dy, uintptr_t dh_in, uintptr_t weight, uintptr_t dh,
                                         uintptr_t dresidual, uintptr_t dweight, int64_t rows, int64_t features, int64_t h_stride,
                                         int64_t dy_stride, int64_t dh_in_stride, float eps, int type, int weight_type,
                                         int residual_type, int y_type) {
    return {at<void>(h), at<void>(dy), at<void>(dh_in), at<void>(weight), at<void>(dh), at<void>(dresidual), at<float>(dweight),
            rows, features, h_stride, dy_stride, dh_in_stride, eps, static_cast<Type>(type), static_cast<Type>(weight_type),
            static_cast<Type>(residual_type), static_cast<Type>(y_type), 0};
}

inline ScaledAdd scaled_add(uintptr_t x, uintptr_t branch, uintptr_t alpha, uintptr_t h, int64_t elements, int type,
                            int branch_type) {
    return {at<void>(x), at<void>(branch), at<float>(alpha), at<void>(h), elements, static_cast<Type>(type),
            static_cast<Type>(branch_type), 0};
}

inline ScaledAddBackward scaled_add_backward(uintptr_t dh, uintptr_t branch, uintptr_t alpha, uintptr_t dbranch, uintptr_t dalpha,
                                             int64_t elements, int type, int branch_type) {
    return {at<void>(dh), at<void>(branch), at<float>(alpha), at<void>(dbranch), at<float>(dalpha), elements,
            static_cast<Type>(type), static_cast<Type>(branch_type), 0};
}

// WaveConv's members in order. No class is bound: a module may be loaded under two names, and a type is registered once.
using WaveConvNumbers = std::array<int64_t, 17>;

inline WaveConv wave_conv(const WaveConvNumbers& n) {
    auto address = [&](size_t i) { return static_cast<uintptr_t>(n[i]); };
    return {at<void>(address(0)), at<void>(address(1)), at<float>(address(2)), at<float>(address(3)), at<float>(address(4)),
            at<float>(address(5)), at<float>(address(6)), at<int32_t>(address(7)), n[8], n[9], n[10], n[11], n[12], n[13], n[14],
            static_cast<Type>(n[15]), static_cast<int>(n[16])};
}

inline WaveConvForward wave_conv_forward(const WaveConvNumbers& conv, uintptr_t y) { return {wave_conv(conv), at<void>(y), 0}; }

inline WaveConvBackward wave_conv_backward(const WaveConvNumbers& conv, uintptr_t dy, uintptr_t dx, uintptr_t dweight,
                                           uintptr_t dbias, uintptr_t damplitude, uintptr_t dfrequency, uintptr_t ddamping,
                                           int64_t dy_stride) {
    return {wave_conv(conv), at<void>(dy), at<void>(dx), at<float>(dweight), at<float>(dbias), at<float>(damplitude),
            at<float>(dfrequency), at<float>(ddamping), dy_stride, 0};
}

// (batch, tokens, heads) of one side, or (blocks, slots, heads) of a cache.
using Strides = std::array<int64_t, 3>;

inline Cache cache(uintptr_t data, const Strides& strides) { return {at<void>(data), strides[0], strides[1], strides[2]}; }

inline PagedAppend paged_append(uintptr_t k, uintptr_t v, uintptr_t k_cache, Strides k_strides, uintptr_t v_cache,
                                Strides v_strides, uintptr_t slot_mapping, uintptr_t positions, uintptr_t cos, uintptr_t sin,
                                bool interleaved, int64_t tokens, int64_t heads, int64_t head_dim, int64_t block_size,
                                int64_t num_blocks, int64_t max_position, int64_t k_stride, int64_t k_head_stride, int64_t v_stride,
                                int64_t v_head_stride, int type) {
    return {at<void>(k), at<void>(v), cache(k_cache, k_strides), cache(v_cache, v_strides), at<int64_t>(slot_mapping),
            at<int64_t>(positions), {at<float>(cos), at<float>(sin), interleaved}, tokens, heads, head_dim, block_size, k_stride,
            k_head_stride, v_stride, v_head_stride, static_cast<Type>(type), 0, num_blocks, max_position};
}

inline PagedAttention paged_attention(uintptr_t q, uintptr_t k_cache, Strides k_strides, uintptr_t v_cache, Strides v_strides,
                                      uintptr_t block_table, uintptr_t seq_lens, uintptr_t cu_seqlens_q, uintptr_t alibi_slopes,
                                      uintptr_t o, uintptr_t cos, uintptr_t sin, bool interleaved, int64_t rows, int64_t sequences,
                                      int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t block_size, int64_t num_blocks,
                                      int64_t max_blocks, int64_t max_position, int64_t table_stride, int64_t q_stride,
                                      int64_t q_head_stride, int64_t window, float softmax_scale, int type) {
    return {at<void>(q), cache(k_cache, k_strides), cache(v_cache, v_strides), at<int32_t>(block_table), at<int32_t>(seq_lens),
            at<int32_t>(cu_seqlens_q), at<float>(alibi_slopes), at<void>(o), {at<float>(cos), at<float>(sin), interleaved}, rows,
            sequences, heads, kv_heads, head_dim, block_size, table_stride, q_stride, q_head_stride, window, softmax_scale,
            static_cast<Type>(type), 0, num_blocks, max_blocks, max_position};
}

inline TurnHeads turn_heads(uintptr_t in, const Strides& in_strides, uintptr_t out, const Strides& out_strides, uintptr_t narrow,
                            uintptr_t first, int64_t first_stride, uintptr_t cos, uintptr_t sin, bool interleaved,
                            const std::array<int64_t, 4>& shape, int64_t offset, float factor, int direction, int in_type,
                            int out_type) {
    return {at<void>(in), at<void>(out), at<void>(narrow), at<int64_t>(first), {at<float>(cos), at<float>(sin), interleaved},
            shape[0], shape[1], shape[2], shape[3], offset, first_stride, in_strides[0], in_strides[1], in_strides[2],
            out_strides[0], out_strides[1], out_strides[2], factor, direction, static_cast<Type>(in_type),
            static_cast<Type>(out_type), 0};
}

// Scores' members in order.
using ScoresNumbers = std::array<int64_t, 9>;

inline Scores scores(const ScoresNumbers& n) {
    return {at<int64_t>(static_cast<uintptr_t>(n[0])), at<float>(static_cast<uintptr_t>(n[1])), n[2], n[3], n[4], n[5], n[6], n[7],
            n[8]};
}

inline SoftmaxScores softmax_scores(const ScoresNumbers& of, uintptr_t values, uintptr_t p, int type) {
    return {scores(of), at<float>(values), at<void>(p), static_cast<Type>(type), 0};
}

inline SoftmaxScoresBackward softmax_scores_backward(const ScoresNumbers& of, uintptr_t p, uintptr_t dp, int type) {
    return {scores(of), at<void>(p), at<void>(dp), static_cast<Type>(type), 0};
}

inline CrossEntropy cross_entropy(uintptr_t logits, uintptr_t targets, uintptr_t losses, uintptr_t dloss, int64_t rows,
                                  int64_t classes, int64_t ignore_index, float label_smoothing, float z_loss, float soft_cap,
                                  bool wants_gradient, int type) {
    return {at<void>(logits), at<int64_t>(targets), at<float>(losses), at<float>(dloss), rows, classes, ignore_index,
            label_smoothing, z_loss, soft_cap, wants_gradient, static_cast<Type>(type), 0};
}

inline Linear linear(uintptr_t x, uintptr_t weight, uintptr_t scale, uintptr_t bias, uintptr_t y, int64_t rows, int64_t inputs,
                     int64_t outputs, int64_t x_stride, int64_t weight_stride, int type, int weight_type) {
    return {at<void>(x), at<void>(weight), at<float>(scale), at<float>(bias), at<void>(y), rows, inputs, outputs, x_stride,
            weight_stride, static_cast<Type>(type), static_cast<Type>(weight_type), 0};
}

inline PackedLinear packed_linear(uintptr_t x, uintptr_t weight, uintptr_t scale, uintptr_t bias, uintptr_t y, int64_t rows,
                                  int64_t inputs, int64_t outputs, int64_t x_stride, int type, int weight_type) {
    return {at<void>(x), at<void>(weight), at<float>(scale), at<float>(bias), at<void>(y), rows, inputs, outputs, x_stride,
            static_cast<Type>(type), static_cast<Type>(weight_type), 0};
}

inline SampleTokens sample_tokens(uintptr_t logits, uintptr_t temperature, uintptr_t top_p, uintptr_t min_p, uintptr_t draws,
                                  uintptr_t top_k, uintptr_t tokens, int64_t rows, int64_t vocabulary, int64_t stride,
                                  bool is_double) {
    return {at<void>(logits), at<double>(temperature), at<double>(top_p), at<double>(min_p), at<double>(draws), at<int64_t>(top_k),
            at<int64_t>(tokens), rows, vocabulary, stride, is_double, 0};
}

// One address for each tensor. The kernel reads the caller's own list.
using Addresses = const std::vector<uintptr_t>&;

using Sizes = const std::vector<int64_t>&;

inline TotalNorm total_norm(Addresses tensors, Sizes sizes, uintptr_t norm) {
    return {tensors.data(), sizes.data(), at<float>(norm), static_cast<int64_t>(tensors.size()), 0};
}

inline ScaleList scale_list(Addresses tensors, Sizes sizes, float factor) {
    return {tensors.data(), sizes.data(), factor, static_cast<int64_t>(tensors.size()), 0};
}

inline AdamW adamw(Addresses parameters, Addresses gradients, Addresses firsts, Addresses seconds, Addresses steps, Sizes sizes,
                   double lr, double beta1, double beta2, double eps, double weight_decay) {
    return {parameters.data(), gradients.data(), firsts.data(), seconds.data(), steps.data(), sizes.data(), lr, beta1, beta2, eps,
            weight_decay, static_cast<int64_t>(parameters.size()), 0};
}

inline MuonPrepare muon_prepare(Addresses gradients, Addresses momenta, uintptr_t x, int64_t rows, int64_t columns, double momentum,
                                float least, int type) {
    return {gradients.data(), momenta.data(), at<void>(x), static_cast<int64_t>(gradients.size()), rows, columns, momentum, least,
            static_cast<Type>(type), 0};
}

inline MuonRounds muon_rounds(uintptr_t x, const std::vector<double>& quintics, int64_t n, int64_t rows, int64_t columns,
                              float least, int type) {
    int64_t rounds = static_cast<int64_t>(quintics.size() / 3);
    return {at<void>(x), quintics.data(), n, rows, columns, rounds, least, static_cast<Type>(type), 0};
}

inline MuonApply muon_apply(Addresses parameters, uintptr_t x, int64_t rows, int64_t columns, float keep, float scale, int type) {
    return {parameters.data(), at<void>(x), static_cast<int64_t>(parameters.size()), rows, columns, keep, scale,
            static_cast<Type>(type), 0};
}

}  // namespace arguments
