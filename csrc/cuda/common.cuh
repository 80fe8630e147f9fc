// Storage types, warp reductions and the damped sine for the CUDA kernels.
//
// The phase is reduced in half turns as in csrc/cpu/sine.h: frequency / pi as high (20 bits) and low, so that frequency * z is
// never rounded. All kernels are deterministic: no atomics, sums in an order that follows from the shapes alone.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "../kernels.h"

namespace cuda {

enum Mode { ABS = 0, RELU = 1, NONE = 2 };

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
template <class T> __device__ inline T narrow(float x);
template <> __device__ inline float narrow<float>(float x) { return x; }
template <> __device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }

// N elements that are loaded and stored at once, 16 bytes where N * sizeof(T) is.
template <class T, int N> struct alignas(N * sizeof(T)) Pack {
    T x[N];
};

__device__ inline float warp_sum(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// What depends on the feature alone.
struct Feature {
    float amplitude, frequency, damping, high, low;
};

__device__ inline Feature feature_of(float amplitude, float frequency, float damping) {
    double half_turns = static_cast<double>(frequency) * 0.31830988618379067;
    double top = __longlong_as_double(__double_as_longlong(half_turns) & -(1ll << 33));
    float high = static_cast<float>(top), low = static_cast<float>(half_turns - top);
    // `low` takes the sign of `high`, so that a zero keeps its sign.
    return {amplitude, frequency, damping, high, copysignf(low, high)};
}

__device__ inline bool is_odd(float whole) { return whole - 2.0f * rintf(0.5f * whole) != 0.0f; }

// frequency * z in half turns less the nearest whole number; `flip` is the sign bit where that is odd.
__device__ inline float reduce(float z, const Feature& f, uint32_t& flip) {
    float n = rintf(z * f.high) + 0.0f;  // 0 where it was -0: subtracted, that would take z = -0 its sign
    float r = fmaf(z, f.low, fmaf(z, f.high, -n));
    bool odd = is_odd(n);
    // n is as coarse as high, so for large phases the rest is whole half turns too.
    // A small rest stays as it is, with its zero's sign.
    if (fabsf(r) > 0.5f) {
        float m = rintf(r);
        r -= m;
        odd ^= is_odd(m);
    }
    flip = odd ? 0x80000000u : 0u;
    return r;
}

__device__ inline float with_flip(float x, uint32_t flip) { return __uint_as_float(__float_as_uint(x) ^ flip); }

__device__ inline float sine(float r, uint32_t flip) {
    float u = r * r, s = fmaf(u, 0.07756035774946213f, -0.5982421040534973f);
    s = fmaf(u, s, 2.550069808959961f);
    s = fmaf(u, s, -5.167709827423096f);
    s = fmaf(u, s, 3.1415927410125732f);
    return with_flip(r * s, flip);
}

__device__ inline float cosine(float r, uint32_t flip) {
    float u = r * r, c = fmaf(u, -0.02442069910466671f, 0.23495392501354218f);
    c = fmaf(u, c, -1.3352160453796387f);
    c = fmaf(u, c, 4.058709621429443f);
    c = fmaf(u, c, -4.934802055358887f);
    return with_flip(fmaf(u, c, 1.0f), flip);
}

template <int MODE> __device__ inline float damped_by(float z) {
    if (MODE == ABS) return fabsf(z);
    if (MODE == RELU) return z > 0 || z != z ? z : 0.0f;
    return 0.0f;
}

template <int MODE> __device__ inline float envelope(float z, const Feature& f) {
    return MODE == NONE ? 1.0f : expf(-f.damping * damped_by<MODE>(z));
}

template <int MODE> __device__ inline float damped_sine(float z, const Feature& f) {
    uint32_t flip;
    float r = reduce(z, f, flip);
    return f.amplitude * envelope<MODE>(z, f) * sine(r, flip);
}

// dz, and what the element adds to the sums of dy e sin, dy e z cos and dy e g sin.
struct Gradient {
    float dz, amplitude, frequency, damping;
};

template <int MODE> __device__ inline Gradient damped_sine_gradient(float z, float dy, const Feature& f) {
    uint32_t flip;
    float r = reduce(z, f, flip), p = dy * envelope<MODE>(z, f), ps = p * sine(r, flip), pc = p * cosine(r, flip);
    float slope = (MODE == ABS && z > 0) || (MODE == RELU && z > 0) ? f.damping : MODE == ABS && z < 0 ? -f.damping : 0.0f;
    return {f.amplitude * (f.frequency * pc - slope * ps), ps, z * pc, damped_by<MODE>(z) * ps};
}

// Of numbers from 0 to 2^32 - 1, which the callers know: a division of 64 bits is a call, with registers spilled around it.
__device__ inline int64_t divide(int64_t a, int64_t b) { return static_cast<uint32_t>(a) / static_cast<uint32_t>(b); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace cuda

// Calls run<T>(...) for the storage type.
#define PSANN_FOR_TYPE(type, run, ...)                                          \
    switch (type) {                                                             \
        case Type::FLOAT32: run<float>(__VA_ARGS__); break;                     \
        case Type::BFLOAT16: run<__nv_bfloat16>(__VA_ARGS__); break;            \
        default: run<__half>(__VA_ARGS__); break;                               \
    }
