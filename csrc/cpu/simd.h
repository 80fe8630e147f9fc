// Vectors of WIDTH floats in GCC's and Clang's vector extensions, so that one source serves every instruction set.
//
// A file that includes this is compiled once per instruction set, with that set's flags and its own PSANN_NAMESPACE. All helpers
// are static: an inline function with external linkage, compiled for AVX-512 in one object and for plain x86-64 in another,
// would be merged by the linker, and a machine without AVX-512 could run the wrong one. For the same reason these files use no
// templates of the standard library.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Loops that are always unrolled, so that arrays indexed by their variable stay in registers.
#define UNROLL _Pragma("GCC unroll 8")
#define EACH(count) UNROLL for (int i = 0; i < count; i++)
#define INLINE_LAMBDA __attribute__((always_inline))

#define INLINE static inline __attribute__((always_inline))

// A test may ask for 16 lanes without AVX-512: the compiler then makes each vector of two, and the code is otherwise the same.
#if defined(PSANN_LANES)
#elif defined(__AVX512F__)
#define PSANN_LANES 16
#elif defined(__AVX2__)
#define PSANN_LANES 8
#else
#define PSANN_LANES 4
#endif
#if defined(__AVX512F__) && PSANN_LANES == 16
#define PSANN_AVX512 1
#endif
#if defined(__AVX2__) && PSANN_LANES == 8
#define PSANN_AVX2 1
#endif
// A test may ask for it without the instruction: the same numbers, apart from denormals and roundings.
#if defined(__AVX512BF16__) && defined(PSANN_AVX512) && !defined(PSANN_PAIRS)
#define PSANN_PAIRS 1
#endif

namespace PSANN_NAMESPACE {

constexpr int WIDTH = PSANN_LANES;

// 32 vectors rather than 16.
#if defined(PSANN_AVX512)
constexpr bool HAS_MANY_REGISTERS = true;
#else
constexpr bool HAS_MANY_REGISTERS = false;
#endif

#if defined(__FMA__) || defined(__aarch64__)
constexpr bool HAS_FMA = true;
#else
constexpr bool HAS_FMA = false;
#endif

typedef float Float __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Int __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t Uint __attribute__((vector_size(WIDTH * 4)));
typedef double Double __attribute__((vector_size(WIDTH * 8)));
typedef int64_t Long __attribute__((vector_size(WIDTH * 8)));
typedef uint16_t Short __attribute__((vector_size(WIDTH * 2)));
typedef int8_t Byte __attribute__((vector_size(WIDTH)));

// The same vectors wherever they lie in memory.
typedef float FloatAnywhere __attribute__((vector_size(WIDTH * 4), aligned(1), may_alias));
typedef uint16_t ShortAnywhere __attribute__((vector_size(WIDTH * 2), aligned(1), may_alias));
typedef uint32_t UintAnywhere __attribute__((vector_size(WIDTH * 4), aligned(1), may_alias));
typedef int8_t ByteAnywhere __attribute__((vector_size(WIDTH), aligned(1), may_alias));

// Storage types; a plain uint16_t could be either half.
struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

// x - 0 is x; 0 + x would turn -0 into 0, so the compiler would have to add.
INLINE Float all(float x) { return x - Float{}; }

INLINE Float load(const float* p) { return *reinterpret_cast<const FloatAnywhere*>(p); }
INLINE void store(float* p, Float x) { *reinterpret_cast<FloatAnywhere*>(p) = x; }

// x, in a register: gcc would load an operand of several instructions once in each.
INLINE Float held(Float x) {
#if defined(PSANN_AVX2)
    asm("" : "+x"(x));
#endif
    return x;
}

// a * b + c, rounded once where HAS_FMA, else twice.
INLINE Float fma(Float a, Float b, Float c) {
#if defined(__aarch64__)
    static_assert(WIDTH == 4, "NEON has four lanes");
    return (Float)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#elif defined(PSANN_AVX512)
    return (Float)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(PSANN_AVX2)
    return (Float)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FMA__)
    union Halves { Float whole; __m256 half[2]; } x{a}, y{b}, z{c};
    z.half[0] = _mm256_fmadd_ps(x.half[0], y.half[0], z.half[0]);
    z.half[1] = _mm256_fmadd_ps(x.half[1], y.half[1], z.half[1]);
    return z.whole;
#else
    return a * b + c;
#endif
}

