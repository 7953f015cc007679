// What the kernels of `select` share. Two launches: select_score.cuh gives every cluster a key, by the whole GPU; then a cluster of blocks
// per (entry, kv head) chooses (select_moment.cuh, select_fit.cuh) and writes the ranges (select_ranges.cuh).
#pragma once
#include <climits>

#include "attention/sparse.h"
#include "cuda/hopper.cuh"
#include "cuda/mma.cuh"
#include "cuda/reduce.cuh"

namespace prt::cuda::selecting {

constexpr int kPage = static_cast<int>(kPageTokens);
constexpr int kExact = static_cast<int>(kExactClusters);
constexpr int kTile = 16;  // clusters, or rows, that a warp scores at once
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f, kNegInf = -__builtin_inff();

// Clusters are sorted by a key, the log2 of the estimated mass per row in units of 2^-16, and then by number. Both make one number, the
// lower the earlier.
constexpr int kEmpty = INT_MIN;  // key of a cluster without rows
constexpr int kNumberBits = 22;
constexpr uint64_t kAll = ~0ull;
__device__ __forceinline__ uint64_t order_of(int key, int number) {
  return static_cast<uint64_t>(static_cast<uint32_t>(INT_MAX) - static_cast<uint32_t>(key)) << kNumberBits | static_cast<uint32_t>(number);
}
__device__ __forceinline__ int number_of(uint64_t order) { return static_cast<int>(order & ((1u << kNumberBits) - 1)); }
__device__ __forceinline__ int key_of(uint64_t order) {
  return static_cast<int>(static_cast<uint32_t>(INT_MAX) - static_cast<uint32_t>(order >> kNumberBits));
}

struct SelectArgs {
  int2* ranges;  // [n_entry][h_kv][max_range]
  int32_t* n_range;
  float *tail, *mass, *true_mass;
  unsigned long long* counters;
  const void *q, *k;
  const int32_t *page_table, *kv_len, *closed, *state;  // state: or null
  int32_t* made;
  const uint8_t *centroid, *variance;
  const int2* range;
  uint64_t* sorted;    // [n_entry][h_q][room], with sorted_mass for `fit`
  float2* open;        // [n_entry][h_q][n_unit]: mass of the rows outside the index, (top, total)
  int32_t* keys;       // [n_entry][h_q][room]
  float* sorted_mass;  // [n_entry][h_q][room]
  int32_t* begin;      // [n_entry][h_kv][room + 16]: first rows of the clusters; one more ends the last
  int64_t q_stride, table_stride, closed_stride, ranges_stride, n_range_stride, tail_stride, tail_row, mass_stride, true_stride, max_range;
  int32_t n_entry, h_kv, group, d, n_slot, least;  // least: clusters of a head, with p
  int32_t room;       // clusters that an entry may have, rounded up to a tile
  int32_t n_unit;     // warps of a kv head in the first launch
  int32_t n_table;    // pages, rounded up to 4
  uint32_t per_slot;  // 2^31 / n_slot, and 1
  float scale, p, budget;
  float aim, log_odds;  // `moment`: aimed_share(p); log2(aim / (1 - aim))
  int32_t log_share;   // blocks of a query head in the second launch
  bool fit, searched, in_shared;  // in_shared: page numbers, first rows and keys fit into a block's shared memory

