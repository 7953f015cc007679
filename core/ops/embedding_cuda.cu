#include "cuda/launch.cuh"
#include "cuda/vec.cuh"
#include "ops/cuda_table.h"

namespace prt::cuda {

namespace {

constexpr int kThreads = 256;

// N elements a thread; a block has part of one row.
template <int N, class T>
__global__ void embedding_kernel(float* out, int64_t stride_out, const int32_t* tokens, const T* weight, int64_t stride, int64_t d) {
  const int64_t t = blockIdx.x, i = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * N;
  pdl_wait();
  pdl_launch();
  if (i >= d) return;
  float x[N];
  load(x, weight + tokens[t] * stride + i);
  store(out + t * stride_out + i, x);
}

}  // namespace

void embedding(const CudaStream& s, const Embedding& a) {
  const int64_t n_tok = a.tokens.shape[0], d = a.weight.shape[1];
  const bool wide = in_pieces(a.weight, 8) && in_pieces(a.out, 8);
  const int64_t blocks = (d + kThreads * (wide ? 8 : 1) - 1) / (kThreads * (wide ? 8 : 1));
  with_dtype(a.weight.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(s, wide ? embedding_kernel<8, T> : embedding_kernel<1, T>, dim3(n_tok, blocks), kThreads, 0, a.out.as<float>(), a.out.row_stride,
           a.tokens.as<int32_t>(), a.weight.as<T>(), a.weight.row_stride, d);
  });
}

}  // namespace prt::cuda