// A number in every lane, in memory.
struct alignas(WIDTH * 4) Lanes { float lane[WIDTH]; };
constexpr Lanes in_every_lane(float x) {
    Lanes lanes = {};
    for (int i = 0; i < WIDTH; i++) lanes.lane[i] = x;
    return lanes;
}

// a * b + c, c read by the very instruction that adds it: AVX2 has too few registers for a polynomial's coefficients, and gcc would
// spend an instruction on loading each.
INLINE Float fma(Float a, Float b, const Lanes& c) {
#if defined(PSANN_AVX2)
    asm("vfmadd213ps %2, %1, %0" : "+x"(a) : "x"(b), "m"(c));
    return a;
#else
    return fma(a, b, all(c.lane[0]));
#endif
}

INLINE Float abs(Float x) { return (Float)((Int)x & 0x7fffffff); }
INLINE Float min(Float a, Float b) { return a < b ? a : b; }
INLINE Float max(Float a, Float b) { return a > b ? a : b; }

INLINE Float root(Float x) {
#if defined(PSANN_AVX512)
    return (Float)_mm512_sqrt_ps((__m512)x);
#elif defined(PSANN_AVX2)
    return (Float)_mm256_sqrt_ps((__m256)x);
#else
    for (int i = 0; i < WIDTH; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

// True if every lane of a comparison holds.
INLINE bool every(Int holds) {
#if defined(PSANN_AVX512)
    return _mm512_movepi32_mask((__m512i)holds) == 0xffff;
#elif defined(PSANN_AVX2)
    return _mm256_movemask_ps((__m256)holds) == 0xff;
#else
    int all_bits = -1;
    for (int i = 0; i < WIDTH; i++) all_bits &= holds[i];
    return all_bits != 0;
#endif
}

// The sum of the lanes, in a fixed tree.
INLINE float sum(Float x) {
#if defined(PSANN_AVX2)
    __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#elif defined(PSANN_AVX512)
    return _mm512_reduce_add_ps((__m512)x);
#endif
    for (int step = WIDTH / 2; step > 0; step /= 2)
        for (int i = 0; i < step; i++) x[i] += x[i + step];
    return x[0];
}

// The sums of several vectors, each added up as `sum` does. Every step makes one vector of two, which hold half as much of each.
#if defined(PSANN_AVX512)
// gcc's own sum takes eight instructions for each vector, these three for each that they make of two.
INLINE __m512 halves(Float a, Float b) {
    return _mm512_add_ps(_mm512_mask_blend_ps(0xff00, (__m512)a, (__m512)b), _mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x4e));
}
INLINE __m512 quarters(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
INLINE __m512 eighths(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, a, b), _mm512_shuffle_ps(a, b, 0x4e));
}
INLINE void sum_each(const Float (&x)[4], float* out) {
    __m512 a = quarters(halves(x[0], x[1]), halves(x[2], x[3]));
    a = _mm512_add_ps(a, _mm512_permute_ps(a, 0x4e));
    a = _mm512_add_ps(a, _mm512_movehdup_ps(a));
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(_mm512_setr4_epi32(0, 4, 8, 12), a)));
}
INLINE void sum_each(const Float (&x)[8], float* out) {
    __m512 a = eighths(quarters(halves(x[0], x[2]), halves(x[4], x[6])), quarters(halves(x[1], x[3]), halves(x[5], x[7])));
    a = _mm512_add_ps(a, _mm512_movehdup_ps(a));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi64_epi32(_mm512_castps_si512(a)));
}
INLINE void sum_each(const Float (&x)[16], float* out) {
    __m512 a[4];
    EACH(4) a[i] = quarters(halves(x[i], x[i + 4]), halves(x[i + 8], x[i + 12]));
    __m512 b = eighths(a[0], a[1]), c = eighths(a[2], a[3]);
    _mm512_storeu_ps(out, _mm512_add_ps(_mm512_shuffle_ps(b, c, 0x88), _mm512_shuffle_ps(b, c, 0xdd)));
}
#elif defined(PSANN_AVX2)
INLINE void sum_each(const Float (&x)[4], float* out) {
    __m256 a = _mm256_add_ps(_mm256_permute2f128_ps((__m256)x[0], (__m256)x[1], 0x20),
        _mm256_permute2f128_ps((__m256)x[0], (__m256)x[1], 0x31));
    __m256 b = _mm256_add_ps(_mm256_permute2f128_ps((__m256)x[2], (__m256)x[3], 0x20),
        _mm256_permute2f128_ps((__m256)x[2], (__m256)x[3], 0x31));
    __m256 c = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
    c = _mm256_add_ps(c, _mm256_movehdup_ps(c));  // lanes 0 and 2: x[0], x[2]; 4 and 6: x[1], x[3]
    _mm_storeu_ps(out, _mm_blend_ps(_mm256_castps256_ps128(c), _mm_moveldup_ps(_mm256_extractf128_ps(c, 1)), 0xa));
}
INLINE void sum_each(const Float (&x)[8], float* out) {
    // Of two vectors, what stays in its lane is blended and what must come to it is shuffled.
    auto halves = [](Float a, Float b) INLINE_LAMBDA {
        return _mm256_add_ps(_mm256_blend_ps((__m256)a, (__m256)b, 0xf0), _mm256_permute2f128_ps((__m256)a, (__m256)b, 0x21));
    };
    auto quarters = [](__m256 a, __m256 b) INLINE_LAMBDA {
        return _mm256_add_ps(_mm256_blend_ps(a, b, 0xcc), _mm256_shuffle_ps(a, b, 0x4e));
    };
    __m256 a = quarters(halves(x[0], x[4]), halves(x[2], x[6])), b = quarters(halves(x[1], x[5]), halves(x[3], x[7]));
    __m256 partners = _mm256_permute_ps(_mm256_blend_ps(a, b, 0x55), 0xb1);
    _mm256_storeu_ps(out, _mm256_add_ps(_mm256_blend_ps(a, b, 0xaa), partners));
}
#endif
template <int N> INLINE void sum_each(const Float (&x)[N], float* out) {
    for (int i = 0; i < N; i++) out[i] = sum(x[i]);
}

