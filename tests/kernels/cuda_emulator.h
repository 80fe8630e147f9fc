// Runs csrc/cuda on a CPU: what those files use of CUDA, for g++. test_cuda_emulated.py compiles them against it, after
// cuda_emulated.py has rewritten the three things that are no C++: launches, shared memory and launch bounds.
//
// A thread of a block is a fiber that runs until a barrier, a warp operation or its end; blocks run one after the other. The order
// of blocks, warps and lanes is chosen from outside (emulator_order), so that what depends on it shows as results that differ. What
// hardware leaves undefined is an error here, with block and thread: see cuda_emulator.cpp.
//
// The same as on a GPU, to the bit: conversions between float, half and bfloat16 (round to nearest even; NaN becomes the canonical
// one), rintf, fabsf, copysignf, fmaf, + - * / (of IEEE, on both). NOT the same: expf and rsqrtf, which the C library and 1 / sqrtf
// give within half an ulp to one, where CUDA's are within 2 (PTX ex2.approx and a multiplication; rsqrt.approx); and nvcc contracts
// x * y + z where this build does not, unless it is built with -ffp-contract=fast.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <tuple>

#define __global__
#define __device__

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t {
    cudaSuccess,
    cudaErrorInvalidValue,
    cudaErrorInvalidConfiguration,
    cudaErrorLaunchFailure,
    cudaErrorNoKernelImageForDevice,
    cudaErrorUnsupportedPtxVersion
};
using cudaStream_t = struct CUstream_st*;

cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t);

namespace emulator {

extern int fault;  // 0, or the one of a build's deliberate faults that is to act

// Ends the launch with a message that names the kernel, the block and the thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Memory of the running block, poisoned with NaN before the block; it ends where readable memory ends.
void* static_shared(int id, size_t bytes, size_t alignment);
void* dynamic_shared(size_t alignment);
void check_bounds(unsigned most_threads);
void barrier(int line);
// Waits until every lane of `mask` has come to the same operation; returns the values that they brought, by lane.
const uint64_t* exchange(unsigned mask, uint64_t value, const char* operation, int line);
unsigned lane();

struct Launch {
    const char* kernel;
    dim3 grid, block;
    size_t shared;

    Launch(const char* kernel, dim3 grid, dim3 block, size_t shared = 0, cudaStream_t = nullptr)
        : kernel(kernel), grid(grid), block(block), shared(shared) {}

    template <class... Parameters, class... Arguments>
    void operator()(void (*function)(Parameters...), Arguments&&... arguments) const {
        static_assert((sizeof(Parameters) + ... + 0) <= 4096, "a kernel takes at most 4096 bytes of arguments");
        struct Call {
            void (*function)(Parameters...);
            std::tuple<Parameters...> arguments;
        } call{function, {static_cast<Parameters>(arguments)...}};
        run([](void* c) { std::apply(static_cast<Call*>(c)->function, static_cast<Call*>(c)->arguments); }, &call);
    }

   private:
    void run(void (*thread)(void*), void* call) const;
};

template <class To, class From> To bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}

template <class T> T shuffle(unsigned mask, T value, unsigned from, const char* operation, int line) {
    uint64_t brought = 0;
    static_assert(sizeof(T) <= 8);
    memcpy(&brought, &value, sizeof value);
    const uint64_t* values = exchange(mask, brought, operation, line);
    if (!(mask >> from & 1)) fail("line %d: %s reads lane %u, which is not in the mask %08x", line, operation, from, mask);
    T result;
    memcpy(&result, &values[from], sizeof result);
    return result;
}

}  // namespace emulator

// Lines tell one barrier from another: threads that wait at different ones have diverged.
inline void __syncthreads(int line = __builtin_LINE()) { emulator::barrier(line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
    emulator::exchange(mask, 0, "__syncwarp", line);
}

// Within groups of `width` lanes; a lane whose partner is outside its group gets its own value, as the PTX manual says of shfl.
template <class T> T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32, int line = __builtin_LINE()) {
    unsigned lane = emulator::lane(), from = lane ^ static_cast<unsigned>(distance);
    unsigned last = lane | (static_cast<unsigned>(width) - 1);
    return emulator::shuffle(mask, value, from <= last ? from : lane, "__shfl_xor_sync", line);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, int line = __builtin_LINE()) {
    unsigned lane = emulator::lane(), from = lane + distance, last = lane | (static_cast<unsigned>(width) - 1);
    return emulator::shuffle(mask, value, from <= last ? from : lane, "__shfl_down_sync", line);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, int line = __builtin_LINE()) {
    unsigned lane = emulator::lane(), first = lane & ~(static_cast<unsigned>(width) - 1);
    return emulator::shuffle(mask, value, lane >= first + distance ? lane - distance : lane, "__shfl_up_sync", line);
}
template <class T> T __shfl_sync(unsigned mask, T value, int from, int width = 32, int line = __builtin_LINE()) {
    unsigned inside = static_cast<unsigned>(width) - 1;
    return emulator::shuffle(mask, value, (emulator::lane() & ~inside) | (static_cast<unsigned>(from) & inside), "__shfl_sync",
        line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    const uint64_t* values = emulator::exchange(mask, predicate != 0, "__ballot_sync", line);
    unsigned found = 0;
    for (unsigned lane = 0; lane < 32; lane++)
        if (mask >> lane & 1 && values[lane]) found |= 1u << lane;
    return found;
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return __ballot_sync(mask, predicate, line) == mask;
}

template <class T> constexpr T min(T a, T b) { return b < a ? b : a; }
template <class T> constexpr T max(T a, T b) { return a < b ? b : a; }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline unsigned __float_as_uint(float x) { return emulator::bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulator::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulator::bits<double>(x); }

struct __nv_bfloat16 {
    uint16_t raw;
};
struct __half {
    uint16_t raw;
};

inline float __bfloat162float(__nv_bfloat16 x) { return emulator::bits<float>(static_cast<uint32_t>(x.raw) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    uint32_t u = emulator::bits<uint32_t>(x);
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1)) >> 16)};
}

inline float __half2float(__half x) {
    uint32_t sign = static_cast<uint32_t>(x.raw & 0x8000) << 16, exponent = x.raw >> 10 & 31, fraction = x.raw & 1023;
    if (exponent == 31) return emulator::bits<float>(sign | 0x7f800000u | fraction << 13);
    float size = exponent == 0 ? ldexpf(static_cast<float>(fraction), -24) :
        ldexpf(static_cast<float>(fraction + 1024), static_cast<int>(exponent) - 25);
    return emulator::bits<float>(sign | emulator::bits<uint32_t>(size));
}

inline __half __float2half_rn(float x) {
    uint32_t sign = emulator::bits<uint32_t>(x) >> 16 & 0x8000;
    if (x != x) return {0x7fff};
    float size = fabsf(x);
    if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
    // In units of the last place of a half of this size, rounded to nearest even by rintf; a carry runs on into the exponent.
    int exponent = size < 0x1p-14f ? -14 : ilogbf(size);
    uint32_t units = static_cast<uint32_t>(rintf(ldexpf(size, 10 - exponent)));
    return {static_cast<uint16_t>(sign | (units + (static_cast<uint32_t>(exponent + 14) << 10)))};
}
