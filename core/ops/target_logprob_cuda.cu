#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "ops/cuda_table.h"

namespace prt::cuda {

namespace {

constexpr int kThreads = 1024;

// One block has one row and reads it once.
template <int N>
__global__ void __launch_bounds__(kThreads)
    target_logprob_kernel(float* out, const float* logits, int64_t stride, int64_t n_vocab, const int32_t* targets) {
  __shared__ float tops[32];
  __shared__ double sums[32];
  const int64_t r = blockIdx.x;
  pdl_wait();
  pdl_launch();
  const int32_t target = targets[r];
  if (target < 0) {
    if (threadIdx.x == 0) out[r] = 0;
    return;
  }
  const float* row = logits + r * stride;
  LogSum part;
#pragma unroll 4
  for (int64_t i = threadIdx.x * N; i < n_vocab; i += kThreads * N) {
    float x[N];
    load(x, row + i);
    part.add(x);
  }
  const float top = block_max(part.top, tops);
  const double total = block_sum(part.sum > 0 ? static_cast<double>(part.sum) * exp(static_cast<double>(part.top - top)) : 0.0, sums);
  if (threadIdx.x == 0) out[r] = row[target] - (top + static_cast<float>(log(total)));
}

}  // namespace

void target_logprob(const CudaStream& s, const TargetLogprob& a) {
  launch(s, in_pieces(a.logits, 4) ? target_logprob_kernel<4> : target_logprob_kernel<1>, dim3(a.logits.shape[0]), kThreads, 0,
         a.out.as<float>(), a.logits.as<float>(), a.logits.row_stride, a.logits.shape[1], a.targets.as<int32_t>());
}

}  // namespace prt::cuda
