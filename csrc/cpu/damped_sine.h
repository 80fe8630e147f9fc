// The damped sine and its gradient of a few vectors at once, for every kernel that ends in one.
//
// Nearly all vectors take the short way, which serves lanes that are `near`. The long way gives such lanes the same bits by an
// exponential that may underflow, and does lanes that are NaN, infinite, beyond 2^16 half turns or growing again, one by one, in
// double. So a result depends on its own input alone.
#pragma once

#include "sine.h"

namespace PSANN_NAMESPACE {

template <int MODE> static double envelope(double z, double damping) {
    return MODE == NONE ? 1.0 : exp(-damping * (MODE == ABS ? fabs(z) : z > 0 || z != z ? z : 0.0));
}

template <int MODE, class Tile> static __attribute__((noinline)) Float careful_forward(const Tile& t, int64_t c, Float z, Float y) {
    for (int i = 0; i < WIDTH; i++) {
        if (fabsf(z[i]) < t.far[c + i]) continue;
        double x = z[i];
        y[i] = static_cast<float>(t.amplitude[c + i] * sin(t.frequency[c + i] * x) * envelope<MODE>(x, t.damping[c + i]));
    }
    return y;
}

// True where the short way serves all of R vectors of the features c to c + WIDTH.
template <int R, class Tile> INLINE bool near(const Tile& t, int64_t c, const Float (&z)[R]) {
    // As integers, which puts NaN above every number.
    Int largest = (Int)abs(z[0]);
    for (int i = 1; i < R; i++) {
        Int magnitude = (Int)abs(z[i]);
        largest = magnitude > largest ? magnitude : largest;
    }
    return __builtin_expect(every(largest < (Int)load(t.near + c)), 1);
}

// factor * 2^x, x what the damping does to z.
template <int MODE, bool IS_SHORT, int R, class Tile>
INLINE void envelopes(const Tile& t, int64_t c, const Float (&z)[R], const Float (&factor)[R], Float (&out)[R]) {
    if constexpr (MODE == NONE) {
        EACH(R) out[i] = factor[i];
        return;
    }
    Float g[R], e[R], exponent = load(t.exponent + c);
    EACH(R) g[i] = damped_by<MODE>(z[i]);
    if constexpr (IS_SHORT) exp2_product(g, exponent, e);
    else EACH(R) e[i] = exp2_product_any(g[i], exponent);
    EACH(R) out[i] = e[i] * factor[i];
}

// y of R vectors z, all of the features c to c + WIDTH of the tile.
template <int MODE, bool IS_SHORT, int R, class Tile>
INLINE void forward_vectors(const Tile& t, int64_t c, const Float (&z)[R], Float (&y)[R]) {
    if constexpr (HAS_FMA && IS_SHORT && MODE != NONE) {
        Float g[R];
        EACH(R) g[i] = damped_by<MODE>(z[i]);
        damped(z, g, load(t.high + c), load(t.low + c), load(t.exponent + c), load(t.amplitude + c), y);
        return;
    }
    Float amplitude[R], e[R], r[R];
    Int flip[R];
    EACH(R) amplitude[i] = load(t.amplitude + c);
    envelopes<MODE, IS_SHORT>(t, c, z, amplitude, e);
    reduce(z, load(t.high + c), load(t.low + c), r, flip);
    sine(r, flip, e, y);
    if constexpr (!IS_SHORT) EACH(R) y[i] = careful_forward<MODE>(t, c, z[i], y[i]);
}

// dz, and what the vector adds to the sums of dy e sin, dy e z cos and dy e g sin.
struct Gradient {
    Float dz, amplitude, frequency, damping;
};

template <int MODE, class Tile>
static __attribute__((noinline)) Gradient careful_backward(const Tile& t, int64_t c, Float z, Float dy, Gradient out) {
    for (int i = 0; i < WIDTH; i++) {
        if (fabsf(z[i]) < t.far[c + i]) continue;
        double x = z[i], f = t.frequency[c + i], d = t.damping[c + i];
        double p = dy[i] * envelope<MODE>(x, d), ps = p * sin(f * x), pc = p * cos(f * x);
        double g = MODE == ABS ? fabs(x) : MODE == RELU ? (x > 0 || x != x ? x : 0.0) : 0.0;
        double slope = MODE == ABS ? (x > 0) - (x < 0) : MODE == RELU ? x > 0 : 0;
        out.dz[i] = static_cast<float>(t.amplitude[c + i] * (f * pc - d * slope * ps));
        out.amplitude[i] = static_cast<float>(ps);
        out.frequency[i] = static_cast<float>(x * pc);
        out.damping[i] = static_cast<float>(g * ps);
    }
    return out;
}

template <int MODE, bool IS_SHORT, int R, class Tile>
INLINE void backward_vectors(const Tile& t, int64_t c, const Float (&z)[R], const Float (&dy)[R], Gradient (&out)[R]) {
    Float p[R], r[R], ps[R], pc[R];
    Int flip[R];
    envelopes<MODE, IS_SHORT>(t, c, z, dy, p);
    reduce(z, load(t.high + c), load(t.low + c), r, flip);
    sine(r, flip, p, ps);
    cosine(r, flip, p, pc);
    Float steepness = load(t.steepness + c), decay = load(t.decay + c);
    EACH(R) {
        out[i].dz = steepness * pc[i];
        // sgn(z) damping; at z = 0 the sine is 0 too.
        if constexpr (MODE == ABS) out[i].dz = fma((Float)((Int)decay ^ ((Int)z[i] & INT32_MIN)), ps[i], out[i].dz);
        if constexpr (MODE == RELU) out[i].dz = fma(z[i] > 0 ? decay : Float{}, ps[i], out[i].dz);
        out[i].amplitude = ps[i];
        out[i].frequency = z[i] * pc[i];
        out[i].damping = MODE == NONE ? Float{} : damped_by<MODE>(z[i]) * ps[i];
    }
    if constexpr (!IS_SHORT) EACH(R) out[i] = careful_backward<MODE>(t, c, z[i], dy[i], out[i]);
}

}  // namespace PSANN_NAMESPACE
