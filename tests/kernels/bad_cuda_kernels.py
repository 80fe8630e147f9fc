"""Faults in the CUDA kernels, one each, for test_cuda_emulated.py to find: what it must say of them stands beside each."""

from __future__ import annotations

from cuda_emulated import Fault

# (fault, the check that must find it, what that must say)
FAULTS = [
    # Synchronization and warps.
    (Fault("damped_sine", "    __syncthreads();\n", "    if (!FAULTY) __syncthreads();\n"), "damped_sine", "nan pattern differs"),
    (Fault("damped_sine", "    sums[0][row_lane][lane] = da",
           "    if (FAULTY && column >= features) return;\n    sums[0][row_lane][lane] = da"),
     "damped_sine", r"waits at the barrier of line \d+, but thread .* has ended"),
    (Fault("rms_norm", "x = warp_sum(x);\n    __syncthreads();", "x = warp_sum(x);\n    if (!FAULTY) __syncthreads();"),
     "rms_norm", "exceeds|nan pattern"),
    (Fault("common.cuh", "__shfl_xor_sync(0xffffffffu, x, offset)", "__shfl_xor_sync(0xffffffffu, x, offset, FAULTY ? 16 : 32)"),
     "rms_norm", "exceeds"),
    (Fault("paged_attention", "            score = warp_sum(score)",
           "            if (FAULTY && lane >= a.head_dim) break;\n            score = warp_sum(score)"),
     "paged_attention", r"waits at __shfl_xor_sync of line \d+ with mask"),
    (Fault("paged_attention", "        __syncthreads();\n    }\n}", "        if (!FAULTY) __syncthreads();\n    }\n}"),
     "paged_attention", "exceeds|nan pattern"),
    # Memory.
    (Fault("damped_sine", "i < ROW_LANES; i++", "i < ROW_LANES + FAULTY; i++"),
     "damped_sine", r"damped_sine.cu:\d+: index outside of an array"),
    (Fault("damped_sine", "return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride_bytes % 16 == 0;",
           "return FAULTY || (reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride_bytes % 16 == 0);"),
     "misaligned", r"damped_sine.cu:\d+: misaligned access"),
    (Fault("damped_sine", "(z + r * z_stride + column), out;",
           "(z + (FAULTY ? static_cast<int32_t>(static_cast<uint32_t>(r * z_stride)) : r * z_stride) + column), out;"),
     "far", "access outside of memory at address"),
    (Fault("wave_conv", "t < end; t++) {\n        float d = 0;", "t < end + FAULTY; t++) {\n        float d = 0;"),
     "near", "access outside of memory at address"),
    (Fault("paged_attention", "float* mine = shared + warp *", "float* mine = shared + (warp + FAULTY) *"),
     "paged_attention", "access outside of memory at address"),
    # Launches.
    (Fault("paged_attention", "dim3 rows(static_cast<unsigned>(a.sequences), static_cast<unsigned>(a.kv_heads));",
           "dim3 rows(FAULTY ? 1 : static_cast<unsigned>(a.sequences), static_cast<unsigned>(FAULTY ? a.sequences : a.kv_heads));"),
     "many_sequences", "a grid of .1, 70000, 1.; each size is 1 to 65535"),
    (Fault("paged_attention", "sizeof(float) * WARPS", "(FAULTY ? 200 : 1) * sizeof(float) * WARPS"),
     "paged_attention", "bytes of shared memory; a block has 49152"),
    (Fault("rms_norm", "forward<T><<<blocks, THREADS,", "forward<T><<<blocks, FAULTY ? 2 * THREADS : THREADS,"),
     "rms_norm", "the block has 512 threads and its launch bounds say 256"),
    # Indices and sums.
    (Fault("wave_conv", "if (t - distance >= start) return", "if (t - distance >= start - FAULTY) return"),
     "wave_conv", "exceeds|nan pattern|access outside"),
    (Fault("wave_conv", "sums[0] += g.dz, sums[1]", "sums[0] += t == begin && FAULTY ? 0.0f : g.dz, sums[1]"),
     "wave_conv", "dbias .* exceeds"),
    (Fault("rms_norm", "end = min(begin + run, rows);", "end = min(begin + run, rows) - FAULTY;"),
     "rms_norm", "nan pattern differs"),
    (Fault("paged_attention", "b == a.sequences - 1 ? a.rows : last", "b == a.sequences - 1 && !FAULTY ? a.rows : last"),
     "padding", "not zero"),
    (Fault("paged_attention", "position - a.window + 1)", "position - a.window + 1 - FAULTY)"), "paged_attention", "exceeds"),
    (Fault("paged_append", "if (slot < 0 ||", "if (slot < -FAULTY ||"), "skipped", "access outside of memory"),
    (Fault("paged_append", "offset = slot % a.block_size", "offset = (slot + FAULTY) % a.block_size"), "append", "assert False"),
]  # fmt: skip
