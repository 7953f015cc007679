// A closed segment on the device: where its rows are, and how they leave their places.
#pragma once
#include <cuda_fp8.h>

#include "attention/sparse.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/types.cuh"

namespace prt::cuda {

constexpr int kPage = static_cast<int>(kPageTokens);

// One segment and kv head. A tile is what a page holds of one head: 64 rows, 64 order entries, n_slot clusters.
struct Segment {
  const int32_t* pages;
  int h_kv, head;
  __device__ int64_t tile(int page) const { return int64_t{pages[page]} * h_kv + head; }
  __device__ int64_t row(int row) const { return tile(row / kPage) * kPage + row % kPage; }
  __device__ int64_t slot(int cluster, int n_slot) const { return tile(cluster / n_slot) * n_slot + cluster % n_slot; }
};

// Rows as words of 16 bytes, or of 4 where they do not consist of such.
template <class F>
void with_row_word(const Tensor& k_pages, const Tensor& v_pages, F&& f) {
  const auto any = reinterpret_cast<uintptr_t>(k_pages.data) | reinterpret_cast<uintptr_t>(v_pages.data) |
                   static_cast<uintptr_t>(k_pages.shape[3] * dtype_size(k_pages.dtype));
  if (any % 16 == 0) f(uint4{});
  else f(uint32_t{});
}

// ---- What the two forms of `cluster` share: cluster_cuda.cu and cluster_any_cuda.cu.
struct ClusterArgs {
  void *k, *v;           // [n_page][h_kv][64][d_head]
  const int32_t* pages;  // [n_segment], rows of pages_stride
  __nv_fp8_storage_t *centroid, *variance, *value;
  int32_t* range;
  uint16_t* order;
  uint64_t seed;
  int64_t pages_stride;
  int32_t h_kv, n_slot, n, k_clusters, iterations;  // n: pages of a segment

  __device__ Segment segment(int segment, int head) const { return {pages + segment * pages_stride, h_kv, head}; }
};

__device__ __forceinline__ uint64_t random_at(uint64_t seed, int i) {  // number i of splitmix64
  uint64_t z = seed + 0x9e3779b97f4a7c15u * static_cast<uint64_t>(i + 1);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Draws k different rows out of n as the CPU twin does, by changing places in a deck: the place that draw j takes its row from is pick[j],
// and what lay there then follows from the draws before. The whole block; put(j, row) of each.
template <class F>
__device__ __forceinline__ void draw_rows(int* pick, int k, int n, uint64_t seed, int head, F&& put) {
  seed += 0x632be59bd9b4e019u * static_cast<uint64_t>(head);
  for (int j = threadIdx.x; j < k; j += blockDim.x) pick[j] = j + static_cast<int>(random_at(seed, j) % static_cast<uint64_t>(n - j));
  __syncthreads();
  for (int j = threadIdx.x; j < k; j += blockDim.x) {
    int at = pick[j];
    for (int m = j - 1; m >= 0; --m)
      if (pick[m] == at) at = m;
    put(j, at);
  }
}

__device__ __forceinline__ int lanes_before(unsigned mask) { return __popc(mask & ((1u << threadIdx.x % 32) - 1)); }

__device__ __forceinline__ int scan_warp(int x) {  // inclusive
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const int y = __shfl_up_sync(kWarp, x, i);
    if (static_cast<int>(threadIdx.x % 32) >= i) x += y;
  }
  return x;
}

__device__ __forceinline__ __nv_fp8_storage_t to_f8(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }

void cluster_any(const CudaStream& stream, const Cluster& a, const ClusterArgs& args);  // the plain form

}  // namespace prt::cuda
