// The second launch of `select`: a cluster of blocks per (entry, kv head). A query head has one block, or several that share the counting.
#pragma once
#include "attention/select_cuda.cuh"

namespace prt::cuda::selecting {

constexpr int kThreads = 512, kWarps = kThreads / 32, kMaxBlocks = 8;
constexpr int kBins = 2048, kParts = 512;
// The front of the ranking is sorted: the clusters of so many threads and, as far as kList goes, their others. At three times what is
// counted, heads that choose 2 % of 128K tokens need no search (docs/kernels/select.md).
constexpr int kSorted = 192, kList = 1024;

struct Counted {
  float log_mass;  // log2, exact
  int rows, cluster;
};
struct Decision {
  int n_taken;  // of the counted clusters, or of the ranking if it goes on behind them; -1: more have to be counted
  float share, want;  // want: what is missing behind the counted ones, as a share of all that is there
  float weighs;  // log2 of what the clusters behind are worth, against what is taken without them
  int want_rows;  // how many they may be
};

struct alignas(16) ChooseShared {
  alignas(16) uint32_t histogram[kBins];
  alignas(16) int top[kWarps];
  int first[kExact + 2], rows[kExact + 2];
  int first_part[kExact + 1];  // these are dealt out in parts: first row, rows; mass (top, total)
  alignas(16) int2 parts[kParts];
  float2 mass[kParts];
  alignas(16) float value[kExact];  // log2 of the mass per row of those that are counted
  Counted counted[2][kExact];  // the first kFewClusters, and all, by value
  Decision decision[2];  // with these
  float estimates[kMaxBlocks * kWarps];  // sums of the estimates behind them
  float2 open;  // of a query head: mass of the rows outside the index
  uint64_t order[kList];  // the front of the ranking; kAll behind it, up to the one behind those that are counted
  uint64_t list[kList];  // some of the clusters, in no order
  union {
    uint64_t binned[kList];
    uint32_t weight[kList];
  };
  uint64_t scan[kWarps], found[2];
  int2 sums[kWarps];
  float sum[32];
  int n_list, n_order, n_taken;  // n_order: in `order`. n_taken: of them, with `fit`
  float rest;  // sum of the estimates behind the counted ones, in units of the first one per row
};

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

// The same for two sums of 32 bits: a shorter way.
__device__ __forceinline__ int2 block_scan(int2 x, int2* room, int2& total) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int2 sum{scan_warp(x.x), scan_warp(x.y)};
  if (lane == 31) room[warp] = sum;
  __syncthreads();
  int2 all = lane < kWarps ? room[lane] : int2{0, 0};
  all = {scan_warp(all.x), scan_warp(all.y)};
  total = {__shfl_sync(kWarp, all.x, kWarps - 1), __shfl_sync(kWarp, all.y, kWarps - 1)};
  const int2 before{__shfl_sync(kWarp, all.x, max(warp - 1, 0)), __shfl_sync(kWarp, all.y, max(warp - 1, 0))};
  __syncthreads();
  return {sum.x - x.x + (warp > 0 ? before.x : 0), sum.y - x.y + (warp > 0 ? before.y : 0)};
}

// What all of it needs: where things are.
template <class T, int D>
struct Chooser {
  const SelectArgs& a;
  const int rank = blockIdx.x, blocks = gridDim.x, kv_head = blockIdx.y, entry = blockIdx.z, tid = threadIdx.x, warp = tid / 32,
            lane = tid % 32;
  const Entry e;
  ChooseShared& s;
  uint32_t* chosen;  // bitmap of the union; the first block's counts
  const int32_t* pages;  // of the entry
  const int32_t* begin;  // first rows of the clusters; one more ends the last
  const int32_t* keys;  // of a query head's clusters; behind the last kEmpty

  __device__ Chooser(const SelectArgs& args, uint4* shared) : a(args), e(args, blockIdx.z), s(*reinterpret_cast<ChooseShared*>(shared)) {
    chosen = reinterpret_cast<uint32_t*>(&s + 1);
    pages = a.in_shared ? room() : a.page_table + entry * a.table_stride;
    begin = first_rows();
  }
  // In shared memory, if there is enough: page numbers, first rows, keys.
  __device__ int32_t* room() const { return reinterpret_cast<int32_t*>(chosen + bitmap_words(a)); }
  __device__ const int32_t* first_rows() const { return a.begin + (int64_t{entry} * a.h_kv + kv_head) * (a.room + kTile); }
  __device__ const int32_t* keys_of(int head) const { return a.keys + a.head(entry, kv_head, head) * a.room; }
  __host__ __device__ static int bitmap_words(const SelectArgs& a) { return (a.room / 32 + 4) / 4 * 4; }
  static int64_t smem(const SelectArgs& a) {
    return sizeof(ChooseShared) + 4 * (bitmap_words(a) + (a.in_shared ? a.n_table + 2 * (a.room + kTile) : int64_t{0}));
  }

  // Before anything is read that a kernel wrote.
  __device__ void prepare() const {
    for (int i = tid; i < (e.n_cluster + 31) / 32; i += kThreads) chosen[i] = 0;
    if (!a.in_shared) return;
    const int32_t* table = a.page_table + entry * a.table_stride;
#pragma unroll 4
    for (int i = tid; i < (e.len + kPage - 1) / kPage; i += kThreads) room()[i] = table[i];
  }
  __device__ int first(int j) const { return begin[j]; }
  __device__ int rows(int j) const { return begin[j + 1] - begin[j]; }
  __device__ const T* key_row(int r) const {
    return static_cast<const T*>(a.k) + ((int64_t{pages[r / kPage]} * a.h_kv + kv_head) * kPage + r % kPage) * a.d;
  }
  __device__ void add(int64_t AttentionCounters::* field, int64_t x) const {
    atomicAdd(reinterpret_cast<unsigned long long*>(&(reinterpret_cast<AttentionCounters*>(a.counters)[kv_head].*field)),
              static_cast<unsigned long long>(x));
  }
  __device__ void put_share(int head, float share) const {  // one thread
    a.mass[entry * a.mass_stride + kv_head * a.group + head] = share;
    if (a.counters) add(&AttentionCounters::mass, static_cast<int64_t>(__saturatef(share) * 0x1p32f));
  }
  __device__ void mark(int j) const { atomicOr(in_block(chosen, 0) + j / 32, 1u << j % 32); }

  __device__ void take_all(int head) const {
    for (int j = tid; j - lane < e.n_cluster; j += kThreads) {
      const uint32_t bits = __ballot_sync(kWarp, j < e.n_cluster && keys_of(head)[j] != kEmpty);
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
