// What clipping does to gradients: the norm of many tensors together, and a factor for all of them.
//
// Squares are added up in float in pieces of each tensor, which follow from its size alone, and those sums in double, in their
// order.
#include "../kernels.h"
#include "lists.h"
#include "norm.h"
#include "simd.h"

namespace PSANN_NAMESPACE {

void total_norm(const TotalNorm& a) {
    Pieces pieces(a.sizes, a.count);
    Workspace partial(pieces.count);
    pieces.each(a.threads, [&](int64_t piece, int64_t tensor, int64_t first, int64_t elements) {
        const float* x = reinterpret_cast<const float*>(a.tensors[tensor]) + first;
        float squares[1];
        sum_row(elements, [&](int64_t c, int64_t count, Float (&out)[1]) INLINE_LAMBDA {
            Float v = take(x + c, count);
            out[0] = v * v;
        }, squares);
        partial.data[piece] = squares[0];
    });
    *a.norm = static_cast<float>(norm(partial.data, pieces.count, 0.0f));
}

void scale_list(const ScaleList& a) {
    Pieces(a.sizes, a.count).each(a.threads, [&](int64_t, int64_t tensor, int64_t first, int64_t elements) {
        float* x = reinterpret_cast<float*>(a.tensors[tensor]) + first;
        each_vector(0, elements, [&](int64_t c, int64_t count) INLINE_LAMBDA {
            give(x + c, take(x + c, count) * a.factor, count);
        });
    });
}

}  // namespace PSANN_NAMESPACE
