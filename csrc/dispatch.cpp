// Chooses among the instruction sets that were compiled in. PSANN_HAS_AVX2 and its like come from setup.py.
#include <string.h>

#include <string>

#include "kernels.h"

#define PSANN_TABLE(isa, floats)                                    \
    namespace isa {                                                 \
    PSANN_KERNELS(PSANN_DECLARE)                                    \
    static const Kernels TABLE = {#isa, floats, PSANN_KERNELS(PSANN_ENTRY)}; \
    }

PSANN_TABLE(portable, 4)
#if defined(PSANN_HAS_AVX2)
PSANN_TABLE(avx2, 8)
#endif
#if defined(PSANN_HAS_AVX512)
PSANN_TABLE(avx512, 16)
#endif
#if defined(PSANN_HAS_AVX512_BF16)
namespace avx512_bf16 {
PSANN_DECLARE(paged_attention, PagedAttention)
PSANN_DECLARE(muon_rounds, MuonRounds)
static const Kernels TABLE = [] {
    Kernels table = avx512::TABLE;
    table.isa = "avx512_bf16";
    table.paged_attention = paged_attention;
    table.muon_rounds = muon_rounds;
    return table;
}();
}
#endif

namespace {

struct Variant {
    const Kernels* kernels;
    bool (*runs_here)();
};

#if defined(PSANN_HAS_AVX512)
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}
#endif

// Widest first. The compiler's cpuid look-up also asks whether the operating system saves the wide registers.
const Variant VARIANTS[] = {
#if defined(PSANN_HAS_AVX512_BF16)
    {&avx512_bf16::TABLE, [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }},
#endif
#if defined(PSANN_HAS_AVX512)
    {&avx512::TABLE, has_avx512},
#endif
#if defined(PSANN_HAS_AVX2)
    // Every processor with AVX2 and FMA converts halves too; gcc before 11 cannot ask for F16C by name.
    {&avx2::TABLE, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {&portable::TABLE, [] { return true; }},
};

const Kernels* widest() {
    for (const Variant& v : VARIANTS)
        if (v.runs_here()) return v.kernels;
    return nullptr;
}

const Kernels* chosen = widest();

}  // namespace

const Kernels& kernels() { return *chosen; }

bool use_isa(const char* isa) {
    for (const Variant& v : VARIANTS) {
        if (strcmp(v.kernels->isa, isa) == 0 && v.runs_here()) {
            chosen = v.kernels;
            return true;
        }
    }
    return false;
}

const char* usable_isas() {
    static const std::string names = [] {
        std::string s;
        for (const Variant& v : VARIANTS)
            if (v.runs_here()) s += (s.empty() ? "" : " ") + std::string(v.kernels->isa);
        return s;
    }();
    return names.c_str();
}
