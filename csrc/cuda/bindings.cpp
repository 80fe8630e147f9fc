// psann_kernels._native_cuda: unpacks arguments, computes nothing. Every kernel takes the numbers that its twin on a CPU takes,
// then the stream and scratch memory on the device (see kernels.cuh for its size), both as addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "../arguments.h"
#include "kernels.cuh"

namespace py = pybind11;

namespace {

const char* advice(cudaError_t error) {
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion)
        return "; PSANN_FAST_CUDA names the targets to build for, such as 80,90";
    if (error == cudaErrorInvalidConfiguration || error == cudaErrorInvalidValue) return "";
    return "; where an earlier kernel failed, CUDA_LAUNCH_BLOCKING=1 shows which";
}

template <class Arguments, class... Numbers>
void bind(py::module_& m, const char* name, Arguments (*unpack)(Numbers...),
          void (*run)(const Arguments&, cudaStream_t, float* scratch)) {
    m.def(name, [unpack, run, name](Numbers... numbers, uintptr_t stream, uintptr_t scratch) {
        run(unpack(numbers...), reinterpret_cast<cudaStream_t>(stream), arguments::at<float>(scratch));
        // What the launch itself reports. A fault inside the kernel shows at the next synchronization, as with any of torch's.
        cudaError_t error = cudaPeekAtLastError();
        if (error != cudaSuccess) {
            (void)cudaGetLastError();
            throw std::runtime_error(std::string(name) + ": the kernel was not launched: " + cudaGetErrorString(error) +
                advice(error));
        }
    });
}
}  // namespace

PYBIND11_MODULE(_native_cuda, m) {
    m.doc() = "CUDA kernels; see native.py";
    m.attr("source_hash") = PSANN_SOURCE_HASH;
    m.attr("paged_attention_max_tokens") = cuda::PAGED_ATTENTION_MAX_TOKENS;
    m.def("damped_sine_partials", &cuda::damped_sine_partials);
    m.def("rms_norm_partials", &cuda::rms_norm_partials);
    m.def("wave_conv_partials", &cuda::wave_conv_partials);
    m.def("paged_attention_partials", [](int64_t rows, int64_t heads, int64_t head_dim, int64_t max_length) {
        PagedAttention a = {};
        a.rows = rows, a.heads = heads, a.head_dim = head_dim;
        return cuda::paged_attention_partials(a, max_length);
    });
    bind(m, "damped_sine_forward", &arguments::damped_sine_forward,
        +[](const DampedSineForward& a, cudaStream_t s, float*) { cuda::damped_sine_forward(a, s); });
    bind(m, "damped_sine_backward", &arguments::damped_sine_backward,
        +[](const DampedSineBackward& a, cudaStream_t s, float* scratch) { cuda::damped_sine_backward(a, scratch, s); });
    bind(m, "rms_norm_forward", &arguments::rms_norm_forward,
        +[](const RmsNormForward& a, cudaStream_t s, float*) { cuda::rms_norm_forward(a, s); });
    bind(m, "rms_norm_backward", &arguments::rms_norm_backward,
        +[](const RmsNormBackward& a, cudaStream_t s, float* scratch) { cuda::rms_norm_backward(a, scratch, s); });
    bind(m, "wave_conv_forward", &arguments::wave_conv_forward,
        +[](const WaveConvForward& a, cudaStream_t s, float*) { cuda::wave_conv_forward(a, s); });
    bind(m, "wave_conv_backward", &arguments::wave_conv_backward, +[](const WaveConvBackward& a, cudaStream_t s, float* scratch) {
        cuda::wave_conv_backward(a, scratch, scratch + a.conv.tokens * a.conv.features, s);
    });
    bind(m, "paged_append", &arguments::paged_append,
        +[](const PagedAppend& a, cudaStream_t s, float*) { cuda::paged_append(a, s); });
    bind(m, "paged_attention", &arguments::paged_attention, +[](const PagedAttention& a, cudaStream_t s, float* scratch) {
        cuda::paged_attention(a, a.max_blocks * a.block_size, scratch, s);
    });
}
