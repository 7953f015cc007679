// Quest's bounds of blocks of keys, and the scores that they allow.
#include <algorithm>

#include "attention/log_total.cuh"
#include "cuda/vec.cuh"
#include "ops/cuda_table.h"

namespace prt::cuda {
namespace {

constexpr int kPage = static_cast<int>(kPageTokens), kBlock = static_cast<int>(kBlockRows), kBlocks = kPage / kBlock, kThreads = 256;

// A thread has kEach neighbouring dimensions of a block. Floor: the keys of the pages once, and an eighth of that written.
template <class T, int kEach>
__global__ void __launch_bounds__(kThreads)
    page_bounds_kernel(T* low, T* high, const T* k, const int32_t* pages, int64_t n, int32_t h_kv, int32_t d) {
  pdl_wait();
  pdl_launch();
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, block = i / (d / kEach);
  if (block >= n) return;
  const int64_t per_page = int64_t{h_kv} * kBlocks, of = pages[block / per_page] * per_page + block % per_page;
  const int64_t column = i % (d / kEach) * kEach;
  const T* from = k + of * kBlock * d + column;
  float x[kBlock][kEach];
#pragma unroll
  for (int r = 0; r < kBlock; ++r) load<kEach>(x[r], from + int64_t{r} * d);
  float least[kEach], most[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    least[j] = most[j] = x[0][j];
#pragma unroll
    for (int r = 1; r < kBlock; ++r) {
      if (x[r][j] < least[j]) least[j] = x[r][j];
      if (x[r][j] > most[j]) most[j] = x[r][j];
    }
  }
  store<kEach>(low + of * d + column, least);
  store<kEach>(high + of * d + column, most);
}

struct BlockArgs {
  float* scores;
  const void *q, *low, *high;
  const int32_t *page_table, *kv_len;
  int64_t room, q_stride, table_stride;
  int32_t h_kv, group, d;
  float scale;
};

// A warp has a page of a kv head, for all heads of the group: max(q low, q high) is q high where q > 0 and q low elsewhere. D 0: any.
// Floor: the bounds once, an eighth of the keys.
template <class T, int D>
__global__ void __launch_bounds__(kThreads) score_blocks_kernel(const __grid_constant__ BlockArgs a) {
  constexpr int kEach = D > 0 ? D / 32 : 1;
  const int lane = threadIdx.x % 32, entry = static_cast<int>(blockIdx.y), d = D > 0 ? D : a.d;
  const int n_warp = static_cast<int>(gridDim.x) * (kThreads / 32), warp = static_cast<int>(blockIdx.x * kThreads + threadIdx.x) / 32;
  pdl_wait();
  pdl_launch();
  const int n_page = (a.kv_len[entry] - 1) / kPage;
#pragma unroll 1
  for (int i = warp; i < n_page * a.h_kv; i += n_warp) {
    const int page = i / a.h_kv, kv_head = i % a.h_kv;
    const int64_t at = (int64_t{a.page_table[entry * a.table_stride + page]} * a.h_kv + kv_head) * kBlocks * d;
    const T *low = static_cast<const T*>(a.low) + at, *high = static_cast<const T*>(a.high) + at;
    float least[kBlocks][kEach], most[kBlocks][kEach];
    const auto read = [&](int j) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) load<kEach>(least[b], low + b * d + j), load<kEach>(most[b], high + b * d + j);
    };
    if constexpr (D > 0) read(lane * kEach);
#pragma unroll 1
    for (int head = kv_head * a.group; head < (kv_head + 1) * a.group; ++head) {
      const T* q = static_cast<const T*>(a.q) + entry * a.q_stride + int64_t{head} * d;
      float sum[kBlocks] = {};
#pragma unroll 1
      for (int j = lane * kEach; j < d; j += 32 * kEach) {
        if constexpr (D == 0) read(j);
        float y[kEach];
        load<kEach>(y, q + j);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
#pragma unroll
          for (int x = 0; x < kEach; ++x) sum[b] = fmaf(y[x], y[x] > 0 ? most[b][x] : least[b][x], sum[b]);
      }
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        sum[b] = warp_sum(sum[b]) * a.scale;
        if (lane == b) a.scores[(int64_t{entry} * a.h_kv * a.group + head) * a.room + page * kBlocks + b] = sum[b];
      }
    }
  }
}

}  // namespace

void page_bounds(const CudaStream& stream, const PageBounds& a) {
  const int64_t h_kv = a.k_pages.shape[1], d = a.k_pages.shape[3], n = a.pages.shape[0] * h_kv * kBlocks;
  with_dtype(a.k_pages.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](auto kernel, int64_t each) {
      launch(stream, kernel, dim3(static_cast<uint32_t>((n * (d / each) + kThreads - 1) / kThreads)), dim3(kThreads), 0, a.low.as<T>(),
             a.high.as<T>(), a.k_pages.as<T>(), a.pages.as<int32_t>(), n, static_cast<int32_t>(h_kv), static_cast<int32_t>(d));
    };
    const bool wide = d % 4 == 0 && in_pieces(a.k_pages, 4) && in_pieces(a.low, 4) && in_pieces(a.high, 4);
    wide ? run(page_bounds_kernel<T, 4>, 4) : run(page_bounds_kernel<T, 1>, 1);
  });
}

void score_blocks(const CudaStream& stream, const ScoreBlocks& x) {
  const int64_t d = x.low.shape[3], h_kv = x.low.shape[1], n_entry = x.q.shape[0], max_pages = x.page_table.shape[1];
  if (n_entry == 0) return;
  const BlockArgs a{x.scores.as<float>(),
                    x.q.data,
                    x.low.data,
                    x.high.data,
                    x.page_table.as<int32_t>(),
                    x.kv_len.as<int32_t>(),
                    x.scores.shape[2],
                    x.q.row_stride,
                    x.page_table.row_stride,
                    static_cast<int32_t>(h_kv),
                    static_cast<int32_t>(x.q.shape[1] / d / h_kv),
                    static_cast<int32_t>(d),
                    x.scale};
  const int64_t most = std::max<int64_t>(8 * stream.n_sm / n_entry, 1), blocks = (max_pages * h_kv + kThreads / 32 - 1) / (kThreads / 32);
  const dim3 grid(static_cast<uint32_t>(std::clamp<int64_t>(blocks, 1, most)), static_cast<uint32_t>(n_entry));
  with_dtype(x.low.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool wide = in_pieces(x.q, 4) && in_pieces(x.low, 4) && in_pieces(x.high, 4);
    launch(stream,
           wide && d == 64    ? score_blocks_kernel<T, 64>
           : wide && d == 128 ? score_blocks_kernel<T, 128>
                              : score_blocks_kernel<T, 0>,
           grid, dim3(kThreads), 0, a);
  });
  add_log_total<true>(stream, x.log_total, x.scores, x.kv_len, {});
}

}  // namespace prt::cuda
