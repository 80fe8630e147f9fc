// The warp operations of cuda_emulator.h, most of which csrc/cuda does without, so that they are right on the day it does not.
#include <cuda_runtime.h>

namespace {

constexpr int THREADS = 64, RESULTS = 9;

__global__ void __launch_bounds__(THREADS) probe(int* out) {
    __shared__ int left[THREADS];
    int t = static_cast<int>(threadIdx.x), lane = t % 32, *mine = out + t * RESULTS;
    unsigned all = 0xffffffffu, half = lane < 16 ? 0xffffu : 0xffff0000u;
    mine[0] = __shfl_sync(all, t, 5, 8);
    mine[1] = __shfl_up_sync(all, t, 3, 16);
    mine[2] = __shfl_down_sync(all, t, 3, 16);
    mine[3] = __shfl_xor_sync(all, t, 9, 8);
    mine[4] = static_cast<int>(__ballot_sync(half, t % 3 == 0));
    mine[5] = __any_sync(all, t == 40);
    mine[6] = __all_sync(all, t < 32);
    if (lane % 2) mine[7] = __shfl_xor_sync(0xaaaaaaaau, t, 2);
    else mine[7] = -1;
    left[t] = t * t;
    __syncwarp();
    mine[8] = left[t ^ 1];
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void emulator_probe(int* out) { probe<<<1, THREADS>>>(out); }
