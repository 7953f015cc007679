// Rows go back to where they were: out of the pages into scratch, as many heads at a time as it holds, and from there to their places.
#include <algorithm>

#include "attention/segment_cuda.cuh"
#include "ops/cuda_table.h"

namespace prt::cuda {
namespace {

constexpr int kThreads = 256;

struct UnclusterArgs {
  void *k, *v;
  const uint16_t* order;
  const int32_t *src, *dst;
  void* copy;  // [jobs of this launch][n src rows]
  int32_t h_kv, n, m, words;  // words: of a row
  int32_t job0;               // K of head 0, V of head 0, K of head 1, ...
};

// Block (page of src, job).
template <class Word, bool kBack>
__global__ void __launch_bounds__(kThreads) uncluster_kernel(const __grid_constant__ UnclusterArgs a) {
  pdl_wait();
  pdl_launch();
  const int page = static_cast<int>(blockIdx.x), job = a.job0 + static_cast<int>(blockIdx.y), tile_words = kPage * a.words;
  const Segment src{a.src, a.h_kv, job / 2}, dst{a.dst, a.h_kv, job / 2};
  Word* pages = static_cast<Word*>(job % 2 ? a.v : a.k);
  Word* copy = static_cast<Word*>(a.copy) + (int64_t{blockIdx.y} * a.n + page) * tile_words;
  for (int i = threadIdx.x; i < tile_words; i += kThreads) {
    if constexpr (!kBack) copy[i] = pages[src.tile(page) * tile_words + i];
    else {
      const int was = a.order[src.tile(page) * kPage + i / a.words];
      if (was < a.m * kPage) pages[dst.row(was) * a.words + i % a.words] = copy[i];
    }
  }
}

}  // namespace

void uncluster(const CudaStream& stream, const Uncluster& a) {
  const int64_t h_kv = a.k_pages.shape[1], n = a.src.shape[0], row_bytes = a.k_pages.shape[3] * dtype_size(a.k_pages.dtype);
  if (n == 0 || a.dst.shape[0] == 0) return;
  const int64_t n_job = 2 * h_kv, at_once = std::min(n_job, a.scratch.bytes() / (n * kPage * row_bytes));
  with_row_word(a.k_pages, a.v_pages, [&](auto word) {
    using Word = decltype(word);
    for (int64_t job = 0; job < n_job; job += at_once) {
      const UnclusterArgs args{a.k_pages.data,
                               a.v_pages.data,
                               a.order.as<uint16_t>(),
                               a.src.as<int32_t>(),
                               a.dst.as<int32_t>(),
                               a.scratch.data,
                               static_cast<int32_t>(h_kv),
                               static_cast<int32_t>(n),
                               static_cast<int32_t>(a.dst.shape[0]),
                               static_cast<int32_t>(row_bytes / static_cast<int64_t>(sizeof(Word))),
                               static_cast<int32_t>(job)};
      const dim3 grid(static_cast<uint32_t>(n), static_cast<uint32_t>(std::min(at_once, n_job - job)));
      launch(stream, uncluster_kernel<Word, false>, grid, dim3(kThreads), 0, args);
      launch(stream, uncluster_kernel<Word, true>, grid, dim3(kThreads), 0, args);
    }
  });
}

}  // namespace prt::cuda