// Lane i of the result is lane i ^ STEP of x.
template <int STEP> INLINE Float exchanged(Float x) {
#if defined(PSANN_AVX512)
    // gcc would load lane after lane from memory.
    if constexpr (STEP == 8) return (Float)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0x4e);
    if constexpr (STEP == 4) return (Float)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0xb1);
    return (Float)_mm512_permute_ps((__m512)x, STEP == 2 ? 0x4e : 0xb1);
#else
    Float partner;
    for (int i = 0; i < WIDTH; i++) partner[i] = x[i ^ STEP];
    return partner;
#endif
}

// In every lane the maximum of those lanes that are a multiple of R away.
template <int R, int STEP = WIDTH / 2> INLINE Float maximum_of_every(Float x) {
    if constexpr (STEP < R) return x;
    else return maximum_of_every<R, STEP / 2>(max(x, exchanged<STEP>(x)));
}

INLINE Short shorts(Uint x) {
    // x is below 2^16 in every lane; gcc's own conversion would mask first.
#if defined(PSANN_AVX512)
    return (Short)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(PSANN_AVX2)
    return (Short)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
#else
    return __builtin_convertvector(x, Short);
#endif
}

// gcc 12 would make six instructions of these conversions.
INLINE Uint uints(Short x) {
#if defined(PSANN_AVX512)
    return (Uint)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(PSANN_AVX2)
    return (Uint)_mm256_cvtepu16_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, Uint);
