// psann_kernels._native: unpacks arguments, computes nothing. Addresses are integers; native.py checked what they point to.
#include <pybind11/pybind11.h>

#include <stdint.h>

#include "kernels.h"
#include "threads.h"

namespace py = pybind11;

namespace {

template <class T> T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

void damped_sine_forward(uintptr_t z, uintptr_t amplitude, uintptr_t frequency, uintptr_t damping, uintptr_t y, int64_t rows,
                         int64_t features, int64_t z_stride, int type, int mode, int threads) {
    kernels().damped_sine_forward({at<void>(z), at<float>(amplitude), at<float>(frequency), at<float>(damping), at<void>(y), rows,
                                   features, z_stride, static_cast<Type>(type), mode, threads});
}

void damped_sine_backward(uintptr_t z, uintptr_t dy, uintptr_t amplitude, uintptr_t frequency, uintptr_t damping, uintptr_t dz,
                          uintptr_t damplitude, uintptr_t dfrequency, uintptr_t ddamping, int64_t rows, int64_t features,
                          int64_t z_stride, int64_t dy_stride, int type, int mode, int threads) {
    kernels().damped_sine_backward({at<void>(z), at<void>(dy), at<float>(amplitude), at<float>(frequency), at<float>(damping),
                                    at<void>(dz), at<float>(damplitude), at<float>(dfrequency), at<float>(ddamping), rows, features,
                                    z_stride, dy_stride, static_cast<Type>(type), mode, threads});
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    // Other threads of Python run while a kernel does.
    using Released = py::call_guard<py::gil_scoped_release>;
    m.doc() = "C++ kernels; see native.py";
    m.attr("source_hash") = PSANN_SOURCE_HASH;
    m.def("share_openmp", &share_openmp);
    m.def("threading", &threading);
    m.def("use_isa", &use_isa);
    m.def("isa", [] { return kernels().isa; });
    m.def("usable_isas", &usable_isas);
    m.def("damped_sine_forward", &damped_sine_forward, Released());
    m.def("damped_sine_backward", &damped_sine_backward, Released());
}
