// The damped sine and its gradient of a few vectors at once, for every kernel that ends in one.
//
// Nearly all vectors take a short way. Where 2^x may underflow in some lane a longer exponential gives the other lanes the same
// bits; and lanes that are NaN, infinite, beyond 2^21 half turns or growing are done again, one by one, in double. So a result
// depends on its own input alone.
#pragma once

#include "sine.h"

namespace PSANN_NAMESPACE {

// Rows that go through each step together: two hide the latency of the polynomials, more do not fit the registers.
constexpr int PAIR = 2;

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

template <int R> INLINE bool near(const float* limit, const Float (&magnitude)[R]) {
    bool every = true;
    for (int i = 0; i < R; i++) every &= all_below(magnitude[i], load(limit));
    return every;
}

// y of R vectors z, all of the features c to c + WIDTH of the tile.
template <int MODE, int R, class Tile> INLINE void forward_vectors(const Tile& t, int64_t c, const Float (&z)[R], Float (&y)[R]) {
    Float magnitude[R], g[R], e[R];
    for (int i = 0; i < R; i++) magnitude[i] = abs(z[i]), g[i] = damped_by<MODE>(z[i]);
    bool is_short = __builtin_expect(near(t.near + c, magnitude), 1);
    if (MODE != NONE && is_short) exp2_product(g, load(t.exponent + c), e);
    if (MODE != NONE && !is_short)
        for (int i = 0; i < R; i++) e[i] = exp2_product_any(g[i], load(t.exponent + c));
    Float r[R];
    Int flip[R];
    reduce(z, load(t.high + c), load(t.low + c), r, flip);
    sine(r, flip, y);
    for (int i = 0; i < R; i++) y[i] *= load(t.amplitude + c);
    if constexpr (MODE != NONE)
        for (int i = 0; i < R; i++) y[i] *= e[i];
    if (!is_short)
        for (int i = 0; i < R; i++) y[i] = careful_forward<MODE>(t, c, z[i], y[i]);
}

// dz, and what the vector adds to the sums of dy e sin, dy e z cos and dy e g sin.
struct Gradient {
    Float dz, amplitude, frequency, damping;
};

template <int MODE, class Tile> static __attribute__((noinline)) Gradient careful_backward(const Tile& t, int64_t c, Float z, Float dy, Gradient out) {
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

template <int MODE, int R, class Tile> INLINE void backward_vectors(const Tile& t, int64_t c, const Float (&z)[R], const Float (&dy)[R], Gradient (&out)[R]) {
    Float magnitude[R], g[R], e[R];
    for (int i = 0; i < R; i++) magnitude[i] = abs(z[i]), g[i] = damped_by<MODE>(z[i]);
    bool is_short = __builtin_expect(near(t.near + c, magnitude), 1);
    if (MODE != NONE && is_short) exp2_product(g, load(t.exponent + c), e);
    if (MODE != NONE && !is_short)
        for (int i = 0; i < R; i++) e[i] = exp2_product_any(g[i], load(t.exponent + c));
    Float r[R], s[R], k[R];
    Int flip[R];
    reduce(z, load(t.high + c), load(t.low + c), r, flip);
    sine(r, flip, s);
    cosine(r, flip, k);
    Float amplitude = load(t.amplitude + c), frequency = load(t.frequency + c), damping = load(t.damping + c);
    for (int i = 0; i < R; i++) {
        Float p = MODE == NONE ? dy[i] : dy[i] * e[i], ps = p * s[i], pc = p * k[i], dz = frequency * pc;
        // sgn(z) damping; at z = 0 the sine is 0 too.
        if constexpr (MODE == ABS) dz = fma((Float)((Int)-damping ^ ((Int)z[i] & INT32_MIN)), ps, dz);
        if constexpr (MODE == RELU) dz = fma(z[i] > 0 ? -damping : Float{}, ps, dz);
        out[i] = {amplitude * dz, ps, z[i] * pc, MODE == NONE ? Float{} : g[i] * ps};
        if (!is_short) out[i] = careful_backward<MODE>(t, c, z[i], dy[i], out[i]);
    }
}

}  // namespace PSANN_NAMESPACE
