// Every native CPU kernel and its arguments. Pointers are to the first element, strides count elements, sizes are not negative.
// Nothing here knows torch: whoever calls has checked shapes and keeps the memory alive.
#pragma once

#include <stdint.h>

enum class Type : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3 };

// y = amplitude * exp(-damping * g(z)) * sin(frequency * z); z (rows, features) with unit stride along a row, y contiguous.
struct DampedSineForward {
    const void* z;
    const float *amplitude, *frequency, *damping;  // (features)
    void* y;
    int64_t rows, features, z_stride;
    Type type;  // of z and y
    int mode;   // what the damping multiplies: 0 |z|, 1 max(z, 0), 2 nothing
    int threads;
};

struct DampedSineBackward {
    const void *z, *dy;
    const float *amplitude, *frequency, *damping;
    void* dz;                                   // (rows, features) contiguous
    float *damplitude, *dfrequency, *ddamping;  // (features)
    int64_t rows, features, z_stride, dy_stride;
    Type type;
    int mode;
    int threads;
};

#define PSANN_KERNELS(X)                        \
    X(damped_sine_forward, DampedSineForward)   \
    X(damped_sine_backward, DampedSineBackward)

#define PSANN_DECLARE(name, Arguments) void name(const Arguments&);
#define PSANN_MEMBER(name, Arguments) void (*name)(const Arguments&);
#define PSANN_ENTRY(name, Arguments) name,

// The kernels of one instruction set.
struct Kernels {
    const char* isa;
    int width;  // floats in a vector
    PSANN_KERNELS(PSANN_MEMBER)
};

// Those that this process uses: the widest that the processor has, until `use_isa` says otherwise.
const Kernels& kernels();
// False where this build or this processor lacks it.
bool use_isa(const char* isa);
// The built names that this processor can run, widest first, separated by spaces.
const char* usable_isas();
