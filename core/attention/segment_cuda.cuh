// A closed segment on the device: where its rows are, and how they leave their places.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/types.cuh"
#include "ops/ops.h"

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

}  // namespace prt::cuda
