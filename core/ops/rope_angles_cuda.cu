#include "cuda/launch.cuh"
#include "ops/cuda_table.h"

namespace prt::cuda {

namespace {

constexpr int kThreads = 128;

// The angle is rounded to f32 as the CPU does, and may be thousands of turns. What is left of it after whole quarter turns takes double
// (3 operations: a GPU for games does few of them); its sine and cosine do not.
__global__ void rope_angles_kernel(float* cos_sin, int64_t stride, const int32_t* positions, const float* inv_freq, int64_t half,
                                   float attention_factor) {
  const int64_t t = blockIdx.x, i = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  pdl_wait();
  pdl_launch();
  if (i >= half) return;
  const double quarters = static_cast<double>(__fmul_rn(static_cast<float>(positions[t]), inv_freq[i])) * 0.63661977236758134;  // 2 / pi
  const double whole = rint(quarters);
  float s, c;
  sincospif(static_cast<float>(quarters - whole) * 0.5f, &s, &c);  // within a quarter of pi
  const int quadrant = static_cast<int>(static_cast<long long>(whole) & 3);
  const float cosine = quadrant & 1 ? s : c, sine = quadrant & 1 ? c : s;
  float* out = cos_sin + t * stride;
  out[i] = (quadrant == 1 || quadrant == 2 ? -cosine : cosine) * attention_factor;
  out[half + i] = (quadrant >= 2 ? -sine : sine) * attention_factor;
}

}  // namespace

void rope_angles(const CudaStream& s, const RopeAngles& a) {
  const int64_t n_tok = a.positions.shape[0], half = a.inv_freq.shape[0];
  launch(s, rope_angles_kernel, dim3(n_tok, (half + kThreads - 1) / kThreads), kThreads, 0, a.cos_sin.as<float>(), a.cos_sin.row_stride,
         a.positions.as<int32_t>(), a.inv_freq.as<float>(), half, a.attention_factor);
}

}  // namespace prt::cuda
