// The second launch of `select`: a cluster of blocks per (entry, kv head). A query head has one block, or several that share the counting.
#pragma once
#include "attention/select_cuda.cuh"

namespace prt::cuda::selecting {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kBins = 2048, kList = 512, kParts = 512;
constexpr int kPartRows = 8;  // a warp counts two parts at once

struct alignas(16) ChooseShared {
  float2 open;                      // of a query head: mass of the rows outside the index
  uint64_t order[kExact + 1];       // the first clusters of the ranking, those that are counted, and the one behind them
  int first[kExact + 1], rows[kExact + 1];
  int part_of[kExact + 1];          // first part of each
  int2 part[kParts];                // first row, rows
  float2 mass[kParts];              // of each part: (top, total)
  uint64_t list[kList];
  uint32_t weight[kList];
  union alignas(16) {
    uint32_t histogram[kBins];
    int chosen[kBins];
  };
  uint64_t scan[kWarps];
  int top[kWarps];
  float sum[32];
  int n_part, n_list;
  int n_taken, upto;    // of the counted clusters
  uint64_t found[2];
  float share, want;  // want: what is missing behind the counted ones, in rows or as a share of all that is there
  float weighs;             // log2 of what the clusters behind are worth, against what is taken without them
};

__device__ __forceinline__ int scan_warp(int x) {  // inclusive
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kWarp, x, step);
    if (static_cast<int>(threadIdx.x % 32) >= step) x += other;
  }
  return x;
}
// -> the sum over the threads before this one, and over all
__device__ __forceinline__ uint64_t block_scan(uint64_t x, uint64_t* room, uint64_t& total) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint64_t sum = x, before = 0;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t other = __shfl_up_sync(kWarp, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) room[warp] = sum;
  __syncthreads();
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp ? room[w] : 0;
    total += room[w];
  }
  __syncthreads();
  return before + sum - x;
}

// What all of it needs: where things are.
template <class T, int D>
struct Chooser {
  const SelectArgs& a;
  const int rank = blockIdx.x, blocks = gridDim.x, kv_head = blockIdx.y, entry = blockIdx.z, tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const Entry e;
  ChooseShared& s;
  uint32_t* chosen;      // bitmap of the union; the first block's counts
  const int32_t* pages;  // of the entry
  int32_t* begin;        // first rows of the clusters; one more ends the last
  int32_t* key;          // room for a query head's keys
  const bool in_shared;  // these three, or else in device memory

  __device__ Chooser(const SelectArgs& args, uint4* shared)
      : a(args), e(args, blockIdx.z), s(*reinterpret_cast<ChooseShared*>(shared)), in_shared(a.in_shared) {
    chosen = reinterpret_cast<uint32_t*>(&s + 1);
    int32_t* room = reinterpret_cast<int32_t*>(chosen + bitmap_words(a));
    pages = in_shared ? room : a.page_table + entry * a.table_stride;
    begin = in_shared ? room + a.n_table : a.begin + (int64_t{entry} * a.h_kv + kv_head) * (a.room + kTile);
    key = in_shared ? begin + a.room + kTile : nullptr;
  }
  __host__ __device__ static int bitmap_words(const SelectArgs& a) { return (a.room / 32 + 4) / 4 * 4; }
  static int64_t smem(const SelectArgs& a) {
    return sizeof(ChooseShared) + 4 * (bitmap_words(a) + (a.in_shared ? a.n_table + 2 * (a.room + kTile) : int64_t{0}));
  }

  // Page numbers and the first rows of all clusters. In shared memory: before anything that a kernel wrote is read.
  __device__ void prepare(bool waited) const {
    const int32_t* table = a.page_table + entry * a.table_stride;
    if (!waited)
      for (int i = tid; i < (e.n_cluster + 31) / 32; i += kThreads) chosen[i] = 0;
    if (waited == in_shared) return;
    if (in_shared)
      for (int i = tid; i < (e.len + kPage - 1) / kPage; i += kThreads) const_cast<int32_t*>(pages)[i] = table[i];
#pragma unroll 4
    for (int j = tid; j < e.n_cluster; j += kThreads) {
      const int at = a.page_of_cluster(j), page = e.first_page + at;
      begin[j] = a.range[(int64_t{table[page]} * a.h_kv + kv_head) * a.n_slot + (j - at * a.n_slot)].x + page * kPage;
    }
    if (tid == 0) begin[e.n_cluster] = e.end_page * kPage;
  }
  __device__ int first(int j) const { return begin[j]; }
  __device__ int rows(int j) const { return begin[j + 1] - begin[j]; }
  __device__ const T* key_row(int r) const {
    return static_cast<const T*>(a.k) + ((int64_t{pages[r / kPage]} * a.h_kv + kv_head) * kPage + r % kPage) * a.d;
  }
  __device__ const int32_t* keys_of(int head) const { return a.keys + a.head(entry, kv_head, head) * a.room; }
  __device__ void add(int64_t AttentionCounters::* field, int64_t x) const {
    atomicAdd(reinterpret_cast<unsigned long long*>(&(reinterpret_cast<AttentionCounters*>(a.counters)[kv_head].*field)),
              static_cast<unsigned long long>(x));
  }
  __device__ void put_share(int head, float share) const {  // one thread
    a.mass[entry * a.mass_stride + kv_head * a.group + head] = share;
    if (a.counters) add(&AttentionCounters::mass, static_cast<int64_t>(share * 0x1p32f));
  }
  __device__ void mark(int j) const { atomicOr(in_block(chosen, 0) + j / 32, 1u << j % 32); }

  __device__ void take_all(int head) const {
    for (int j = tid; j - lane < e.n_cluster; j += kThreads) {
      const uint32_t bits = __ballot_sync(kWarp, j < e.n_cluster && rows(j) > 0);
      if (lane == 0) atomicOr(in_block(chosen, 0) + j / 32, bits);
    }
    if (tid == 0) put_share(head, 1);
  }

  // The mass of the rows outside the index, by one warp.
  __device__ Mass open_mass(int head) const {
    const float2* from = a.open + a.head(entry, kv_head, head) * a.n_unit;
    Mass m;
    for (int i = lane; i < min(a.n_unit, e.open_tiles()); i += 32) m.add({from[i].x, from[i].y});
    return warp_mass<1>(m);
  }
};

}  // namespace prt::cuda::selecting
