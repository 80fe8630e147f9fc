// The end of a Frobenius norm whose squares were added up in pieces.
#pragma once

#include <math.h>
#include <stdint.h>

namespace PSANN_NAMESPACE {
namespace {

// The root of the sum of partial sums, added up in their order, or `least` where it is below that; NaN stays NaN.
static inline __attribute__((always_inline)) double norm(const float* partial, int64_t count, float least) {
    double total = 0.0;
    for (int64_t i = 0; i < count; i++) total += static_cast<double>(partial[i]);
    double root = sqrt(total);
    return root < static_cast<double>(least) ? static_cast<double>(least) : root;
}

}  // namespace
}  // namespace PSANN_NAMESPACE
