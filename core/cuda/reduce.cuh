// Sums and maxima over a warp or a block, in an order that does not change: the same input gives the same bits.
#pragma once
#include "cuda/types.cuh"

namespace prt {

constexpr unsigned kWarp = 0xffffffffu;

template <int kLanes = 32, class T>
__device__ __forceinline__ T warp_sum(T x) {  // over groups of kLanes neighbours, a power of two; every lane gets the sum
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kWarp, x, step);
  return x;
}

template <int kLanes = 32, class T>
__device__ __forceinline__ T warp_max(T x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kWarp, x, step);
    x = other > x ? other : x;
  }
  return x;
}

// Every thread gets the sum of a block of whole warps. `room`: 32 values of shared memory, free again after the next barrier.
template <class T>
__device__ __forceinline__ T block_sum(T x, T* room) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
  T total = room[0];
  for (unsigned w = 1; w < blockDim.x / 32; ++w) total += room[w];
  return total;
}

template <class T>
__device__ __forceinline__ T block_max(T x, T* room) {
  x = warp_max(x);
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
  T top = room[0];
  for (unsigned w = 1; w < blockDim.x / 32; ++w) top = room[w] > top ? room[w] : top;
  return top;
}

// log(sum(e^x)) while it is read: the sum is kept relative to the largest value so far.
struct LogSum {
  float top = -INFINITY, sum = 0;  // sum of e^(x - top)

  __device__ __forceinline__ void raise(float to) {
    if (to > top) {
      sum *= expf(top - to);  // 0 the first time: e^-inf
      top = to;
    }
  }
  __device__ __forceinline__ void add(float x) {
    raise(x);
    if (x > -INFINITY) sum += expf(x - top);
  }
  template <int N>
  __device__ __forceinline__ void add(const float (&x)[N]) {
    float most = x[0];
#pragma unroll
    for (int i = 1; i < N; ++i) most = fmaxf(most, x[i]);
    if (!(most > -INFINITY)) return;
    raise(most);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += expf(x[i] - top);
  }
};

}  // namespace prt
