// sin, cos and exp for whole vectors, and what each feature of a damped sine contributes to them.
//
// The phase is reduced in half turns: frequency / pi is kept as two floats, high with 20 bits and low with the next 24, so that
// z * high - n is exact in one fused multiply-add and frequency * z is never rounded. `low` has the sign of `high`, which keeps
// the sign of a zero. sin(pi r) and cos(pi r) are polynomials on |r| <= 1/2; the parity of n is the sign.
#pragma once

#include <math.h>

#include "simd.h"

namespace PSANN_NAMESPACE {

enum Mode { ABS = 0, RELU = 1, NONE = 2 };

constexpr float LOG2_E = 1.44269504f;
// Adding and subtracting it rounds |x| < 2^22 to whole numbers, whose low bits then stand in the sum's low bits.
constexpr float ROUNDER = 0x1.8p23f;
// Up to it z * low, which r takes on top of its half, stays below 1/16; beyond, r would leave what the polynomials serve.
constexpr float TURNS_LIMIT = 0x1p16f;
// Within it 2^x is a normal number; and where a negative damping makes it grow, so is its product with an amplitude below
// 2^GROWTH_LIMIT.
constexpr float EXPONENT_LIMIT = 125.0f, GROWTH_LIMIT = 60.0f;

// Coefficients, the highest first.
template <int N> struct Polynomial { Lanes coefficient[N]; };
template <int N> constexpr Polynomial<N> polynomial(const float (&coefficients)[N]) {
    Polynomial<N> p = {};
    for (int k = 0; k < N; k++) p.coefficient[k] = in_every_lane(coefficients[k]);
    return p;
}

// Several vectors go through each step together, so that one's latency hides behind the others'. out = out * x + coefficient.
template <int R> INLINE void step(const Lanes& coefficient, const Float (&x)[R], Float (&out)[R]) {
    EACH(R) out[i] = fma(out[i], x[i], coefficient);
}
template <int R, int N> INLINE void horner(const Polynomial<N>& p, const Float (&x)[R], Float (&out)[R]) {
    EACH(R) out[i] = load(p.coefficient[0].lane);
    UNROLL for (int k = 1; k < N; k++) step(p.coefficient[k], x, out);
}

// All found by iterated weighted least squares in double: least maximal relative (sine 5e-9, exponential 9e-8) and absolute
// error (cosine 3e-10) before the coefficients were rounded to float. A sixth power in the exponential would give 2e-9 and take a
// tenth longer; what a float's roundings cost hides the difference.
constexpr auto SINE = polynomial({0.07756035774946213f, -0.5982421040534973f, 2.550069808959961f, -5.167709827423096f,
    3.1415927410125732f});
constexpr auto COSINE = polynomial({-0.02442069910466671f, 0.23495392501354218f, -1.3352160453796387f, 4.058709621429443f,
    -4.934802055358887f, 1.0f});
constexpr auto EXP2 = polynomial({0.0013264726899145443f, 0.009671512660597806f, 0.055507337442440435f, 0.24022242084918516f,
    0.6931469775984714f, 1.0f});

// frequency * z in half turns less the nearest whole number n: r in [-1/2, 1/2]; flip is the sign bit, set where n is odd.
template <int R> INLINE void reduce(const Float (&z)[R], Float high, Float low, Float (&r)[R], Int (&flip)[R]) {
    EACH(R) {
        if constexpr (HAS_FMA) {
            Float n = fma(z[i], high, all(ROUNDER));
            flip[i] = (Int)n << 31;
            n -= ROUNDER;
            r[i] = fma(z[i], low, fma(z[i], high, -n));
        } else {
            Double wide = __builtin_convertvector(z[i], Double);
            Double turns = wide * __builtin_convertvector(high, Double) + wide * __builtin_convertvector(low, Double);
            Double n = turns + 0x1.8p52;
            n -= 0x1.8p52;
            r[i] = __builtin_convertvector(turns - n, Float);
            flip[i] = __builtin_convertvector(__builtin_convertvector(n, Float), Int) << 31;
        }
    }
}

// factor * sin(frequency * z) from what `reduce` gave. The factor, which may be denormal, comes last: p is as large as pi.
template <int R> INLINE void sine(const Float (&r)[R], const Int (&flip)[R], const Float (&factor)[R], Float (&out)[R]) {
    Float u[R], p[R];
    EACH(R) u[i] = r[i] * r[i];
    horner(SINE, u, p);
    EACH(R) out[i] = (Float)((Int)(r[i] * p[i]) ^ flip[i]) * factor[i];
}

// factor * cos(frequency * z).
template <int R> INLINE void cosine(const Float (&r)[R], const Int (&flip)[R], const Float (&factor)[R], Float (&out)[R]) {
    Float u[R], p[R];
    EACH(R) u[i] = r[i] * r[i];
    horner(COSINE, u, p);
    EACH(R) out[i] = (Float)((Int)factor[i] ^ flip[i]) * p[i];
}

// 2^(g * exponent) where that is a normal number: |g * exponent| < EXPONENT_LIMIT.
template <int R> INLINE void exp2_product(const Float (&g)[R], Float exponent, Float (&out)[R]) {
    Float f[R];
    Int shift[R];
    EACH(R) {
        Float n = fma(g[i], exponent, all(ROUNDER));
        shift[i] = (Int)n << 23;
        n -= ROUNDER;
        f[i] = fma(g[i], exponent, -n);
    }
    horner(EXP2, f, out);
    EACH(R) out[i] = (Float)((Int)out[i] + shift[i]);
}

// The same, to the bit, and for any other product: underflows through the denormals to 0, overflows to infinity. It is scaled by
// two factors, each a normal number.
INLINE Float exp2_product_any(Float g, Float exponent) {
    Float n = fma(g, exponent, all(ROUNDER)) - ROUNDER;
    n = min(max(n, all(-252.0f)), all(252.0f));
    Int whole = __builtin_convertvector(n, Int), half = whole >> 1;
    Float scale = (Float)((half + 127) << 23), rest = (Float)((whole - half + 127) << 23);
    Float f[1] = {min(max(fma(g, exponent, -n), all(-0.5f)), all(0.5f))}, p[1];
    horner(EXP2, f, p);
    return p[0] * scale * rest;
}

// 2^x of x that are at most 0, or a little more, or NaN: it is 0 below the least normal number.
template <int R> INLINE void exp2_at_most_one(const Float (&x)[R], Float (&out)[R]) {
    Float n[R], f[R];
    EACH(R) n[i] = x[i] + ROUNDER, f[i] = x[i] - (n[i] - ROUNDER);
    horner(EXP2, f, out);
    // A product, since a NaN must stay one. What x below -126 makes of f and of the scale is never seen.
    EACH(R) out[i] = (Float)((Int)(out[i] * (Float)(((Uint)n[i] << 23) + 0x3f800000u)) & ~(x[i] < -126.0f));
}

// factor * 2^(g * exponent) * sin(frequency * z), to the bit what exp2_product, reduce and sine give, for what exp2_product serves.
// Both polynomials go side by side; the exponential takes the sine's sign, so that fewer numbers wait for them in registers.
template <int R>
INLINE void damped(const Float (&z)[R], const Float (&g)[R], Float high, Float low, Float exponent, Float factor, Float (&out)[R]) {
    Float n[R], m[R], r[R], f[R], u[R], p[R], e[R];
    Uint scale[R];
    EACH(R) n[i] = fma(z[i], high, all(ROUNDER)), m[i] = fma(g[i], exponent, all(ROUNDER));
    EACH(R) r[i] = fma(z[i], high, -(n[i] - ROUNDER)), f[i] = fma(g[i], exponent, -(m[i] - ROUNDER));
    EACH(R) scale[i] = ((Uint)m[i] << 23) ^ ((Uint)n[i] << 31);
    EACH(R) r[i] = fma(z[i], low, r[i]), u[i] = r[i] * r[i];
    EACH(R) e[i] = load(EXP2.coefficient[0].lane), p[i] = load(SINE.coefficient[0].lane);
    UNROLL for (int k = 1; k < 5; k++) {
        step(EXP2.coefficient[k], f, e);
        step(SINE.coefficient[k], u, p);
    }
    step(EXP2.coefficient[5], f, e);
    EACH(R) e[i] = (Float)((Uint)e[i] + scale[i]) * factor;
    EACH(R) out[i] = r[i] * p[i] * e[i];
}

template <int MODE> INLINE Float damped_by(Float z) {
    if constexpr (MODE == ABS) return abs(z);
    if constexpr (MODE == RELU) return z > 0 ? z : Float{};
    return Float{};
}

// What depends on the feature alone, for a tile of features; lanes past the last feature are 0 and compute 0.
template <int TILE> struct Features {
    // Apart by 5 cache lines more than a power of two: else all of them, and the rows of z and y, would meet in one set of the
    // first-level cache.
    static constexpr int ROOM = TILE + 80;
    alignas(64) float amplitude[ROOM], frequency[ROOM], damping[ROOM];
    alignas(64) float high[ROOM], low[ROOM];    // frequency / pi
    alignas(64) float exponent[ROOM];           // -damping * log2(e)
    alignas(64) float steepness[ROOM];          // amplitude * frequency
    alignas(64) float decay[ROOM];              // -amplitude * damping
    alignas(64) float near[ROOM];               // |z| below it: no care is needed, and what comes out is no NaN
    alignas(64) float far[ROOM];                // |z| below it: 2^x may underflow, but nothing overflows

    void fill(const float* a, const float* f, const float* d, int64_t count) {
        for (int64_t i = 0; i < count; i += WIDTH) {
            int64_t lanes = count - i;
            bool whole = lanes >= WIDTH;
            Float wide_a = whole ? load(a + i) : load(a + i, lanes);
            Float wide_f = whole ? load(f + i) : load(f + i, lanes), wide_d = whole ? load(d + i) : load(d + i, lanes);
            Double half_turns = __builtin_convertvector(wide_f, Double) * 0.31830988618379067;
            // 20 bits of fraction are kept; what a double has below its first 20 is 33 bits.
            Double top = (Double)((Long)half_turns & -(INT64_C(1) << 33));
            Float rest = __builtin_convertvector(half_turns - top, Float);
            Float h = __builtin_convertvector(top, Float);
            Int sign = (Int)h & INT32_MIN;
            Float e = wide_d * -LOG2_E;
            Float steep = wide_a * wide_f, slope = -wide_a * wide_d;
            Float turns = TURNS_LIMIT / abs(h), exponents = (e <= 0 ? all(EXPONENT_LIMIT) : all(GROWTH_LIMIT)) / abs(e);
            // Parameters whose products overflow, or are NaN, are left to double.
            Int is_tame = (abs(steep) < INFINITY) & (abs(slope) < INFINITY) &
                (abs(wide_a) < (e <= 0 ? all(INFINITY) : all(0x1p60f)));
            store(amplitude + i, wide_a);
            store(frequency + i, wide_f);
            store(damping + i, wide_d);
            store(high + i, h);
            store(low + i, (Float)(((Int)rest & INT32_MAX) | sign));
            store(exponent + i, e);
            Float nearest = is_tame ? (turns < exponents ? turns : exponents) : Float{};
            store(steepness + i, steep);
            store(decay + i, slope);
            store(near + i, nearest);
            store(far + i, is_tame && e <= 0 ? turns : nearest);
        }
    }
};

}  // namespace PSANN_NAMESPACE
