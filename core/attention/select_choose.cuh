// The second launch of `select`: a cluster of blocks per (entry, kv head). A query head has one block, or several that share the counting.
#pragma once
#include "attention/select_cuda.cuh"

namespace prt::cuda::selecting {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kBins = 2048, kList = 512, kParts = 512;
constexpr int kPartRows = 8;  // a warp counts two parts at once

struct ChooseShared {
  float2 open;                      // of a query head: mass of the rows outside the index
  uint64_t order[kExact + 1];       // the first clusters of the ranking, those that are counted, and the one behind them
  int first[kExact + 1], rows[kExact + 1];
  int part_of[kExact + 1];          // first part of each
  int2 part[kParts];                // first row, rows
  float2 mass[kParts];              // of each part: (top, total)
  uint64_t list[kList];
  uint32_t weight[kList];
  union {
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

// A generic address of this block's shared memory, in another block of the cluster.
template <class X>
__device__ __forceinline__ X* in_block(X* p, int rank) {
#ifdef PRT_SM90
  asm("mapa.u64 %0, %0, %1;" : "+l"(p) : "r"(rank));
#endif
  return p;
}
// One thread's fence covers what the block wrote before the block's barrier: a fence of every thread takes several times as long.
__device__ __forceinline__ void block_arrive() {
  __syncthreads();
#ifdef PRT_SM90
  if (threadIdx.x == 0) asm volatile("fence.acq_rel.cluster;" ::: "memory");
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void block_wait() {
#ifdef PRT_SM90
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

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
  uint32_t* chosen;  // bitmap of the union; the first block's counts
  int32_t *table, *begin;
  const bool in_shared;

  __device__ Chooser(const SelectArgs& args, uint4* shared)
      : a(args), e(args, blockIdx.z), s(*reinterpret_cast<ChooseShared*>(shared)), in_shared(e.n_cluster < args.capacity) {
    chosen = reinterpret_cast<uint32_t*>(&s + 1);
    table = reinterpret_cast<int32_t*>(chosen + a.room / 32 + 1);
    begin = table + a.n_table;
  }
  static int64_t smem(const SelectArgs& a) { return sizeof(ChooseShared) + 4 * (a.room / 32 + 1 + int64_t{a.n_table} + a.capacity); }

  // Before anything that a kernel wrote is read: page numbers and the first rows of all clusters.
  __device__ void prepare() const {
    const int32_t* pages = a.page_table + entry * a.table_stride;
    for (int i = tid; i < min(a.n_table, (e.len + kPage - 1) / kPage); i += kThreads) table[i] = pages[i];
    for (int i = tid; i < (e.n_cluster + 31) / 32; i += kThreads) chosen[i] = 0;
    if (in_shared)
      for (int j = tid; j <= e.n_cluster; j += kThreads) begin[j] = j < e.n_cluster ? first_of(j) : e.end_page * kPage;
  }
  __device__ int first_of(int j) const {
    const int page = e.first_page + a.page_of_cluster(j), slot = j - a.page_of_cluster(j) * a.n_slot;
    const int64_t at = (int64_t{a.page_table[entry * a.table_stride + page]} * a.h_kv + kv_head) * a.n_slot + slot;
    return a.range[at].x + page * kPage;
  }
  __device__ int first(int j) const { return in_shared ? begin[j] : j < e.n_cluster ? first_of(j) : e.end_page * kPage; }
  __device__ int rows(int j) const { return first(j + 1) - first(j); }
  __device__ const T* key_row(int r) const {
    const int page = r / kPage < a.n_table ? table[r / kPage] : a.page_table[entry * a.table_stride + r / kPage];
    return static_cast<const T*>(a.k) + ((int64_t{page} * a.h_kv + kv_head) * kPage + r % kPage) * a.d;
  }
  __device__ const int32_t* keys(int head) const { return a.keys + a.head(entry, kv_head, head) * a.room; }
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
