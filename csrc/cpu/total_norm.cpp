// The norm of many tensors together: what gradients are clipped by.
//
// Squares are added up in float in pieces of each tensor, which follow from its size alone, and those sums in double, in their
// order.
#include <math.h>

#include "../kernels.h"
#include "../memory.h"
#include "../threads.h"
#include "simd.h"

namespace PSANN_NAMESPACE {
namespace {

constexpr int64_t PIECE = 1 << 13;  // elements
constexpr int64_t GRAIN = 1 << 14;  // elements below which one thread is faster

}  // namespace

void total_norm(const TotalNorm& a) {
    int64_t pieces = 0, elements = 0;
    for (int64_t t = 0; t < a.count; t++) pieces += (a.sizes[t] + PIECE - 1) / PIECE, elements += a.sizes[t];
    // Of each piece its tensor and its first element in that, int64_t's in two floats' place.
    Workspace partial(pieces), places(4 * pieces);
    int64_t *tensor = reinterpret_cast<int64_t*>(places.data), *first = tensor + pieces, piece = 0;
    for (int64_t t = 0; t < a.count; t++)
        for (int64_t begin = 0; begin < a.sizes[t]; begin += PIECE, piece++) tensor[piece] = t, first[piece] = begin;
    parallel(elements < GRAIN ? 1 : a.threads, pieces, [&](int64_t i) {
        int64_t begin = first[i], rest = a.sizes[tensor[i]] - begin;
        const float* x = reinterpret_cast<const float*>(a.tensors[tensor[i]]) + begin;
        float squares[1];
        sum_row(rest < PIECE ? rest : PIECE, [&](int64_t c, int64_t count, Float (&out)[1]) INLINE_LAMBDA {
            Float v = take(x + c, count);
            out[0] = v * v;
        }, squares);
        partial.data[i] = squares[0];
    });
    double total = 0.0;
    for (int64_t i = 0; i < pieces; i++) total += static_cast<double>(partial.data[i]);
    *a.norm = static_cast<float>(sqrt(total));
}

}  // namespace PSANN_NAMESPACE
