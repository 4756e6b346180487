// SwiGLU gate, forward: y = silu(gate) * up, silu(g) = g / (1 + exp(-g)).
//
// Layout: gate_up [rows, 2 * width] with the gate left and up right, y [rows, width]; f32, no gaps.
// Grid: blocks of 256 threads that step over all elements of y; any number of blocks is right.
// Limits: rows * width < 2^63; no strides.

extern "C" __global__ void __launch_bounds__(256)
swiglu(const float* __restrict__ gate_up, float* __restrict__ y, long long rows, long long width) {
  const long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  const long long step = (long long)gridDim.x * blockDim.x;
  for (long long i = first; i < rows * width; i += step) {
    const long long row = i / width, column = i - row * width;
    const float gate = gate_up[row * 2 * width + column];
    const float up = gate_up[row * 2 * width + width + column];
    y[i] = gate / (1.f + expf(-gate)) * up;
  }
}
