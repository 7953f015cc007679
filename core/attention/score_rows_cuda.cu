// Exact scores of all rows: decode attention without the values. Floor: the keys once, and 4 bytes for every row and head; one layer of
// 32 / 8 heads of 128 in bf16 at 32K rows 67 MB and 4 MB, 17 us at the 4.2 TB/s of a copy.
//
// The slices of 16 keys of all (entry, kv head, up to 8 of its query heads) stand in one line, and every warp takes a stretch of it: from
// device memory straight into the fragments of mma.sync, the next slice on its way while the scores of this one are written.
#include <algorithm>

#include "attention/log_total.cuh"
#include "ops/attention_row.cuh"
#include "ops/cuda_table.h"

namespace prt::cuda {
namespace {

constexpr int kPage = static_cast<int>(kPageTokens), kRows = 16, kHeads = 8;  // of a slice
constexpr int kWarps = 8, kBlocks = 2;                                         // of a block; of an SM

struct ScoreArgs {
  float* scores;
  const void *q, *k;
  const int32_t *page_table, *kv_len, *state;
  int64_t room, q_stride, table_stride;
  int32_t n_entry, h_kv, group, n_split, d;  // a group is cut into n_split parts of up to kHeads heads
  float scale;

  __device__ bool left_alone(int entry) const { return state && state[entry] < 0; }
  __device__ int slices(int entry) const { return left_alone(entry) ? 0 : (kv_len[entry] + kRows - 1) / kRows; }
};

// A place in the line of slices.
struct Place {
  int entry, part, slice, n;  // part: of the h_kv x n_split of an entry; n: slices that it has
  __device__ void next(const ScoreArgs& a) {
    if (++slice < n) return;
    slice = 0;
    if (++part < a.h_kv * a.n_split) return;
    part = 0;
    do n = a.slices(++entry);
    while (n == 0);
  }
};

template <class T, int D>
__global__ void __launch_bounds__(32 * kWarps, kBlocks) score_rows_kernel(const __grid_constant__ ScoreArgs a) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4, parts = a.h_kv * a.n_split;
  pdl_wait();
  pdl_launch();
  int64_t total = 0;
  for (int e = 0; e < a.n_entry; ++e) total += a.slices(e);
  total *= parts;
  const int64_t n_warp = int64_t{gridDim.x} * kWarps, me = int64_t{blockIdx.x} * kWarps + warp;
  int64_t at = total * me / n_warp;
  const int64_t end = total * (me + 1) / n_warp;
  if (at >= end) return;
  Place here{0, 0, 0, a.slices(0)};
  int64_t first = 0;
  for (; first + int64_t{here.n} * parts <= at; here.n = a.slices(++here.entry)) first += int64_t{here.n} * parts;
  here.part = static_cast<int>((at - first) / here.n), here.slice = static_cast<int>((at - first) % here.n);

  Place ahead = here;  // the slice to be loaded next; its page is asked for one slice earlier
  int64_t to_load = at;
  int page = a.page_table[ahead.entry * a.table_stride + ahead.slice * kRows / kPage];
  uint32_t k[2][D / 8], q[D / 8];
  const auto fetch = [&] {
    const int row = ahead.part / a.n_split * kPage + ahead.slice * kRows % kPage + g;
    const T* from = static_cast<const T*>(a.k) + (int64_t{page} * a.h_kv * kPage + row) * D;
    load_row<T, D>(k[0], from, c);
    load_row<T, D>(k[1], from + 8 * D, c);
    if (++to_load >= end) return;
    ahead.next(a);
    page = a.page_table[ahead.entry * a.table_stride + ahead.slice * kRows / kPage];
  };
  fetch();

  int part = -1, entry = -1, heads = 0, len = 0;
  float* to = nullptr;
  for (;;) {
    if (here.part != part || here.entry != entry) {
      part = here.part, entry = here.entry, len = a.kv_len[entry];
      const int head0 = part % a.n_split * kHeads, head = part / a.n_split * a.group + head0;
      heads = min(kHeads, a.group - head0);
      to = a.scores + (int64_t{entry} * a.h_kv * a.group + head) * a.room;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) q[i] = 0;
      if (g < heads) load_row<T, D>(q, static_cast<const T*>(a.q) + entry * a.q_stride + int64_t{head + g} * D, c);
    }
    float s[4] = {};
#pragma unroll
    for (int i = 0; i < D / 16; ++i) mma_16816<T>(s, {k[0][2 * i], k[1][2 * i], k[0][2 * i + 1], k[1][2 * i + 1]}, q[2 * i], q[2 * i + 1]);
    if (to_load < end) fetch();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int head = 2 * c + i % 2, row = here.slice * kRows + i / 2 * 8 + g;
      if (head < heads && row < len) to[head * a.room + row] = s[i] * a.scale;
    }
    if (++at >= end) break;
    here.next(a);
  }
}

