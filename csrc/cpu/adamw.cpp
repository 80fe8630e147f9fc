// A step of AdamW of many tensors at once; the definition is torch's. Each element is read and written once.
#include <math.h>

#include "../kernels.h"
#include "lists.h"
#include "simd.h"

namespace PSANN_NAMESPACE {
void adamw(const AdamW& a) {
    for (int64_t t = 0; t < a.count; t++) *reinterpret_cast<float*>(a.steps[t]) += 1.0f;
    float keep = static_cast<float>(1.0 - a.lr * a.weight_decay), eps = static_cast<float>(a.eps);
    float first_rest = static_cast<float>(1.0 - a.beta1), second_rest = static_cast<float>(1.0 - a.beta2);
    Pieces(a.sizes, a.count).each(a.threads, [&](int64_t, int64_t tensor, int64_t first, int64_t elements) {
        auto of = [&](const uintptr_t* list) { return reinterpret_cast<float*>(list[tensor]) + first; };
        float *p = of(a.parameters), *m = of(a.firsts), *v = of(a.seconds);
        const float* g = of(a.gradients);
        double steps = static_cast<double>(*reinterpret_cast<const float*>(a.steps[tensor]));
        float move = static_cast<float>(a.lr / (1.0 - pow(a.beta1, steps)));
        float widen = static_cast<float>(1.0 / sqrt(1.0 - pow(a.beta2, steps)));
        each_vector(0, elements, [&](int64_t c, int64_t count) INLINE_LAMBDA {
            Float gradient = take(g + c, count), one = take(m + c, count), two = take(v + c, count);
            one = fma(gradient - one, all(first_rest), one);
            two = fma(gradient * gradient - two, all(second_rest), two);
            give(m + c, one, count);
            give(v + c, two, count);
            Float update = one / fma(root(two), all(widen), all(eps));
            give(p + c, fma(update, all(-move), take(p + c, count) * keep), count);
        });
    });
}

}  // namespace PSANN_NAMESPACE
