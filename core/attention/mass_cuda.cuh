// The share of the exact mass that ranges of rows hold, and how it is counted: shared by the CUDA twins of `select` and `count_rows`.
#pragma once
#include "attention/select_cuda.cuh"

namespace prt::cuda::selecting {

// The keys of one entry and kv head.
template <class T>
struct HeadKeys {
  const T* k_pages;
  const int32_t* pages;
  int h_kv, kv_head, d;
  __device__ const T* row(int r) const { return k_pages + ((int64_t{pages[r / kPage]} * h_kv + kv_head) * kPage + r % kPage) * d; }
};

// By a block of W warps, for one query head; its first thread gets the share. scale: times log2(e).
template <int W, class T, int D>
__device__ float held_share(const RowScorer<T, D>& q, const HeadKeys<T>& keys, int len, const int2* range, int n_range, float scale,
                            float2 (&room)[2][W]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto add = [&](Mass& mass, int first, int n) {
    for (int r = lane / 4; r - lane / 4 < n; r += kTile) {
      float s0, s1;
      q.score(keys.row(first + min(r, n - 1)), keys.row(first + min(r + 8, n - 1)), s0, s1);
      if (r < n) mass.add({s0 * scale, 1});
      if (r + 8 < n) mass.add({s1 * scale, 1});
    }
  };
  Mass mass[2];  // of all rows, of those in ranges
  for (int r = warp * kPage; r < len; r += W * kPage) add(mass[0], r, min(kPage, len - r));
  for (int i = warp; i < n_range; i += W) add(mass[1], range[i].x, range[i].y - (i > 0 ? range[i - 1].y : 0));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Mass m = warp_mass<4>(mass[i]);
    if (lane == 0) room[i][warp] = {m.top, m.total};
  }
  __syncthreads();
  Mass all, held;
  for (int w = 0; w < W; ++w) all.add({room[0][w].x, room[0][w].y}), held.add({room[1][w].x, room[1][w].y});
  return all.total > 0 ? fminf(held.under(all.top) / all.total, 1) : 1;
}

// counters: of the kv head.
__device__ __forceinline__ void count_true(unsigned long long* counters, float share, float p) {
  atomicAdd(counters + offsetof(AttentionCounters, n_true) / 8, 1ull);
  atomicAdd(counters + offsetof(AttentionCounters, true_mass) / 8, static_cast<unsigned long long>(share * 0x1p32f));
  if (share >= p) atomicAdd(counters + offsetof(AttentionCounters, n_reached) / 8, 1ull);
  atomicAdd(counters + offsetof(AttentionCounters, histogram) / 8 + min(static_cast<int>(share * PRT_MASS_BINS), PRT_MASS_BINS - 1), 1ull);
}

}  // namespace prt::cuda::selecting
