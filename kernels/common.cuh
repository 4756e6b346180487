// Shared by the kernels: a sum over the threads of a block.
//
// Layout: warps of 32, at most 32 of them. The tree is fixed by the block's size alone, so the same
// numbers give the same bits on every run, whatever else is on the device.
#pragma once

#define FULL_WARP 0xffffffffu

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance >>= 1)
    value += __shfl_xor_sync(FULL_WARP, value, distance);
  return value;
}

// The sum of `value` over the block, in every thread. `partial` is shared memory for 32 floats;
// whole warps only. Ends with a barrier, so `partial` can be used again at once.
__device__ __forceinline__ float block_sum(float value, float* partial) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  value = warp_sum(value);
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  value = warp_sum(lane < warps ? partial[lane] : 0.f);
  __syncthreads();
  return value;
}
