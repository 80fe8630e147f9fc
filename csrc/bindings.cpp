// psann_kernels._native: unpacks arguments, computes nothing. Every kernel takes its numbers, then the number of threads.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "arguments.h"
#include "at_once.h"
#include "checks.h"
#include "threads.h"

namespace py = pybind11;

namespace {

template <class Arguments, class... Numbers>
void bind(py::module_& m, const char* name, Arguments (*unpack)(Numbers...), void (*run)(const Arguments&)) {
    // Other threads of Python run while a kernel does.
    m.def(
        name,
        [unpack, run](Numbers... numbers, int threads) {
            Arguments a = unpack(numbers...);
            a.threads = threads;
            run(a);
        },
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace

#define PSANN_BIND(name, Arguments) bind(m, #name, &arguments::name, +[](const Arguments& a) { kernels().name(a); });

PYBIND11_MODULE(_native, m) {
    m.doc() = "C++ kernels; see native.py";
    m.attr("source_hash") = PSANN_SOURCE_HASH;
    m.attr("wave_conv_max_taps") = WAVE_CONV_MAX_TAPS;
    m.attr("packed_linear_panel") = PACKED_LINEAR_PANEL;
    add_at_once(m);
    m.def("share_openmp", &share_openmp);
    m.def("threading", &threading);
    m.def("use_isa", &use_isa);
    m.def("isa", [] { return kernels().isa; });
    m.def("usable_isas", &usable_isas);
    PSANN_BIND(damped_sine_forward, DampedSineForward)
    PSANN_BIND(damped_sine_backward, DampedSineBackward)
    PSANN_BIND(rms_norm_forward, RmsNormForward)
    PSANN_BIND(rms_norm_backward, RmsNormBackward)
    PSANN_BIND(scaled_add, ScaledAdd)
    PSANN_BIND(scaled_add_backward, ScaledAddBackward)
    PSANN_BIND(wave_conv_forward, WaveConvForward)
    PSANN_BIND(wave_conv_backward, WaveConvBackward)
    PSANN_BIND(turn_heads, TurnHeads)
    PSANN_BIND(softmax_scores, SoftmaxScores)
    PSANN_BIND(softmax_scores_backward, SoftmaxScoresBackward)
    PSANN_BIND(cross_entropy, CrossEntropy)
    PSANN_BIND(linear, Linear)
    PSANN_BIND(packed_linear, PackedLinear)
    PSANN_BIND(sample_tokens, SampleTokens)
    PSANN_BIND(total_norm, TotalNorm)
    PSANN_BIND(scale_list, ScaleList)
    PSANN_BIND(adamw, AdamW)
    PSANN_BIND(muon_prepare, MuonPrepare)
    PSANN_BIND(muon_rounds, MuonRounds)
    PSANN_BIND(muon_apply, MuonApply)
    bind(m, "paged_append", &arguments::paged_append, +[](const PagedAppend& a) {
        check_paged_append(a);
        kernels().paged_append(a);
    });
    bind(m, "paged_attention", &arguments::paged_attention, +[](const PagedAttention& a) {
        check_paged_attention(a);
        kernels().paged_attention(a);
    });
}