#endif
}
INLINE Int ints(const int8_t* p) {
#if defined(PSANN_AVX512)
    return (Int)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(PSANN_AVX2)
    return (Int)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
    return __builtin_convertvector(*reinterpret_cast<const ByteAnywhere*>(p), Int);
#endif
}

INLINE Float widen_bf16(Short h) { return (Float)(uints(h) << 16); }

// For any x but NaN.
INLINE Uint rounded_bf16(Float x) {
    Uint bits = (Uint)x;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
INLINE Short narrow_bf16(Float x) { return shorts(x == x ? rounded_bf16(x) : Uint{} + 0x7fc0); }

INLINE Float widen_fp16(Short h) {
#if defined(PSANN_AVX512)
    return (Float)_mm512_cvtph_ps((__m256i)h);
#elif defined(PSANN_AVX2)
    return (Float)_mm256_cvtph_ps((__m128i)h);
#else
    // The fraction and exponent move into place; the product with 2^112 corrects the exponent and normalizes denormals.
    Uint wide = __builtin_convertvector(h, Uint);
    Uint magnitude = (wide & 0x7fff) << 13;
    Uint scaled = (Uint)((Float)magnitude * 0x1p112f);
    scaled = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : scaled;
    return (Float)(scaled | ((wide & 0x8000) << 16));
#endif
}

INLINE Short narrow_fp16(Float x) {
#if defined(PSANN_AVX512)
    return (Short)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(PSANN_AVX2)
    return (Short)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
    Uint bits = (Uint)x, magnitude = bits & 0x7fffffff;
    // Below 2^-14 the sum with 0.5 rounds to a multiple of 2^-24, the step of half denormals.
    Uint denormal = (Uint)((Float)magnitude + 0.5f) - 0x3f000000u;
    Uint normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1)) >> 13;
    Uint result = magnitude < 0x38800000u ? denormal : normal;
    result = magnitude >= 0x47800000u ? Uint{} + 0x7c00 : result;
    result = magnitude > 0x7f800000u ? Uint{} + 0x7e00 : result;
    return shorts(result | ((bits >> 16) & 0x8000));
#endif
}

INLINE Float load(const int8_t* p) { return __builtin_convertvector(ints(p), Float); }
INLINE Float load(const bf16* p) { return widen_bf16(*reinterpret_cast<const ShortAnywhere*>(p)); }
INLINE Float load(const fp16* p) { return widen_fp16(*reinterpret_cast<const ShortAnywhere*>(p)); }
INLINE void store(bf16* p, Float x) { *reinterpret_cast<ShortAnywhere*>(p) = narrow_bf16(x); }
INLINE void store(fp16* p, Float x) { *reinterpret_cast<ShortAnywhere*>(p) = narrow_fp16(x); }

// The same where x is known to hold no NaN.
INLINE void store_number(float* p, Float x) { store(p, x); }
INLINE void store_number(bf16* p, Float x) { *reinterpret_cast<ShortAnywhere*>(p) = shorts(rounded_bf16(x)); }
INLINE void store_number(fp16* p, Float x) { store(p, x); }

