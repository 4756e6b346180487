// RMSNorm, forward: y = w * (x * r), r = 1 / sqrt(mean(x^2) + epsilon), one r per row.
//
// Layout: x and y [rows, cols] without gaps, weight [cols], inverse_rms [rows]; all f32.
// Grid: one block of 256 threads per row; thread i takes columns i, i + 256, ...
// Limits: rows < 2^31, cols < 2^31; no strides. The sum of squares is 256 chains joined by a fixed
// tree, not the single chain of the CPU and the reference: same bits on every run, not theirs.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
rms_norm(const float* __restrict__ x, const float* __restrict__ weight, float* __restrict__ y,
         float* __restrict__ inverse_rms, int cols, float epsilon) {
  __shared__ float partial[32];
  const size_t first = (size_t)blockIdx.x * cols;
  float sum = 0.f;
  for (int i = threadIdx.x; i < cols; i += blockDim.x) sum = fmaf(x[first + i], x[first + i], sum);
  sum = block_sum(sum, partial);
  const float inverse = 1.f / sqrtf(sum / cols + epsilon);
  if (threadIdx.x == 0) inverse_rms[blockIdx.x] = inverse;
  for (int i = threadIdx.x; i < cols; i += blockDim.x)
    y[first + i] = weight[i] * (x[first + i] * inverse);
}