// Every dtype and d_head, written to read like the formula: a block per (page, kv head, entry), a thread per row and head.
constexpr int kThreads = 128;
template <class T>
__global__ void __launch_bounds__(kThreads) score_rows_any_kernel(const __grid_constant__ ScoreArgs a) {
  const int page = static_cast<int>(blockIdx.x), kv_head = static_cast<int>(blockIdx.y), entry = static_cast<int>(blockIdx.z);
  pdl_wait();
  pdl_launch();
  const int len = a.kv_len[entry];
  if (a.left_alone(entry) || page * kPage >= len) return;
  const T* k = static_cast<const T*>(a.k) + (int64_t{a.page_table[entry * a.table_stride + page]} * a.h_kv + kv_head) * kPage * a.d;
  for (int i = static_cast<int>(threadIdx.x); i < kPage * a.group; i += kThreads) {
    const int row = i % kPage, head = kv_head * a.group + i / kPage;
    if (page * kPage + row >= len) continue;
    const T *q = static_cast<const T*>(a.q) + entry * a.q_stride + int64_t{head} * a.d, *key = k + row * a.d;
    float sum = 0;
    for (int j = 0; j < a.d; ++j) sum = fmaf(to_float(q[j]), to_float(key[j]), sum);
    a.scores[(int64_t{entry} * a.h_kv * a.group + head) * a.room + page * kPage + row] = sum * a.scale;
  }
}

template <class T, int D>
void run(const CudaStream& stream, const ScoreArgs& a) {
  prefer_l1(score_rows_kernel<T, D>);
  launch(stream, score_rows_kernel<T, D>, dim3(static_cast<uint32_t>(kBlocks * stream.n_sm)), dim3(32 * kWarps), 0, a);
}
template <class T>
void run(const CudaStream& stream, const ScoreArgs& a) {
  switch (a.d) {
    case 64: return run<T, 64>(stream, a);
    case 80: return run<T, 80>(stream, a);
    case 96: return run<T, 96>(stream, a);
    case 128: return run<T, 128>(stream, a);
    case 256: return run<T, 256>(stream, a);
  }
}

}  // namespace

void score_rows(const CudaStream& stream, const ScoreRows& x) {
  const int64_t d = x.k_pages.shape[3], h_kv = x.k_pages.shape[1], group = x.q.shape[1] / d / h_kv, n_entry = x.q.shape[0];
  if (n_entry == 0) return;
  const DType type = x.k_pages.dtype;
  const ScoreArgs a{x.scores.as<float>(),
                    x.q.data,
                    x.k_pages.data,
                    x.page_table.as<int32_t>(),
                    x.kv_len.as<int32_t>(),
                    x.state.as<int32_t>(),
                    x.scores.shape[2],
                    x.q.row_stride,
                    x.page_table.row_stride,
                    static_cast<int32_t>(n_entry),
                    static_cast<int32_t>(h_kv),
                    static_cast<int32_t>(group),
                    static_cast<int32_t>((group + kHeads - 1) / kHeads),
                    static_cast<int32_t>(d),
                    x.scale};
  const auto aligned = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.row_stride % 8 == 0; };
  const bool fast = type != DType::f32 && (d == 64 || d == 80 || d == 96 || d == 128 || d == 256) && aligned(x.q) && aligned(x.k_pages);
  if (!fast)
    with_dtype(type, [&](auto zero) {
      launch(stream, score_rows_any_kernel<decltype(zero)>,
             dim3(static_cast<uint32_t>(x.page_table.shape[1]), static_cast<uint32_t>(h_kv), static_cast<uint32_t>(n_entry)),
             dim3(kThreads), 0, a);
    });
  else if (type == DType::bf16) run<bf16>(stream, a);
  else run<f16>(stream, a);
  add_log_total<false>(stream, x.log_total, x.scores, x.kv_len, x.state);
}

}  // namespace prt::cuda