// The first `count` lanes, the rest 0; count < WIDTH. Never touches memory past the last of them.
template <class T> INLINE Float load(const T* p, int64_t count) {
    T lanes[WIDTH] = {};
    for (int64_t i = 0; i < count; i++) lanes[i] = p[i];
    return load(lanes);
}
template <class T> INLINE void store(T* p, Float x, int64_t count) {
    T lanes[WIDTH];
    store(lanes, x);
    for (int64_t i = 0; i < count; i++) p[i] = lanes[i];
}
#if defined(PSANN_AVX512)
// A vector read back from single stores would wait for the last of them.
INLINE __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
INLINE Short load_shorts(const void* p, int64_t count) { return (Short)_mm256_maskz_loadu_epi16(first_lanes(count), p); }
INLINE void store_shorts(void* p, Short x, int64_t count) { _mm256_mask_storeu_epi16(p, first_lanes(count), (__m256i)x); }
INLINE Float load(const float* p, int64_t count) { return (Float)_mm512_maskz_loadu_ps(first_lanes(count), p); }
INLINE Float load(const bf16* p, int64_t count) { return widen_bf16(load_shorts(p, count)); }
INLINE Float load(const fp16* p, int64_t count) { return widen_fp16(load_shorts(p, count)); }
INLINE void store(float* p, Float x, int64_t count) { _mm512_mask_storeu_ps(p, first_lanes(count), (__m512)x); }
INLINE void store(bf16* p, Float x, int64_t count) { store_shorts(p, narrow_bf16(x), count); }
INLINE void store(fp16* p, Float x, int64_t count) { store_shorts(p, narrow_fp16(x), count); }
#endif

// body(t) with a t of the storage type.
template <class Body> INLINE void with_type(Type type, const Body& body) {
    type == Type::FLOAT32 ? body(float{}) : type == Type::BFLOAT16 ? body(bf16{}) : body(fp16{});
}

// 2 * WIDTH elements as two vectors. Widening bf16 costs least where one vector takes the even elements and the other the odd ones;
// `place` says where element k of such a row then stands, so that the row's partner in a product can be laid out alike.
template <class T> INLINE void load_pair(const T* p, Float (&out)[2]) {
    out[0] = load(p);
    out[1] = load(p + WIDTH);
}
INLINE void load_pair(const bf16* p, Float (&out)[2]) {
    Uint both = *reinterpret_cast<const UintAnywhere*>(p);
    out[0] = (Float)(both << 16);
    out[1] = (Float)(both & 0xffff0000u);
}
template <class T> INLINE void load_pair(const T* p, int64_t count, Float (&out)[2]) {
    T lanes[2 * WIDTH] = {};
    for (int64_t i = 0; i < count; i++) lanes[i] = p[i];
    load_pair(static_cast<const T*>(lanes), out);
}
// A pair of vectors in the order of memory, from the order of load_pair.
template <class T> INLINE void straighten_pair(Float (&)[2], const T*) {}
INLINE void straighten_pair(Float (&pair)[2], const bf16*) {
#if defined(PSANN_AVX2)
    __m256 low = _mm256_unpacklo_ps((__m256)pair[0], (__m256)pair[1]), high = _mm256_unpackhi_ps((__m256)pair[0], (__m256)pair[1]);
    pair[0] = (Float)_mm256_permute2f128_ps(low, high, 0x20);
    pair[1] = (Float)_mm256_permute2f128_ps(low, high, 0x31);
#else
    Float even = pair[0], odd = pair[1];
    for (int i = 0; i < WIDTH; i++) {
        pair[i / (WIDTH / 2)][i % (WIDTH / 2) * 2] = even[i];
        pair[i / (WIDTH / 2)][i % (WIDTH / 2) * 2 + 1] = odd[i];
    }
#endif
}
template <class T> INLINE int64_t place(int64_t k, const T*) { return k; }
INLINE int64_t place(int64_t k, const bf16*) {
    int64_t within = k % (2 * WIDTH);
    return k - within + within % 2 * WIDTH + within / 2;
}
// Floats that hold a row of `count` elements laid out so.
INLINE int64_t padded(int64_t count) { return (count + 2 * WIDTH - 1) / (2 * WIDTH) * (2 * WIDTH); }

// Products of bf16 as they are stored, two a lane, where an instruction multiplies and adds two at once: half the instructions of
// widening them first.
#if defined(PSANN_PAIRS)
constexpr bool MULTIPLIES_PAIRS = true;
#else
constexpr bool MULTIPLIES_PAIRS = false;
#endif

