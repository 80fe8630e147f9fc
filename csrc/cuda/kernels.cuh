// The launchers. Arguments are csrc/kernels.h's, with pointers to device memory; `threads` is not used. Each launches on `stream`,
// synchronises nothing and allocates nothing, so that a CUDA graph can capture it: scratch memory comes from the caller.
#pragma once

#include <cuda_runtime.h>

#include "../kernels.h"

namespace cuda {

void damped_sine_forward(const DampedSineForward&, cudaStream_t stream);

// partial: damped_sine_partials(rows) * 3 * features floats.
int64_t damped_sine_partials(int64_t rows);
void damped_sine_backward(const DampedSineBackward&, float* partial, cudaStream_t stream);

void rms_norm_forward(const RmsNormForward&, cudaStream_t stream);
// partial: rms_norm_partials(rows) * features floats.
int64_t rms_norm_partials(int64_t rows);
void rms_norm_backward(const RmsNormBackward&, float* partial, cudaStream_t stream);

// cu_seqlens and state as on a CPU; a document is found by bisection.
void wave_conv_forward(const WaveConvForward&, cudaStream_t stream);
// dz: tokens * features floats; partial: wave_conv_partials(tokens) * (taps + 4) * features floats.
int64_t wave_conv_partials(int64_t tokens);
void wave_conv_backward(const WaveConvBackward&, float* dz, float* partial, cudaStream_t stream);

void paged_append(const PagedAppend&, cudaStream_t stream);

// New tokens of a sequence, on average over a call, that are not better left to another backend.
constexpr int PAGED_ATTENTION_MAX_TOKENS = 16;
// Splits follow from max_length, the longest that seq_lens may hold, so no length is read on the host. partial:
// paged_attention_partials(...) floats, for which `a` needs rows, heads and head_dim.
int64_t paged_attention_partials(const PagedAttention& a, int64_t max_length);
void paged_attention(const PagedAttention&, int64_t max_length, float* partial, cudaStream_t stream);

}  // namespace cuda
