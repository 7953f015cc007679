// Several neighbouring elements at a time: N values of any format, in registers as floats, in accesses of up to 16 bytes.
#pragma once
#include "base/tensor.h"
#include "cuda/types.cuh"

namespace prt {

template <int N, class T>
struct Pack {  // N values as they lie in memory
  static constexpr int kBytes = N * static_cast<int>(sizeof(T)) < 16 ? N * static_cast<int>(sizeof(T)) : 16;
  static constexpr int kEach = kBytes / static_cast<int>(sizeof(T));
  struct alignas(kBytes) Part {
    T v[kEach];
  };
  Part part[N / kEach];
};

template <int N, class T>
__device__ __forceinline__ void load(float (&x)[N], const T* p) {
  using P = Pack<N, T>;
  P pack;
#pragma unroll
  for (int i = 0; i < N / P::kEach; ++i) pack.part[i] = reinterpret_cast<const typename P::Part*>(p)[i];
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = to_float(pack.part[i / P::kEach].v[i % P::kEach]);
}

template <int N, class T>
__device__ __forceinline__ void store(T* p, const float (&x)[N]) {
  using P = Pack<N, T>;
  P pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.part[i / P::kEach].v[i % P::kEach] = from_float<T>(x[i]);
#pragma unroll
  for (int i = 0; i < N / P::kEach; ++i) reinterpret_cast<typename P::Part*>(p)[i] = pack.part[i];
}

// May every row be read in pieces of n elements, aligned to 16 bytes or to the piece if that is smaller?
inline bool in_pieces(const Tensor& t, int64_t n) {
  const int64_t bytes = std::min<int64_t>(16, n * dtype_size(t.dtype));
  return (t.n_dim < 2 ? t.size() : t.row_size()) % n == 0 && reinterpret_cast<uintptr_t>(t.data) % static_cast<uintptr_t>(bytes) == 0 &&
         (t.n_dim < 2 || t.row_stride * dtype_size(t.dtype) % bytes == 0);
}

}  // namespace prt