// 2 * WIDTH elements, two a lane; those from `count` on are 0, and never read.
INLINE Uint load_bits(const bf16* p) { return *reinterpret_cast<const UintAnywhere*>(p); }
INLINE Uint load_bits(const bf16* p, int64_t count) {
    bf16 lanes[2 * WIDTH] = {};
    for (int64_t i = 0; i < count; i++) lanes[i] = p[i];
    return load_bits(lanes);
}

INLINE void store_bits(bf16* p, Uint x) { *reinterpret_cast<UintAnywhere*>(p) = x; }

// sum + a.low * b.low + a.high * b.high. The instruction takes denormals for 0, also as its result.
INLINE Float add_products(Float sum, Uint a, Uint b) {
#if defined(__AVX512BF16__) && defined(PSANN_AVX512)
    return (Float)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    return fma((Float)(a << 16), (Float)(b << 16), fma((Float)(a & 0xffff0000u), (Float)(b & 0xffff0000u), sum));
#endif
}

// x, then y, rounded to bf16.
INLINE Uint rounded_pair(Float x, Float y) {
#if defined(__AVX512BF16__) && defined(PSANN_AVX512)
    return (Uint)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
#else
    union { Short half[2]; Uint whole; } both{{narrow_bf16(x), narrow_bf16(y)}};
    return both.whole;
#endif
}

// 0, 1, 2, ...
INLINE Int lane_numbers() {
    Int x;
    for (int i = 0; i < WIDTH; i++) x[i] = i;
    return x;
}

// x and y rounded to bf16 lane by lane, x's in the lower half of each.
INLINE Uint interleaved_pair(Float x, Float y) {
#if defined(__AVX512BF16__) && defined(PSANN_AVX512)
    const __m512i order = _mm512_add_epi16(_mm512_set1_epi32(16 << 16), (__m512i)((Uint)lane_numbers() * 0x10001u));
    return (Uint)_mm512_permutexvar_epi16(order, (__m512i)rounded_pair(x, y));
#else
    return uints(narrow_bf16(x)) | uints(narrow_bf16(y)) << 16;
#endif
}

// In each four lanes: x[j]'s i-th becomes x[i]'s j-th.
INLINE void transpose_fours(Uint (&x)[4]) {
#if defined(PSANN_AVX512)
    __m512i a = _mm512_unpacklo_epi32((__m512i)x[0], (__m512i)x[1]), b = _mm512_unpacklo_epi32((__m512i)x[2], (__m512i)x[3]);
    __m512i c = _mm512_unpackhi_epi32((__m512i)x[0], (__m512i)x[1]), d = _mm512_unpackhi_epi32((__m512i)x[2], (__m512i)x[3]);
    x[0] = (Uint)_mm512_unpacklo_epi64(a, b);
    x[1] = (Uint)_mm512_unpackhi_epi64(a, b);
    x[2] = (Uint)_mm512_unpacklo_epi64(c, d);
    x[3] = (Uint)_mm512_unpackhi_epi64(c, d);
#else
    for (int begin = 0; begin < WIDTH; begin += 4)
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < i; j++) {
                uint32_t held = x[i][begin + j];
                x[i][begin + j] = x[j][begin + i];
                x[j][begin + i] = held;
            }
#endif
}

// The sums of a's lanes that are a multiple of four away, in two steps: add_quarters(add_halves(a, b), add_halves(c, d)) is
// those of a, b, c and d one after the other.
INLINE Float add_halves(Float a, Float b) {
#if defined(PSANN_AVX512)
    return (Float)halves(a, b);
#else
    Float sums;
    for (int i = 0; i < WIDTH / 2; i++) sums[i] = a[i] + a[i + WIDTH / 2], sums[i + WIDTH / 2] = b[i] + b[i + WIDTH / 2];
    return sums;
#endif
}
INLINE Float add_quarters(Float a, Float b) {
#if defined(PSANN_AVX512)
    return (Float)quarters((__m512)a, (__m512)b);
#else
    Float sums;
    for (int i = 0; i < WIDTH / 4; i++)
        for (int j = 0; j < 2; j++) {
            sums[i + j * WIDTH / 4] = a[i + j * WIDTH / 2] + a[i + j * WIDTH / 2 + WIDTH / 4];
            sums[i + j * WIDTH / 4 + WIDTH / 2] = b[i + j * WIDTH / 2] + b[i + j * WIDTH / 2 + WIDTH / 4];
        }
    return sums;
#endif
}