  __device__ int64_t head(int entry, int kv_head, int head) const { return (int64_t{entry} * h_kv + kv_head) * group + head; }
  template <class T>
  __device__ const T* query(int entry, int kv_head, int head) const {
    return static_cast<const T*>(q) + entry * q_stride + (int64_t{kv_head} * group + head) * d;
  }
  // Where the entry's choice goes; -1: it is left alone. After pdl_wait().
  __device__ int place(int entry) const { return state ? state[entry] : entry; }
  __device__ float* tail_of(int place, int kv_head, int head) const {
    return tail + place * tail_stride + (int64_t{kv_head} * group + head) * tail_row;
  }
  __device__ int page_of_cluster(int j) const { return static_cast<int>(static_cast<uint64_t>(j) * per_slot >> 31); }
};

// What an entry holds; nothing, if it is left alone.
struct Entry {
  int len, first_page, end_page, n_cluster;
  Entry() = default;
  __device__ Entry(const SelectArgs& a, int entry) {
    if (a.place(entry) < 0) {
      len = first_page = end_page = n_cluster = 0;
      return;
    }
    len = a.kv_len[entry];
    first_page = a.closed[entry * a.closed_stride];
    end_page = a.closed[entry * a.closed_stride + 1];
    n_cluster = (end_page - first_page) * a.n_slot;
  }
  // The rows outside closed segments, in tiles that do not cross a page.
  __device__ int open_tiles() const { return first_page * (kPage / kTile) + (len - end_page * kPage + kTile - 1) / kTile; }
  __device__ int open_row(int tile) const {
    const int front = first_page * (kPage / kTile);
    return tile < front ? tile * kTile : end_page * kPage + (tile - front) * kTile;
  }
};

__device__ __forceinline__ float pow2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ int scan_warp(int x) {  // inclusive
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kWarp, x, step);
    if (static_cast<int>(threadIdx.x % 32) >= step) x += other;
  }
  return x;
}

// sum of 2^(score - top) over some keys
struct Mass {
  float top = kNegInf, total = 0;
  __device__ __forceinline__ float under(float other) const { return total > 0 ? total * pow2(top - other) : 0; }
  __device__ __forceinline__ void add(const Mass& m) {
    const float most = fmaxf(top, m.top);
    total = under(most) + m.under(most);
    top = most;
  }
};
template <int kFrom>  // over the lanes that differ in bits kFrom and up
__device__ __forceinline__ Mass warp_mass(Mass m) {
  float top = m.top;
#pragma unroll
  for (int step = kFrom; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(kWarp, top, step));
  float total = m.under(top);
#pragma unroll
  for (int step = kFrom; step < 32; step *= 2) total += __shfl_xor_sync(kWarp, total, step);
  return {top, total};
}

// Scores of rows against one query head: of a row for each g = lane / 4, twice. Every lane of a row gets them.
template <class T, int D>
struct RowScorer {
  const T* query;
  int d;
  uint4 q[D > 0 ? D / 32 : 1];

  __device__ RowScorer(const T* q_row, int n) : query(q_row), d(n) {
    if constexpr (D > 0)
#pragma unroll
      for (int x = 0; x < D / 32; ++x) q[x] = *reinterpret_cast<const uint4*>(q_row + 32 * x + 8 * (threadIdx.x % 4));
  }
  struct Rows {  // on their way
    uint4 k[2][D > 0 ? D / 32 : 1];
    const T* row[2];
  };
  __device__ void load(Rows& rows, const T* row0, const T* row1) const {
    rows.row[0] = row0, rows.row[1] = row1;
    if constexpr (D > 0)
#pragma unroll
      for (int x = 0; x < D / 32; ++x)
#pragma unroll
        for (int i = 0; i < 2; ++i) rows.k[i][x] = load_once_16(rows.row[i] + 32 * x + 8 * (threadIdx.x % 4));
  }
  __device__ void score(const Rows& rows, float& s0, float& s1) const {
    if constexpr (D > 0) {
      float acc[4] = {};
#pragma unroll
      for (int x = 0; x < D / 32; ++x) {
        const uint4 k0 = rows.k[0][x], k1 = rows.k[1][x];
        mma_16816<T>(acc, {k0.x, k1.x, k0.y, k1.y}, q[x].x, q[x].y);
        mma_16816<T>(acc, {k0.z, k1.z, k0.w, k1.w}, q[x].z, q[x].w);
      }
      s0 = acc[0], s1 = acc[2];
    } else {
      s0 = s1 = 0;
      for (int i = threadIdx.x % 4; i < d; i += 4) {
        const float y = to_float(query[i]);
        s0 = fmaf(y, to_float(rows.row[0][i]), s0), s1 = fmaf(y, to_float(rows.row[1][i]), s1);
      }
      s0 = warp_sum<4>(s0), s1 = warp_sum<4>(s1);
    }
  }
  __device__ void score(const T* row0, const T* row1, float& s0, float& s1) const {
    Rows rows;
    load(rows, row0, row1);
    score(rows, s0, s1);
  }
};

}  // namespace prt::cuda::selecting
