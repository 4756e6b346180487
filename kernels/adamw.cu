// AdamW, one step in place: decoupled decay, bias-corrected moments (Loshchilov and Hutter).
//
// Layout: gradient, weight and both moments of `count` f32 each, without gaps.
// Grid: blocks of 256 threads that step over all elements; any number of blocks is right.
// Limits: count < 2^63. The host computes the constants in f64: `rate` is the learning rate over
// the first moment's correction, `root` one over the square root of the second's, `keep` is
// 1 - learning rate * decay.

extern "C" __global__ void __launch_bounds__(256)
adamw(const float* __restrict__ gradient, float* __restrict__ weight, float* __restrict__ first,
      float* __restrict__ second, long long count, float scale, float beta1, float rest1,
      float beta2, float rest2, float rate, float root, float epsilon, float keep) {
  const long long step = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
    const float g = gradient[i] * scale;
    const float m = fmaf(beta1, first[i], rest1 * g);
    const float v = fmaf(beta2, second[i], rest2 * g * g);
    first[i] = m;
    second[i] = v;
    weight[i] = keep * weight[i] - rate * m / (sqrtf(v) * root + epsilon);
  }
}