// Rows a and b element beside element: each eight elements' first four in out[0], the others in out[1]. `zipped_place` says where
// a's and b's element k then are.
INLINE void zip(Uint a, Uint b, Uint (&out)[2]) {
#if defined(PSANN_AVX512)
    out[0] = (Uint)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b);
    out[1] = (Uint)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
#else
    for (int i = 0; i < WIDTH; i += 4)
        for (int j = 0; j < 4; j++) {
            uint32_t x = a[i + j], y = b[i + j];
            out[j / 2][i + j % 2 * 2] = (x & 0xffff) | y << 16;
            out[j / 2][i + j % 2 * 2 + 1] = x >> 16 | (y & 0xffff0000u);
        }
#endif
}
INLINE int64_t zipped_place(int64_t k) {
    int64_t within = k % (2 * WIDTH);
    return k - within + within % 8 / 4 * WIDTH + within / 8 * 4 + within % 4;
}

// What a stored and reloaded x would be.
INLINE Float rounded(Float x, const float*) { return x; }
INLINE Float rounded(Float x, const bf16*) { return widen_bf16(narrow_bf16(x)); }
INLINE Float rounded(Float x, const fp16*) { return widen_fp16(narrow_fp16(x)); }

INLINE float scalar(float x) { return x; }
INLINE float scalar(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    __builtin_memcpy(&y, &bits, 4);
    return y;
}
INLINE float scalar(fp16 x) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#else
    return load(&x, 1)[0];
#endif
}

// One number, rounded as a whole vector's are.
INLINE void put(float* p, float x) { *p = x; }
INLINE void put(bf16* p, float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    p->bits = static_cast<uint16_t>(x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0);
}
INLINE void put(fp16* p, float x) {
#if defined(__F16C__)
    p->bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
    store(p, all(x), 1);
#endif
}

// body(c, count) for each vector of [begin, end); count is WIDTH but for the last.
template <class Body> INLINE void each_vector(int64_t begin, int64_t end, const Body& body) {
    int64_t c = begin;
    for (; c + WIDTH <= end; c += WIDTH) body(c, int64_t{WIDTH});
    if (c < end) body(c, end - c);
}
template <class T> INLINE Float take(const T* p, int64_t count) { return count == WIDTH ? load(p) : load(p, count); }
template <class T> INLINE void give(T* p, Float x, int64_t count) { count == WIDTH ? store(p, x) : store(p, x, count); }

// The first `count` lanes of x, the rest of `others`.
INLINE Float first_of(Float x, Float others, int64_t count) {
    return count == WIDTH ? x : lane_numbers() < static_cast<int>(count) ? x : others;
}

// Sums over a row of what term(c, count, out) gives for each vector. Four partial sums each, so that one's latency is hidden behind
// the others.
template <int N, class Term> INLINE void sum_row(int64_t features, const Term& term, float (&result)[N]) {
    Float sums[4][N] = {};
    int64_t c = 0;
    auto add = [&](int part, int64_t at, int64_t count) INLINE_LAMBDA {
        Float out[N];
        term(at, count, out);
        EACH(N) sums[part][i] += out[i];
    };
    for (; c + 4 * WIDTH <= features; c += 4 * WIDTH)
        UNROLL for (int part = 0; part < 4; part++) add(part, c + part * WIDTH, WIDTH);
    for (; c + WIDTH <= features; c += WIDTH) add(0, c, WIDTH);
    if (c < features) add(0, c, features - c);
    EACH(N) result[i] = sum((sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]));
}

}  // namespace PSANN_NAMESPACE
