// Turns the pairs of one head by its position's angle; the definition is rope_attention.py's rotate.
#pragma once

#include "../kernels.h"
#include "simd.h"

namespace PSANN_NAMESPACE {

// out (head_dim floats) = in rotated for `position`, or as it is where nothing is rotated; each times `factor`.
template <class T>
INLINE void rotate(const Rotary& rotary, int64_t position, int64_t head_dim, const T* in, float* out, float factor) {
    if (rotary.cos == nullptr) {
        for (int64_t d = 0; d < head_dim; d++) out[d] = scalar(in[d]) * factor;
        return;
    }
    int64_t half = head_dim / 2, step = rotary.interleaved ? 2 : 1, partner = rotary.interleaved ? 1 : half;
    const float *cos = rotary.cos + position * half, *sin = rotary.sin + position * half;
    for (int64_t m = 0; m < half; m++) {
        float x = scalar(in[m * step]), y = scalar(in[m * step + partner]);
        out[m * step] = (x * cos[m] - y * sin[m]) * factor;
        out[m * step + partner] = (y * cos[m] + x * sin[m]) * factor;
    }
}

}  // namespace PSANN_NAMESPACE
