// Logits into losses, and in place into the losses' gradient; the definition is linear_cross_entropy_chunks.py's turn.
#include <math.h>

#include "../kernels.h"
#include "../memory.h"
#include "../threads.h"
#include "sine.h"

namespace PSANN_NAMESPACE {
namespace {

constexpr int64_t GRAIN = 1 << 14;  // elements below which one thread is faster
constexpr int64_t PIECE = 1 << 13;  // elements of a piece of work, about

template <class T> static void turn(const CrossEntropy& a) {
    int64_t piece_rows = PIECE / a.classes + 1;
    float smoothed = a.label_smoothing / static_cast<float>(a.classes);
    parallel(a.rows * a.classes < GRAIN ? 1 : a.threads, (a.rows + piece_rows - 1) / piece_rows, [&](int64_t piece) {
        Workspace own(2 * a.classes);
        float *x = own.data, *e = own.data + a.classes;
        int64_t end = (piece + 1) * piece_rows < a.rows ? (piece + 1) * piece_rows : a.rows;
        for (int64_t row = piece * piece_rows; row < end; row++) {
            T* logits = static_cast<T*>(a.logits) + row * a.classes;
            int64_t target = a.targets[row];
            if (target == a.ignore_index) {
                a.losses[row] = 0.0f;
                if (a.wants_gradient)
                    each_vector(0, a.classes, [&](int64_t c, int64_t count) INLINE_LAMBDA { give(logits + c, Float{}, count); });
                continue;
            }
            each_vector(0, a.classes, [&](int64_t c, int64_t count) INLINE_LAMBDA { give(x + c, take(logits + c, count), count); });
            if (a.soft_cap > 0.0f)
                for (int64_t c = 0; c < a.classes; c++) x[c] = a.soft_cap * tanhf(x[c] / a.soft_cap);
            Float highest = all(x[0]);
            each_vector(0, a.classes, [&](int64_t c, int64_t count) INLINE_LAMBDA {
                highest = max(first_of(take(x + c, count), highest, count), highest);
            });
            float largest = maximum_of_every<1>(highest)[0], together[2] = {};
            sum_row(a.classes, [&](int64_t c, int64_t count, Float (&out)[2]) INLINE_LAMBDA {
                // Of numbers below the largest, so that a large one common to all takes no digits from the rest.
                Float distance = take(x + c, count) - largest;
                out[1] = first_of(distance, Float{}, count);
                // NaN, and what infinity less infinity is, stay NaN, and so does their sum.
                Float below[1] = {first_of(distance, all(-INFINITY), count) * LOG2_E}, part[1];
                exp2_at_most_one(below, part);
                out[0] = part[0];
                give(e + c, out[0], count);
            }, together);
            float total = together[0];
            float log_sum = logf(total), lse = largest + log_sum;
            float below_target = x[target] - largest, below_mean = together[1] / static_cast<float>(a.classes);
            float loss = log_sum - (1.0f - a.label_smoothing) * below_target;
            if (a.label_smoothing > 0.0f) loss -= a.label_smoothing * below_mean;
            a.losses[row] = loss + a.z_loss * lse * lse;
            if (!a.wants_gradient) continue;
            float share = (1.0f + 2.0f * a.z_loss * lse) / total, weight = a.dloss == nullptr ? 1.0f : a.dloss[row];
            float probability = e[target] * share;
            e[target] = 0.0f;
            auto capped = [&](Float d, int64_t c, int64_t count) INLINE_LAMBDA {
                if (a.soft_cap > 0.0f) {
                    Float part = take(x + c, count) * (1.0f / a.soft_cap);
                    d = d - d * part * part;
                }
                return d * weight;
            };
            each_vector(0, a.classes, [&](int64_t c, int64_t count) INLINE_LAMBDA {
                give(logits + c, capped(take(e + c, count) * share - smoothed, c, count), count);
            });
            Float own_part = capped(all(probability - smoothed - (1.0f - a.label_smoothing)), target, 1);
            put(logits + target, own_part[0]);
        }
    });
}

}  // namespace

void cross_entropy(const CrossEntropy& a) {
    with_type(a.type, [&](auto t) { turn<decltype(t)>(a); });
}

}  // namespace PSANN_NAMESPACE
