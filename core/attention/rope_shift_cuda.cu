#include "attention/choice.h"
#include "cuda/launch.cuh"
#include "cuda/vec.cuh"
#include "ops/cuda_table.h"

namespace prt::cuda {
namespace {

constexpr int kThreads = 256;

// A block per page and kv head, kEach pairs of dimensions a thread. Floor: the keys of the pages read and written.
template <class T, int kEach>
__global__ void __launch_bounds__(kThreads)
    rope_shift_kernel(T* k_pages, const int32_t* pages, const float* cos_sin, int32_t h_kv, int32_t d) {
  pdl_wait();
  pdl_launch();
  const int half = d / 2, per_row = half / kEach;
  T* k = k_pages + (int64_t{pages[blockIdx.x]} * h_kv + blockIdx.y) * kPageTokens * d;
  for (int i = static_cast<int>(threadIdx.x); i < kPageTokens * per_row; i += kThreads) {
    const int column = i % per_row * kEach;
    T *from = k + i / per_row * d + column, *pair = from + half;
    float x[kEach], y[kEach], cos[kEach], sin[kEach], turned[kEach], other[kEach];
    load<kEach>(x, from), load<kEach>(y, pair);
    load<kEach>(cos, cos_sin + column), load<kEach>(sin, cos_sin + half + column);
#pragma unroll
    for (int j = 0; j < kEach; ++j) turned[j] = x[j] * cos[j] - y[j] * sin[j], other[j] = y[j] * cos[j] + x[j] * sin[j];
    store<kEach>(from, turned), store<kEach>(pair, other);
  }
}

}  // namespace

void rope_shift(const CudaStream& stream, const RopeShift& a) {
  const int64_t h_kv = a.k_pages.shape[1], d = a.k_pages.shape[3];
  with_dtype(a.k_pages.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool wide = d % 8 == 0 && in_pieces(a.k_pages, 4) && in_pieces(a.cos_sin, 4);
    launch(stream, wide ? rope_shift_kernel<T, 4> : rope_shift_kernel<T, 1>,
           dim3(static_cast<uint32_t>(a.pages.shape[0]), static_cast<uint32_t>(h_kv)), dim3(kThreads), 0, a.k_pages.as<T>(),
           a.pages.as<int32_t>(), a.cos_sin.as<float>(), static_cast<int32_t>(h_kv), static_cast<int32_t>(d));
  });
}

}  // namespace prt::cuda
