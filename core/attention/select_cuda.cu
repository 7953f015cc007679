// Which rows each kv head attends to: one launch, one cluster of blocks per (entry, kv head), nothing decided on the host.
//
//   score   every block takes a slice of the head's clusters, 16 at a time by each warp: centroid.q and variance.q^2 for all query heads
//           of the group, f8 -> f16 -> tensor cores, straight from device memory. The keys of the ranking go to the query head's own
//           block, through distributed shared memory. The exact mass of the rows outside the index, spread over all warps.
//   rank    the query head's block finds the first kExactClusters of its ranking and deals their rows out as parts
//   count   all blocks: the exact mass of those parts
//   decide  the query head's block goes through the counted clusters, and past them by estimates, to the end of its choice, and marks
//           its clusters in the bitmap of the first block
//   write   the first block turns the bitmap into ranges
//
// A stage ends with a barrier of the cluster, four in all. What a query head needs to decide lies in one block, so that the searches
// only cost barriers of a block. Keys are integers, and so are sums of estimates: no result depends on an order.
//
// docs/kernels/select.md has the measurements, and what lost.
#include <algorithm>
#include <climits>

#include "attention/sparse.h"
#include "cuda/hopper.cuh"
#include "cuda/mma.cuh"
#include "cuda/reduce.cuh"
#include "ops/cuda_table.h"

namespace prt::cuda {
namespace {

constexpr int kPage = static_cast<int>(kPageTokens);
constexpr int kExact = static_cast<int>(kExactClusters);
constexpr int kParts = 2 * kExact;  // pieces of a query head's exactly counted rows
constexpr int kStep = 16;           // rows that a warp takes at once
constexpr int kMaxBlocks = 16;      // of a cluster
constexpr int kBins = 2048, kList = 512;
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f, kNegInf = -__builtin_inff();

// Clusters are sorted by a key, the log2 of the estimated mass per row in units of 2^-16, and then by number. Both make one number, the
// lower the earlier: (top key - key) << kNumberBits | number.
constexpr int kEmpty = INT_MIN;  // key of a cluster without rows
constexpr int kNumberBits = 22;
constexpr uint64_t kAll = ~0ull;
__device__ __forceinline__ uint64_t order_of(int key, int top, int number) {
  return static_cast<uint64_t>(static_cast<uint32_t>(top) - static_cast<uint32_t>(key)) << kNumberBits | static_cast<uint32_t>(number);
}
__device__ __forceinline__ int number_of(uint64_t order) { return static_cast<int>(order & ((1u << kNumberBits) - 1)); }
__device__ __forceinline__ float below_top(uint64_t order) {
  return static_cast<float>(static_cast<uint32_t>(order >> kNumberBits)) * 0x1p-16f;
}

__device__ __forceinline__ float pow2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Floats as integers of the same order.
__device__ __forceinline__ int ordered(float x) {
  const int i = __float_as_int(x);
  return i < 0 ? i ^ INT_MAX : i;
}
__device__ __forceinline__ float from_ordered(int i) { return __int_as_float(i < 0 ? i ^ INT_MAX : i); }

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

// Rows to be counted for a head (or for all of the group: -1); where the sum goes.
struct Part {
  int row, n, head, to;
};

// What a query head's own block knows of it.
struct Head {
  int top_key;          // of all clusters; collected by atomics
  int top_mass;         // log2 of the largest estimated mass, ordered()
  int n_exact;          // candidates
  int n_head, sample[2][2];         // of `fit`: the head of the curve, and the samples, as positions in the sorted list
  float sampled[2];
  uint64_t exact[kExact];           // the clusters that are counted exactly, in order
  int part_of[kExact + 1];          // first part of each
  float2 part[kParts];              // (top, total) of each part
};

// Shared memory of a block: where what lies, in bytes from its start.
struct Layout {
  int32_t mean_q, square_q, key_q;  // uint2 [blocks of 8 heads][k16 steps][32]: B operands
  int32_t plain_q;                  // float [group][d]
  int32_t scale_q;                  // float2 [group]: what a product with mean_q, square_q is to be multiplied by
  int32_t pages;                    // i32 [n_table]
  int32_t parts;                    // Part [kParts / blocks][group]
  int32_t warp_mass;                // float2 [3][group][warps]: rows outside the index, of ranges; estimates of all clusters
  int32_t mass;                     // float2 [3][group][kMaxBlocks]: of all blocks
  int32_t tops;                     // int2 [group]: of this block's clusters, top_key and top_mass
  int32_t heads;                    // Head [group / blocks]
  int32_t histogram;                // u32 [2][kBins]: of 32-bit weights, each half summed up in 32 bits
  int32_t list, weights;            // u64, u32 [kList]
  int32_t room;                     // u64 [64]: for sums over the block, and what it tells itself
  int32_t chosen;                   // u32 [room / 32]: bitmap
  int32_t begin;                    // i32 [capacity]: first row of each cluster; one more ends the last
  int32_t keys;                     // i32 [group / blocks][capacity]
  int32_t bytes;
};

struct SelectArgs {
  int2* ranges;  // [n_entry][h_kv][max_range]
  int32_t* n_range;
  float *tail, *mass, *true_mass;
  unsigned long long* counters;
  const void *q, *k;
  const int32_t *page_table, *kv_len, *closed;
  const uint8_t *centroid, *variance;
  const int2* range;
  char* scratch;
  int64_t q_stride, table_stride, closed_stride, ranges_stride, n_range_stride, tail_stride, mass_stride, true_stride, max_range, tail_row;
  int32_t h_kv, group, d, n_slot;
  int32_t room;        // clusters that an entry may have, and one more, rounded up to 4
  int32_t capacity;    // of them, how many fit into shared memory; an entry with more uses scratch
  int32_t n_table;     // pages whose numbers fit into shared memory
  int32_t log_blocks;  // blocks of a cluster
  uint32_t per_slot;   // 2^31 / n_slot, and 1
  float scale, p, fraction;
  bool fit;
  Layout at;
};

// ---- the cluster. A generic address of this block's shared memory, in another block.
template <class T>
__device__ __forceinline__ T* in_block(T* p, int rank) {
#ifdef PRT_SM90
  asm("mapa.u64 %0, %0, %1;" : "+l"(p) : "r"(rank));
#endif
  return p;
}
// One thread's fence covers what the block wrote before the block's barrier: a fence of every thread takes several times as long.
__device__ __forceinline__ void cluster_arrive() {
  __syncthreads();
#ifdef PRT_SM90
  if (threadIdx.x == 0) asm volatile("fence.acq_rel.cluster;" ::: "memory");
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#ifdef PRT_SM90
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Two f8 (e4m3) to two f16: exact.
__device__ __forceinline__ uint32_t f8_to_f16(uint32_t x) {
  uint32_t y;
#if __CUDA_ARCH__ >= 890
  asm("{\n.reg .b16 h;\ncvt.u16.u32 h, %1;\ncvt.rn.f16x2.e4m3x2 %0, h;\n}" : "=r"(y) : "r"(x));
#else  // exponents are 8 apart
  x = (x & 0xff) | (x & 0xff00) << 8;
  y = (x & 0x00800080) << 8 | (x & 0x007f007f) << 7;
  asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(y) : "r"(0x5c005c00));
#endif
  return y;
}

// 16 f8 of a row, from dimension i on; what is past its end is 0.
__device__ __forceinline__ uint4 load_f8(const uint8_t* row, int i, int d) {
  uint4 x{0, 0, 0, 0};
  if (d % 16 == 0) return i < d ? load_once_16(row + i) : x;
  uint32_t* word = &x.x;
#pragma unroll
  for (int n = 0; n < 16; ++n)
    if (i + n < d) word[n / 4] |= static_cast<uint32_t>(row[i + n]) << n % 4 * 8;
  return x;
}

// -> the sum over the threads before this one. room: [kThreads / 32]
template <int kThreads>
__device__ __noinline__ uint64_t block_scan(uint64_t x, uint64_t* room) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint64_t sum = x;
#pragma unroll 1
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t other = __shfl_up_sync(kWarp, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) room[warp] = sum;
  __syncthreads();
  uint64_t before = 0;
#pragma unroll 4
  for (int w = 0; w < kThreads / 32; ++w) before += w < warp ? room[w] : 0;
  __syncthreads();
  return before + sum - x;
}
template <int kThreads>
__device__ uint64_t block_total(const uint64_t* room) {  // of the last block_scan
  uint64_t total = 0;
#pragma unroll 4
  for (int w = 0; w < kThreads / 32; ++w) total += room[w];
  return total;
}

// The clusters of a query head as its block sees them.
struct Ranking {
  const int32_t *keys, *begin;
  int n_cluster, top;
  float unit;  // a cluster of n rows at the top of the ranking is estimated at n 2^unit; the largest estimate is 2^32

  __device__ int rows(int j) const { return begin[j + 1] - begin[j]; }
  __device__ uint32_t estimate(uint64_t order, int n) const {
    return __float2uint_rn(static_cast<float>(n) * pow2(unit - below_top(order)));
  }
};
enum class Weight { one, rows, estimate };
struct Finder {
  uint32_t* histogram;  // [2][kBins]
  uint64_t* list;
  uint32_t* weights;
  uint64_t* room;
};

// The shortest stretch of the ranking from `from` on whose weights reach `want`, or all there is: -> its end; room[35]: what it reaches.
template <int kThreads>
__device__ __noinline__ uint64_t find_cut(Ranking r, Finder f, uint64_t from, uint64_t want, Weight kind) {
  const int tid = threadIdx.x;
  const auto weight = [&](int j, uint64_t x) {
    if (kind == Weight::one) return 1u;
    const int n = r.rows(j);
    return kind == Weight::rows ? static_cast<uint32_t>(n) : r.estimate(x, n);
  };
  int* listed = reinterpret_cast<int*>(f.room + 36);
  uint64_t start = 0, base = 0, until = kAll;
#pragma unroll 1
  for (int shift = kNumberBits + 10;; shift = max(shift - 11, 0)) {  // bins of 2^-6 first, the last of them open
#pragma unroll 1
    for (int i = tid; i < 2 * kBins; i += kThreads) f.histogram[i] = 0;
    if (tid == 0) f.room[32] = kAll, *listed = 0;
    __syncthreads();
#pragma unroll 4
    for (int j = tid; j < r.n_cluster; j += kThreads) {
      const int key = r.keys[j];
      const uint64_t x = order_of(key, r.top, j);
      if (key == kEmpty || x < from || x < start || x >= until) continue;
      const uint32_t w = weight(j, x), bin = static_cast<uint32_t>(min((x - start) >> shift, uint64_t{kBins - 1}));
      if (w & 0xffff) atomicAdd(f.histogram + bin, w & 0xffff);
      if (w >> 16) atomicAdd(f.histogram + kBins + bin, w >> 16);
    }
    __syncthreads();
    constexpr int kEach = kBins / kThreads;
    uint64_t sum[kEach], all = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      sum[i] = f.histogram[tid * kEach + i] + (uint64_t{f.histogram[kBins + tid * kEach + i]} << 16);
      all += sum[i];
    }
    uint64_t before = base + block_scan<kThreads>(all, f.room);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (before < want && want <= before + sum[i]) f.room[32] = static_cast<uint64_t>(tid * kEach + i), f.room[33] = before;
      before += sum[i];
    }
    if (tid == kThreads - 1) f.room[35] = before;
    __syncthreads();
    const uint64_t bin = f.room[32];
    if (bin == kAll) return kAll;
    base = f.room[33];
    const bool open = until == kAll && bin == kBins - 1;
    start += bin << shift;
    until = open ? kAll - 1 : start + (uint64_t{1} << shift);
    if (open) shift = kNumberBits + 32;
#pragma unroll 4
    for (int j = tid; j < r.n_cluster; j += kThreads) {
      const int key = r.keys[j];
      const uint64_t x = order_of(key, r.top, j);
      if (key == kEmpty || x < from || x < start || x >= until) continue;
      const int at = atomicAdd(listed, 1);
      if (at < kList) f.list[at] = x, f.weights[at] = weight(j, x);
    }
    __syncthreads();
    const int n = *listed;
    __syncthreads();
    if (n > kList) continue;
#pragma unroll 1
    for (int i = tid; i < n; i += kThreads) {
      const uint64_t x = f.list[i];
      uint64_t sum_before = base;
#pragma unroll 4
      for (int o = 0; o < n; ++o) sum_before += f.list[o] < x ? f.weights[o] : 0;
      if (sum_before < want && want <= sum_before + f.weights[i]) f.room[34] = x + 1, f.room[35] = sum_before + f.weights[i];
    }
    __syncthreads();
    return f.room[34];
  }
}

template <class T, int D, int kThreads>
struct Selector {
  static constexpr int kWarps = kThreads / 32, kDims = D > 0 ? D / 64 : 4;  // kDims: blocks of 64 dimensions

  const SelectArgs& a;
  const int rank = blockIdx.x, blocks = gridDim.x, kv_head = blockIdx.y, entry = blockIdx.z, tid = threadIdx.x, warp = threadIdx.x / 32,
            lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int32_t* table;
  int d, len, first_page, end_page, n_cluster;
  bool in_shared;  // keys and first rows, or else in scratch
  bool fit;

  __device__ explicit Selector(const SelectArgs& args) : a(args) {
    table = a.page_table + entry * a.table_stride;
    d = D > 0 ? D : a.d;
    len = a.kv_len[entry];
    first_page = a.closed[entry * a.closed_stride];
    end_page = a.closed[entry * a.closed_stride + 1];
    n_cluster = (end_page - first_page) * a.n_slot;
    in_shared = n_cluster < a.capacity;
    fit = D == 0 && a.fit;
  }

  // ---- where things are
  template <class X>
  __device__ X* shared(int32_t at) const {
    extern __shared__ uint4 memory[];
    return reinterpret_cast<X*>(reinterpret_cast<char*>(memory) + at);
  }
  __device__ Head& own_head(int head) const { return shared<Head>(a.at.heads)[head >> a.log_blocks]; }
  __device__ uint64_t* room() const { return shared<uint64_t>(a.at.room); }
  __device__ int owner(int head) const { return head & (blocks - 1); }
  __device__ Head& head_at(int head) const { return *in_block(&own_head(head), owner(head)); }
  __device__ char* scratch(int head) const {  // [room] u64 sorted, [room] i32 keys or f32 masses; before them [room] i32 first rows
    return a.scratch + (static_cast<int64_t>(entry) * a.h_kv + kv_head) * a.room * (4 + 12 * a.group) + (4 + 12 * head) * a.room;
  }
  __device__ uint64_t* sorted(int head) const { return reinterpret_cast<uint64_t*>(scratch(head)); }
  __device__ float* sorted_mass(int head) const { return reinterpret_cast<float*>(scratch(head) + 8 * a.room); }
  __device__ int32_t* keys(int head) const {
    return in_shared ? in_block(shared<int32_t>(a.at.keys) + (head >> a.log_blocks) * a.capacity, owner(head))
                     : reinterpret_cast<int32_t*>(sorted_mass(head));
  }
  __device__ int32_t* own_keys(int head) const {
    return in_shared ? shared<int32_t>(a.at.keys) + (head >> a.log_blocks) * a.capacity : keys(head);
  }
  __device__ int32_t* own_begin() const {
    return in_shared ? shared<int32_t>(a.at.begin) : reinterpret_cast<int32_t*>(scratch(0) - 4 * a.room);
  }
  __device__ int page_of(int row) const {
    const int i = row / kPage;
    return i < a.n_table ? shared<int32_t>(a.at.pages)[i] : table[i];
  }

  // ---- queries: as the tensor cores want them. Lane (g, c) holds four neighbouring dimensions of head g in each step of 16: the order
  // of dimensions is free, and chosen so that a lane reads 16 bytes of a row.
  __device__ void load_queries() const {
    constexpr int kRounds = D > 0 ? (D + 127) / 128 : 2;
    const int steps = (d + 63) / 64 * 4;
#pragma unroll 1
    for (int head = warp; head < (a.group + 7) / 8 * 8; head += kWarps) {
      const T* q = static_cast<const T*>(a.q) + entry * a.q_stride + (static_cast<int64_t>(kv_head) * a.group + head) * d;
      float x[kRounds][4], most = 0;
#pragma unroll
      for (int n = 0; n < kRounds; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = 4 * (lane + 32 * n) + e;
          x[n][e] = head < a.group && i < d ? to_float(q[i]) : 0;
          most = fmaxf(most, fabsf(x[n][e]));
        }
      most = warp_max(most);
      // A power of two above all elements: the squares must not leave the range of f16.
      const uint32_t exponent = min(max((__float_as_uint(most) >> 23) + 1, 67u), 187u);
      const float up = __uint_as_float(exponent << 23), down = __uint_as_float((254 - exponent) << 23);
#pragma unroll
      for (int n = 0; n < kRounds; ++n) {
        const int i = 4 * (lane + 32 * n);
        if (i >= steps * 16) continue;
        float y[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) y[e] = x[n][e] * down;
        const int at = (head / 8 * steps + i / 64 * 4 + i / 4 % 4) * 32 + head % 8 * 4 + i / 16 % 4;
        shared<uint2>(a.at.mean_q)[at] = {pack2<f16>(y[0], y[1]), pack2<f16>(y[2], y[3])};
        shared<uint2>(a.at.square_q)[at] = {pack2<f16>(y[0] * y[0], y[1] * y[1]), pack2<f16>(y[2] * y[2], y[3] * y[3])};
        if constexpr (D > 0) {
          shared<uint2>(a.at.key_q)[(head / 8 * steps + i / 32 * 2 + i / 4 % 2) * 32 + head % 8 * 4 + i / 8 % 4] = {
              pack2<T>(x[n][0], x[n][1]), pack2<T>(x[n][2], x[n][3])};
        } else if (head < a.group) {
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (i + e < d) shared<float>(a.at.plain_q)[head * d + i + e] = x[n][e];
        }
      }
      if (lane == 0 && head < a.group)
        shared<float2>(a.at.scale_q)[head] = {a.scale * kLog2e * up, fit ? 0.0f : 0.5f * (a.scale * up) * (a.scale * up) * kLog2e};
    }
  }

  // ---- exact masses. Goes through the warp's parts: part(i) gives the i-th, with n = 0 at the end (and where there is nothing to do,
  // with `to` < 0 then); sink(part, head, mass) is called by some lane of the warp for every head of the part. The next rows are on their
  // way while these are computed.
  __device__ const T* key_row(int r) const {
    return static_cast<const T*>(a.k) + ((static_cast<int64_t>(page_of(r)) * a.h_kv + kv_head) * kPage + r % kPage) * d;
  }
  template <class Next, class Sink>
  __device__ void count_rows(Next&& next_part, Sink&& sink) const {
    const float scale = a.scale * kLog2e;
    if constexpr (D > 0) {
      Part now, next = next_part();
      int r = 0, next_r = 0;
      uint4 k[2][D / 32], ahead[2][D / 32];
      Mass sum;  // of the part's rows so far
#pragma unroll 1
      for (bool first = true;; first = false) {
        if (next.n > 0) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int at = next_r + 8 * i + g;
            const bool there = at < next.n;
            const T* from = key_row(next.row + (there ? at : 0)) + 8 * c;
#pragma unroll
            for (int x = 0; x < D / 32; ++x) ahead[i][x] = there ? load_once_16(from + 32 * x) : uint4{0, 0, 0, 0};
          }
        }
        if (!first) {
          const int low = now.head < 0 ? 0 : now.head, high = now.head < 0 ? a.group - 1 : now.head;
#pragma unroll 1
          for (int b = low / 8; b <= high / 8; ++b) {
            float acc[4] = {};
            const uint2* q = shared<uint2>(a.at.key_q) + b * D / 16 * 32 + lane;
#pragma unroll
            for (int x = 0; x < D / 32; ++x) {
              const uint2 q0 = q[64 * x], q1 = q[64 * x + 32];
              mma_16816<T>(acc, {k[0][x].x, k[1][x].x, k[0][x].y, k[1][x].y}, q0.x, q0.y);
              mma_16816<T>(acc, {k[0][x].z, k[1][x].z, k[0][x].w, k[1][x].w}, q1.x, q1.y);
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float s0 = r + g < now.n ? acc[e] * scale : kNegInf, s1 = r + 8 + g < now.n ? acc[2 + e] * scale : kNegInf;
              float top = fmaxf(s0, s1);
#pragma unroll
              for (int step = 4; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(kWarp, top, step));
              float total = pow2(s0 - top) + pow2(s1 - top);  // row r is there, so top is finite
#pragma unroll
              for (int step = 4; step < 32; step *= 2) total += __shfl_xor_sync(kWarp, total, step);
              const int head = 8 * b + 2 * c + e;
              if (g != 0 || head < low || head > high) continue;
              Mass mass{top, total};
              if (now.head >= 0) {
                mass.add(sum);
                sum = mass;
                if (r + kStep < now.n) continue;
                sum = {};
              }
              sink(now, head, mass);
            }
          }
        }
        if (next.n == 0) break;
        now = next, r = next_r;
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int x = 0; x < D / 32; ++x) k[i][x] = ahead[i][x];
        next_r += kStep;
        if (next_r >= next.n) next = next_part(), next_r = 0;
      }
    } else {
#pragma unroll 1
      for (Part now = next_part(); now.n > 0; now = next_part()) {
#pragma unroll 1
        for (int head = max(now.head, 0); head < (now.head < 0 ? a.group : now.head + 1); ++head) {
          Mass mass;
#pragma unroll 1
          for (int r = lane; r < now.n; r += 32) {
            const T* k = key_row(now.row + r);
            float sum[2] = {0, 0};
#pragma unroll 4
            for (int i = 0; i < d; i += 2)
#pragma unroll
              for (int e = 0; e < 2; ++e) sum[e] = fmaf(shared<float>(a.at.plain_q)[head * d + i + e], to_float(k[i + e]), sum[e]);
            mass.add({(sum[0] + sum[1]) * scale, 1});
          }
          mass = warp_mass(mass);
          if (lane == 0) sink(now, head, mass);
        }
      }
    }
  }
  __device__ static Mass warp_mass(Mass m) {
#pragma unroll 1
    for (int step = 1; step < 32; step *= 2) m.add({__shfl_xor_sync(kWarp, m.top, step), __shfl_xor_sync(kWarp, m.total, step)});
    return m;
  }
  // What the warps have collected goes, one sum per block, to a block.
  __device__ float2& collected(int which, int head, int of_warp) const {
    return shared<float2>(a.at.warp_mass)[(which * a.group + head) * kWarps + of_warp];
  }
  __device__ void collect_mass(int which, int head, Mass m) const {  // of this warp
    float2& to = collected(which, head, warp);
    m.add({to.x, to.y});
    to = {m.top, m.total};
  }
  template <class To>
  __device__ void merge_warps(int first, int end, To&& to) const {
#pragma unroll 1
    for (int i = first * a.group + warp; i < end * a.group; i += kWarps) {
      const int which = i / a.group, head = i % a.group;
      const float2 x = lane < kWarps ? collected(which, head, lane) : float2{kNegInf, 0};
      const Mass m = warp_mass({x.x, x.y});
      if (lane == 0) in_block(shared<float2>(a.at.mass), to(head))[i * kMaxBlocks + rank] = {m.top, m.total};
    }
  }
  __device__ Mass merge_blocks(int which, int head) const {  // by a warp
    const float2 x = lane < blocks ? shared<float2>(a.at.mass)[(which * a.group + head) * kMaxBlocks + lane] : float2{kNegInf, 0};
    return warp_mass({x.x, x.y});
  }

  // ---- score
  struct Tile {  // 16 clusters: rows g and g + 8 of a product
    uint4 centroid[2][kDims], variance[2][kDims];
    int2 range[2];
  };
  __device__ int page_at(int cluster) const { return static_cast<int>(static_cast<uint64_t>(cluster) * a.per_slot >> 31); }
  __device__ void load_tile(Tile& t, int tile) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = 16 * tile + 8 * i + g, page = page_at(at);  // counted from the first page of the sequence
      const bool there = page >= first_page && page < end_page;
      int64_t slot = 0;
      if (there) slot = (static_cast<int64_t>(table[page]) * a.h_kv + kv_head) * a.n_slot + (at - page * a.n_slot);
      t.range[i] = there ? a.range[slot] : int2{0, 0};
#pragma unroll
      for (int k = 0; k < kDims; ++k) {
        const int dim = 64 * k + 16 * c;
        const bool some = there && (D > 0 || dim < d);
        t.centroid[i][k] = some ? load_f8(a.centroid + slot * d, dim, d) : uint4{0, 0, 0, 0};
        t.variance[i][k] = some && !fit ? load_f8(a.variance + slot * d, dim, d) : uint4{0, 0, 0, 0};
      }
    }
  }
  __device__ static void multiply(float (&acc)[4], const uint4 (&x)[2][kDims], int k, const uint2* q) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t x0 = (&x[0][k].x)[w], x1 = (&x[1][k].x)[w];
      const uint2 b = q[(4 * k + w) * 32];
      mma_16816<f16>(acc, {f8_to_f16(x0), f8_to_f16(x1), f8_to_f16(x0 >> 16), f8_to_f16(x1 >> 16)}, b.x, b.y);
    }
  }
  __device__ void score_tile(const Tile& t, int tile) const {
    const int steps = (d + 63) / 64 * 4;
#pragma unroll 1
    for (int b = 0; 8 * b < a.group; ++b) {
      float mean[4] = {}, wide[4] = {};
#pragma unroll
      for (int k = 0; k < kDims; ++k) {
        if (D == 0 && 64 * k >= d) break;
        multiply(mean, t.centroid, k, shared<uint2>(a.at.mean_q) + b * steps * 32 + lane);
        multiply(wide, t.variance, k, shared<uint2>(a.at.square_q) + b * steps * 32 + lane);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int head = 8 * b + 2 * c + e;
        int top_key = kEmpty, top_mass = INT_MIN;
        Mass all;
        if (head < a.group) {
          const float2 scale = shared<float2>(a.at.scale_q)[head];
          int32_t* to = keys(head);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int at = 16 * tile + 8 * i + g - first_page * a.n_slot, n = t.range[i].y;
            if (at < 0 || at >= n_cluster) continue;
            const float m = mean[2 * i + e] * scale.x, rank = m + wide[2 * i + e] * scale.y, log_n = __log2f(static_cast<float>(n));
            const int key = n > 0 ? max(__float2int_rn(rank * 0x1p16f), kEmpty + 1) : kEmpty;
            to[at] = key;
            if (a.tail) tail_of(head)[at] = (m + kTailSpread * wide[2 * i + e] * scale.y + log_n) * kLn2;  // log2(0) is -inf
            top_key = max(top_key, key);
            if (n > 0) top_mass = max(top_mass, ordered(rank + log_n)), all.add({rank + log_n, 1});
          }
        }
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
          top_key = max(top_key, __shfl_xor_sync(kWarp, top_key, step));
          top_mass = max(top_mass, __shfl_xor_sync(kWarp, top_mass, step));
          all.add({__shfl_xor_sync(kWarp, all.top, step), __shfl_xor_sync(kWarp, all.total, step)});
        }
        if (g == 0 && head < a.group) {
          atomicMax(&shared<int2>(a.at.tops)[head].x, top_key);
          atomicMax(&shared<int2>(a.at.tops)[head].y, top_mass);
          collect_mass(2, head, all);
        }
      }
    }
    // The first rows go to every block that has a query head.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int whole = 16 * tile + 8 * i + g, at = whole - first_page * a.n_slot;
      if (at < 0 || at >= n_cluster) continue;
      const int begin = t.range[i].x + page_at(whole) * kPage;
#pragma unroll 1
      for (int block = c; block < (in_shared ? min(blocks, a.group) : 1); block += 4) {
        int32_t* to = in_shared ? in_block(shared<int32_t>(a.at.begin), block) : own_begin();
        to[at] = begin;
        if (at + 1 == n_cluster) to[at + 1] = begin + t.range[i].y;
      }
    }
  }
  __device__ float* tail_of(int head) const {
    return a.tail + entry * a.tail_stride + (static_cast<int64_t>(kv_head) * a.group + head) * (a.tail_row);
  }

  __device__ Ranking ranking(int head) const {
    const Head& h = own_head(head);
    return {own_keys(head), own_begin(), n_cluster, h.top_key, static_cast<float>(h.top_key) * 0x1p-16f - from_ordered(h.top_mass) + 32};
  }
  __device__ uint64_t cut(const Ranking& r, uint64_t from, uint64_t want, Weight kind) const {
    const uint64_t end = find_cut<kThreads>(
        r, {shared<uint32_t>(a.at.histogram), shared<uint64_t>(a.at.list), shared<uint32_t>(a.at.weights), room()}, from, want, kind);
    return end;
  }
  __device__ uint64_t scan(uint64_t x, uint64_t& total) const {
    const uint64_t before = block_scan<kThreads>(x, room());
    total = block_total<kThreads>(room());
    __syncthreads();
    return before;
  }

  // The first kExact clusters, in order.
  __device__ void rank_clusters(int head) const {
    Head& h = own_head(head);
    const int32_t* keys = own_keys(head);
    const int top = h.top_key;
    const auto below = [&](int key) { return key == kEmpty ? UINT_MAX : static_cast<uint32_t>(top) - static_cast<uint32_t>(key); };
    uint64_t* list = shared<uint64_t>(a.at.list);
    int* listed = reinterpret_cast<int*>(room() + 36);
    if (tid == 0) *listed = 0;
    uint32_t nearest = UINT_MAX;  // of this thread's clusters, below the top
#pragma unroll 2
    for (int j = 4 * tid; j < n_cluster; j += 4 * kThreads) {
      const int4 k = *reinterpret_cast<const int4*>(keys + j);
      nearest = min(nearest, below(k.x));
      if (j + 1 < n_cluster) nearest = min(nearest, below(k.y));
      if (j + 2 < n_cluster) nearest = min(nearest, below(k.z));
      if (j + 3 < n_cluster) nearest = min(nearest, below(k.w));
    }
    // Where kExact threads have a cluster there are as many clusters, and seldom many more: 64 of 512 threads hold about 68.
    uint32_t near = 0, far = UINT_MAX;
    int n = kThreads;
    if (n_cluster > 2 * kExact) {
      far = 1 << 17;
      n = __syncthreads_count(nearest <= far);
#pragma unroll 1
      while (n < kExact && far < UINT_MAX - 1) {
        near = far;
        far = far < 1u << 30 ? 2 * far : UINT_MAX - 1;
        n = __syncthreads_count(nearest <= far);
      }
#pragma unroll 1
      while (n > kExact + 24 && far - near > 1) {
        const uint32_t middle = near + (far - near) / 2;
        const int m = __syncthreads_count(nearest <= middle);
        if (m >= kExact) far = middle, n = m;
        else near = middle;
      }
    } else {
      far = UINT_MAX - 1;
      __syncthreads();
    }
    if (nearest <= far)
#pragma unroll 1
      for (int j = 4 * tid; j < n_cluster; j += 4 * kThreads)
#pragma unroll 1
        for (int i = j; i < min(j + 4, n_cluster); ++i) {
          const uint32_t x = below(keys[i]);
          if (x > far) continue;
          const int at = atomicAdd(listed, 1);
          if (at < kList) list[at] = static_cast<uint64_t>(x) << kNumberBits | static_cast<uint32_t>(i);
        }
    __syncthreads();
    n = *listed;
    if (n > kList) {  // many of the same rank
      __syncthreads();
      const uint64_t end = cut(ranking(head), 0, kExact, Weight::one);
      if (tid == 0) *listed = 0;
      __syncthreads();
#pragma unroll 1
      for (int j = tid; j < n_cluster; j += kThreads) {
        const uint64_t x = order_of(keys[j], top, j);
        if (keys[j] != kEmpty && x < end) list[atomicAdd(listed, 1)] = x;
      }
      __syncthreads();
      n = *listed;
    }
    // The place of each: how many come before.
#pragma unroll 1
    for (int i = warp; i < n; i += kWarps) {
      const uint64_t x = list[i];
      int place = 0;
#pragma unroll 3
      for (int o = lane; o < n; o += 32) place += list[o] < x;
      place = static_cast<int>(__reduce_add_sync(kWarp, static_cast<uint32_t>(place)));
      if (lane == 0 && place < kExact) h.exact[place] = x;
    }
    if (tid == 0) h.n_exact = min(n, kExact);
    __syncthreads();
  }

  // Deals out the rows of h.exact[]: parts of kStep rows, or of twice as many until kParts are enough. By one warp.
  __device__ void deal_parts(int head) {
    Head& h = own_head(head);
    const int32_t* begin = own_begin();
    int row[2], n[2], size = kStep, mine = 0, total = 0, before = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool there = 2 * lane + i < h.n_exact;
      const int j = there ? number_of(h.exact[2 * lane + i]) : 0;
      row[i] = there ? begin[j] : 0;
      n[i] = there ? begin[j + 1] - row[i] : 0;
    }
    for (;; size *= 2) {
      mine = (n[0] + size - 1) / size + (n[1] + size - 1) / size;
      total = warp_sum(mine);
      if (total <= kParts) break;
    }
    before = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kWarp, before, step);
      if (lane >= step) before += other;
    }
    before -= mine;
    const auto put = [&](int part, int first, int rows) {
      *reinterpret_cast<int4*>(in_block(shared<Part>(a.at.parts), owner(part)) + (part >> a.log_blocks) * a.group + head) = {first, rows,
                                                                                                                             head, part};
    };
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      h.part_of[2 * lane + i] = before;
#pragma unroll 1
      for (int at = 0; at < n[i]; at += size) put(before++, row[i] + at, min(size, n[i] - at));
    }
    if (lane == 31) h.part_of[kExact] = before;
#pragma unroll 1
    for (int part = total + lane; part < kParts; part += 32) put(part, 0, 0);
  }
  // The rows outside the index, if `open`, and the parts dealt to this block.
  __device__ void count_parts(bool open, bool dealt) const {
    const int in_front = first_page * (kPage / kStep), window = end_page * kPage,
              n_open = open ? in_front + (len - window + kStep - 1) / kStep : 0;
    const int n_part = dealt ? (kParts >> a.log_blocks) * a.group : 0;
    int i = rank + blocks * warp, j = warp;
    count_rows(
        [&]() -> Part {
          if (i < n_open) {
            const int row = i < in_front ? i * kStep : window + (i - in_front) * kStep;
            const int n = i < in_front ? kStep : min(kStep, len - row);
            i += blocks * kWarps;
            return {row, n, -1, 0};
          }
          for (; j < n_part; j += kWarps) {
            const int4 x = *reinterpret_cast<const int4*>(shared<Part>(a.at.parts) + j);
            if (x.y == 0) continue;
            j += kWarps;
            return {x.x, x.y, x.z, x.w};
          }
          return {0, 0, 0, 0};
        },
        [&](const Part& part, int head, Mass m) {
          if (part.head < 0) collect_mass(0, head, m);
          else head_at(head).part[part.to] = {m.top, m.total};
        });
  }
  __device__ Mass exact_mass(const Head& h, int i) const {
    Mass m;
    if (i < h.n_exact)
      for (int part = h.part_of[i]; part < h.part_of[i + 1]; ++part) m.add({h.part[part].x, h.part[part].y});
    return m;
  }

  __device__ static float share(float part, float all) { return all > 0 ? fminf(part / all, 1) : 1; }

  // `moment`. -> the share of the mass; `end`: of the choice
  __device__ float choose_by_moment(int head, uint64_t& end) const {
    const Head& h = own_head(head);
    const Ranking r = ranking(head);
    struct Decision {
      uint64_t end, want;  // want: what is still missing, in rows or in units of estimates; 0: decided
      float taken, rest, per_unit;  // masses; what a unit of estimates is worth
    };
    Decision& is = *reinterpret_cast<Decision*>(room() + 40);
    if (warp == 0) {
      // Each lane has two of the counted clusters. In units of 2^top: the largest there is, so that nothing overflows.
      const Mass open = merge_blocks(0, head), all = merge_blocks(2, head);
      Mass exact[2];
      uint64_t order[2];
      int n_row[2];
      float top = fmaxf(open.top, from_ordered(h.top_mass));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = 2 * lane + i;
        exact[i] = exact_mass(h, at);
        order[i] = at < h.n_exact ? h.exact[at] : kAll;
        n_row[i] = at < h.n_exact ? r.rows(number_of(order[i])) : 0;
        top = fmaxf(top, exact[i].top);
      }
      top = warp_max(top);
      const float first = static_cast<float>(h.top_key) * 0x1p-16f - top;
      float mass[2], estimate[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        mass[i] = exact[i].under(top);
        estimate[i] = n_row[i] > 0 ? static_cast<float>(n_row[i]) * pow2(first - below_top(order[i])) : 0;
      }
      float masses = mass[0] + mass[1], estimates = estimate[0] + estimate[1];
      int rows = n_row[0] + n_row[1];
#pragma unroll 1
      for (int step = 1; step < 32; step *= 2) {
        const float m = __shfl_up_sync(kWarp, masses, step), x = __shfl_up_sync(kWarp, estimates, step);
        const int n = __shfl_up_sync(kWarp, rows, step);
        if (lane >= step) masses += m, estimates += x, rows += n;
      }
      const float counted = __shfl_sync(kWarp, masses, 31), estimated = __shfl_sync(kWarp, estimates, 31);
      const int n_rows = __shfl_sync(kWarp, rows, 31);
      // Before the lane's first cluster, and between the two.
      float before_mass = __shfl_up_sync(kWarp, masses, 1), before_estimate = __shfl_up_sync(kWarp, estimates, 1);
      int before_rows = __shfl_up_sync(kWarp, rows, 1);
      if (lane == 0) before_mass = before_estimate = 0, before_rows = 0;
      const float outside = open.under(top), whole = all.under(top);
      const float taken[2] = {outside + before_mass, outside + before_mass + mass[0]};
      const float rest[2] = {fmaxf(whole - before_estimate, 0), fmaxf(whole - before_estimate - estimate[0], 0)};
      const float want_rows = a.fraction * static_cast<float>((end_page - first_page) * kPage);
      const auto enough = [&](int i) {
        if (2 * lane + i >= h.n_exact) return false;
        if (a.fraction > 0) return static_cast<float>(i == 0 ? before_rows : before_rows + n_row[0]) >= want_rows;
        return taken[i] >= a.p * (taken[i] + rest[i]);
      };
      const uint32_t stop0 = __ballot_sync(kWarp, enough(0)), stop1 = __ballot_sync(kWarp, enough(1));
      const int n = min(stop0 ? 2 * (__ffs(stop0) - 1) : INT_MAX, stop1 ? 2 * (__ffs(stop1) - 1) + 1 : INT_MAX);
      if (n < INT_MAX) {
        const bool second = n % 2 != 0;
        if (lane == n / 2) is = {second ? order[1] : order[0], 0, second ? taken[1] : taken[0], second ? rest[1] : rest[0], 0};
      } else if (lane == 31) {
        const float worth = estimated > 0 ? fminf(counted / estimated, 0x1p60f) : 1;
        const float here = outside + counted, left = h.n_exact < kExact ? 0 : fmaxf(whole - estimated, 0) * worth;
        const float per_unit = worth * pow2(from_ordered(h.top_mass) - top - 32);
        const float want = a.fraction > 0 ? want_rows - static_cast<float>(n_rows) : (a.p * (here + left) - here) / per_unit;
        is = {h.n_exact < kExact ? kAll : h.exact[kExact - 1] + 1, h.n_exact == kExact && want > 0 ? static_cast<uint64_t>(ceilf(want)) : 0,
              here, left, per_unit};
      }
    }
    __syncthreads();
    const Decision got = is;
    end = got.end;
    float taken = got.taken;
    if (got.want > 0) {
      end = cut(r, got.end, got.want, a.fraction > 0 ? Weight::rows : Weight::estimate);
      uint64_t more = room()[35];
      __syncthreads();
      if (a.fraction > 0) {
        uint64_t sum = 0;
#pragma unroll 1
        for (int j = tid; j < n_cluster; j += kThreads) {
          const uint64_t x = order_of(r.keys[j], r.top, j);
          if (r.keys[j] != kEmpty && x >= got.end && x < end) sum += r.estimate(x, r.rows(j));
        }
        scan(sum, more);
      }
      taken += static_cast<float>(more) * got.per_unit;
    }
    return share(taken, got.taken + got.rest);
  }

  // Marks clusters before `end` in the first block's bitmap.
  __device__ void mark(int head, uint64_t end) const {
    const int32_t* key = own_keys(head);
    const int top = own_head(head).top_key;
    uint32_t* to = in_block(shared<uint32_t>(a.at.chosen), 0);
#pragma unroll 4
    for (int j = tid; j - lane < n_cluster; j += kThreads) {
      const bool is = j < n_cluster && key[j] != kEmpty && order_of(key[j], top, j) < end;
      const uint32_t bits = __ballot_sync(kWarp, is);
      if (lane == 0 && bits != 0) atomicOr(to + j / 32, bits);
    }
  }

  // ---- `fit` (Tactic, section 4.2). Positions count rows of closed segments, sorted by their cluster's rank; the whole list is sorted.
  static constexpr double kFirst = 0.1, kSecond = 0.6;  // where the curve is sampled
  static constexpr double kSample = 0.01;  // share of the rows in a sample
  static constexpr double kHead = 0.02;  // share of the rows in front whose mass is computed

  // Each thread goes through a stretch of the sorted list: f(position in the list, order, rows before, rows).
  template <class F>
  __device__ void walk_sorted(int head, F&& f) const {
    const uint64_t* list = sorted(head);
    const int32_t* begin = own_begin();
    const int each = (n_cluster + kThreads - 1) / kThreads, first = min(tid * each, n_cluster), end = min(first + each, n_cluster);
    uint64_t rows = 0, total;
    const auto rows_at = [&](int i) {
      const int j = number_of(list[i]);
      return list[i] == kAll ? 0 : begin[j + 1] - begin[j];
    };
    for (int i = first; i < end; ++i) rows += rows_at(i);
    uint64_t at = scan(rows, total);
    for (int i = first; i < end; ++i) {
      const int n = rows_at(i);
      if (n > 0) f(i, list[i], static_cast<double>(at), n);
      at += n;
    }
    __syncthreads();
  }
  __device__ int fit_items(const Head& h) const { return h.n_head + h.sample[0][1] - h.sample[0][0] + h.sample[1][1] - h.sample[1][0]; }
  __device__ int fit_item(const Head& h, int item) const {  // -> its position in the sorted list; the head first, then the samples
    if (item < h.n_head) return item;
    item -= h.n_head;
    const int n = h.sample[0][1] - h.sample[0][0];
    return item < n ? h.sample[0][0] + item : h.sample[1][0] + item - n;
  }
  __device__ void prepare_fit(int head) {
    Head& h = own_head(head);
    const int32_t* key = own_keys(head);
    uint64_t* list = sorted(head);
    for (int j = tid; j < n_cluster; j += kThreads) list[j] = key[j] == kEmpty ? kAll : order_of(key[j], h.top_key, j);
    if (tid == 0) {
      h.n_head = 0, h.sampled[0] = h.sampled[1] = 0;
      for (auto& x : h.sample) x[0] = INT_MAX, x[1] = 0;
    }
    __syncthreads();
    const auto exchange = [&](int i, int other) {
      if (other <= i || other >= n_cluster) return;
      const uint64_t x = list[i], y = list[other];
      if (x > y) list[i] = y, list[other] = x;
    };
    for (int run = 2; run < 2 * n_cluster; run *= 2) {  // bitonic, upwards everywhere: what is past the end counts as the largest
      for (int i = tid; i < n_cluster; i += kThreads) exchange(i, i ^ (run - 1));
      __syncthreads();
      for (int step = run / 4; step > 0; step /= 2) {
        for (int i = tid; i < n_cluster; i += kThreads) exchange(i, i ^ step);
        __syncthreads();
      }
    }
    const double rows = (end_page - first_page) * kPage, where[2] = {kFirst * rows, kSecond * rows}, half = kSample * rows / 2;
    walk_sorted(head, [&](int i, uint64_t, double at, int n) {
      if (at < kHead * rows) atomicMax(&h.n_head, i + 1);
#pragma unroll
      for (int x = 0; x < 2; ++x)
        if (at < where[x] + half && at + n > where[x] - half) atomicMin(&h.sample[x][0], i), atomicMax(&h.sample[x][1], i + 1);
    });
  }
  __device__ void next_fit(int head, int round) {  // the round's clusters to be counted
    Head& h = own_head(head);
    const int first = round * kExact, n = max(min(fit_items(h) - first, kExact), 0);
    for (int i = tid; i < n; i += kThreads) h.exact[i] = sorted(head)[fit_item(h, first + i)];
    if (tid == 0) h.n_exact = n;
    __syncthreads();
  }
  __device__ void take_fit(int head, int round) {  // by one warp
    Head& h = own_head(head);
    const float top = from_ordered(h.top_mass);
    float sum[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = 2 * lane + i, item = round * kExact + at;
      if (at >= h.n_exact) continue;
      const float mass = exact_mass(h, at).under(top);
      if (item < h.n_head) sorted_mass(head)[item] = mass;
      else sum[item - h.n_head >= h.sample[0][1] - h.sample[0][0]] += mass;
    }
    sum[0] = warp_sum(sum[0]), sum[1] = warp_sum(sum[1]);
    if (lane == 0) h.sampled[0] += sum[0], h.sampled[1] += sum[1];
  }
  __device__ float choose_by_fit(int head, int& n_taken) {
    const Head& h = own_head(head);
    const double rows = (end_page - first_page) * kPage, where[2] = {kFirst * rows, kSecond * rows};
    double* sums = reinterpret_cast<double*>(room() + 32);
    double mean[2];
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      uint64_t n = 0, n_sampled;
      for (int i = h.sample[x][0] + tid; i < h.sample[x][1]; i += kThreads) {
        const int j = number_of(sorted(head)[i]);
        n += own_begin()[j + 1] - own_begin()[j];
      }
      scan(n, n_sampled);
      mean[x] = n_sampled > 0 ? h.sampled[x] / static_cast<double>(n_sampled) : 0;
    }
    const double slope = (mean[0] - mean[1]) / (1 / where[0] - 1 / where[1]), level = mean[0] - slope / where[0];
    const auto mass_of = [&](int i, double at, int n) {
      if (i < h.n_head) return static_cast<double>(sorted_mass(head)[i]);
      return fmax(slope * log((at + n) / at) + level * n, 0.0);
    };
    // Sums of the threads' stretches, in order.
    double mine = 0;
    walk_sorted(head, [&](int i, uint64_t, double at, int n) { mine += mass_of(i, at, n); });
    double sum = mine, before = 0;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const double other = __shfl_up_sync(kWarp, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == 31) sums[warp] = sum;
    const double open = merge_blocks(0, head).under(from_ordered(h.top_mass));
    __syncthreads();
    double total = open;
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) before = total;
      total += sums[w];
    }
    __syncthreads();
    int* n = reinterpret_cast<int*>(room() + 62);
    if (tid == 0) *n = INT_MAX, sums[0] = total;
    __syncthreads();
    before += sum - mine;  // what is taken before this thread's stretch
    double taken = before;
    walk_sorted(head, [&](int i, uint64_t, double at, int rows_of) {
      if (taken >= static_cast<double>(a.p) * total) atomicMin(n, i);
      taken += mass_of(i, at, rows_of);
    });
    n_taken = *n;
    taken = before;
    walk_sorted(head, [&](int i, uint64_t, double at, int rows_of) {
      if (i == n_taken) sums[0] = taken;
      taken += mass_of(i, at, rows_of);
    });
    const double got = sums[0];
    __syncthreads();
    return total > 0 ? static_cast<float>(got / total) : 1;
  }
  __device__ void mark_sorted(int head, int n) const {
    uint32_t* to = in_block(shared<uint32_t>(a.at.chosen), 0);
    for (int i = tid; i < min(n, n_cluster); i += kThreads) {
      const uint64_t x = sorted(head)[i];
      if (x != kAll) atomicOr(to + number_of(x) / 32, 1u << number_of(x) % 32);
    }
  }

  // ---- write: the bitmap as ranges, by the first block; every thread takes a stretch of the clusters
  __device__ void write_ranges() const {
    const int32_t* begin = own_begin();
    const bool sinks = first_page > 0;
    const auto in_union = [&](int j) { return (shared<uint32_t>(a.at.chosen)[j / 32] >> j % 32 & 1) != 0; };
    const auto joined = [&](int j) {  // are the rows just before those of cluster j taken?
      while (--j >= 0)
        if (begin[j] < begin[j + 1]) return in_union(j);
      return sinks;
    };
    const int words = (n_cluster + 31) / 32, each = (words + kThreads - 1) / kThreads;
    const auto walk = [&](auto&& f) {
      for (int w = tid * each; w < min((tid + 1) * each, words); ++w)
        for (uint32_t bits = shared<uint32_t>(a.at.chosen)[w]; bits != 0; bits &= bits - 1) f(32 * w + __ffs(static_cast<int>(bits)) - 1);
    };
    uint64_t mine = 0, total;  // ranges that start here, rows
    walk([&](int j) { mine += (joined(j) ? 0 : uint64_t{1} << 32) + static_cast<uint32_t>(begin[j + 1] - begin[j]); });
    const uint64_t before = scan(mine, total);
    int2* to = a.ranges + entry * a.ranges_stride + kv_head * a.max_range;
    int n = static_cast<int>(before >> 32) + sinks, rows = static_cast<int>(before & 0xffffffff) + first_page * kPage;
    walk([&](int j) {
      if (!joined(j)) {
        if (n > 0) to[n - 1].y = rows;
        to[n++].x = begin[j];
      }
      rows += begin[j + 1] - begin[j];
      if (a.tail)
#pragma unroll 1
        for (int head = 0; head < a.group; ++head) tail_of(head)[j] = kNegInf;
    });
    if (tid != 0) return;
    n = static_cast<int>(total >> 32) + sinks, rows = static_cast<int>(total & 0xffffffff) + first_page * kPage;
    const int window = len - end_page * kPage;
    if (sinks) to[0].x = 0;
    if (window > 0 && !joined(n_cluster)) {
      if (n > 0) to[n - 1].y = rows;
      to[n++].x = end_page * kPage;
    }
    if (n > 0) to[n - 1].y = rows + window;
    a.n_range[entry * a.n_range_stride + kv_head] = n;
    if (!a.counters) return;
    const int exact = len - (end_page - first_page) * kPage;
    add(&AttentionCounters::n_step, 1);
    add(&AttentionCounters::n_context, len);
    add(&AttentionCounters::n_selected, rows + window - exact);
    add(&AttentionCounters::n_exact, exact);
    add(&AttentionCounters::n_mass, a.group);
  }
  __device__ void add(int64_t AttentionCounters::* field, int64_t x) const {
    atomicAdd(reinterpret_cast<unsigned long long*>(&(reinterpret_cast<AttentionCounters*>(a.counters)[kv_head].*field)),
              static_cast<unsigned long long>(x));
  }

  // What is set up before the first barrier of the cluster.
  __device__ void prepare() const {
#pragma unroll 1
    for (int i = tid; i < min(a.n_table, (len + kPage - 1) / kPage); i += kThreads) shared<int32_t>(a.at.pages)[i] = table[i];
#pragma unroll 1
    for (int i = tid; i < 3 * a.group * kWarps; i += kThreads) shared<float2>(a.at.warp_mass)[i] = {kNegInf, 0};
#pragma unroll 1
    for (int i = tid; i < (n_cluster + 31) / 32; i += kThreads) shared<uint32_t>(a.at.chosen)[i] = 0;
    if (tid < a.group) {
      shared<int2>(a.at.tops)[tid] = {kEmpty, INT_MIN};
      own_head(tid).top_key = kEmpty, own_head(tid).top_mass = INT_MIN;
    }
  }

  __device__ void run() {
    // The index changes between steps only: its first tiles are on their way before the kernel ahead of this one is done.
    const int last = end_page > first_page ? end_page * a.n_slot : 0, step = blocks * kWarps;
    Tile now;
    int tile = page_first_tile() + rank + blocks * warp;
#pragma unroll 1
    for (bool first = true;; first = false) {
      Tile next;
      if (16 * tile < last) load_tile(next, tile);
      if (first) {
        prepare();
        cluster_arrive();
        pdl_wait();
        pdl_launch();
        load_queries();
        cluster_wait();  // all blocks are there and have set up their memory
        __syncthreads();
      } else {
        score_tile(now, tile - step);
      }
      if (16 * tile >= last) break;
      now = next;
      tile += step;
    }
    __syncthreads();
#pragma unroll 1
    for (int head = tid; head < a.group; head += kThreads)
      if (shared<int2>(a.at.tops)[head].x != kEmpty) {
        atomicMax(&head_at(head).top_key, shared<int2>(a.at.tops)[head].x);
        atomicMax(&head_at(head).top_mass, shared<int2>(a.at.tops)[head].y);
      }
    cluster_arrive();
    cluster_wait();

    const bool searched = n_cluster > 0 && (a.p < 1 || a.fraction > 0);
    int rounds = searched ? 1 : 0;
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
#pragma unroll 1
      for (int head = rank; head < a.group; head += blocks) {
        if (D == 0 && fit) {
          if (round == 0) prepare_fit(head);
          next_fit(head, round);
        } else {
          rank_clusters(head);
        }
        if (warp == 0) deal_parts(head);
        if (D == 0 && fit && tid < blocks)
          in_block(shared<int2>(a.at.tops), tid)[head].x = (fit_items(own_head(head)) + kExact - 1) / kExact;
      }
      cluster_arrive();
      cluster_wait();
      count_parts(round == 0, true);
      __syncthreads();
      if (round == 0) merge_warps(0, 3, [&](int head) { return owner(head); });
      cluster_arrive();
      cluster_wait();
      if (D == 0 && fit) {
#pragma unroll 1
        for (int head = rank; head < a.group; head += blocks)
          if (warp == 0) take_fit(head, round);
        __syncthreads();
        for (int head = 0; head < a.group; ++head) rounds = max(rounds, shared<int2>(a.at.tops)[head].x);
      }
    }
#pragma unroll 1
    for (int head = rank; head < a.group; head += blocks) {
      float share = 1;
      if (D == 0 && searched && fit) {
        int n;
        share = choose_by_fit(head, n);
        mark_sorted(head, n);
      } else if (n_cluster > 0) {
        uint64_t end = kAll;
        if (searched) share = choose_by_moment(head, end);
        mark(head, end);
      }
      if (tid == 0) {
        a.mass[entry * a.mass_stride + kv_head * a.group + head] = share;
        if (a.counters) add(&AttentionCounters::mass, static_cast<int64_t>(share * 0x1p32f));
      }
      __syncthreads();
    }
    cluster_arrive();
    if (rank != 0) return;
    cluster_wait();
    write_ranges();
  }
  __device__ int page_first_tile() const { return first_page * a.n_slot / 16; }

  // The share of the exact mass that the ranges hold.
  __device__ void measure() {
    prepare();
    cluster_arrive();
    pdl_wait();
    load_queries();
    cluster_wait();
    __syncthreads();
    constexpr int kRows = 8 * kStep;
    const int2* range = a.ranges + entry * a.ranges_stride + kv_head * a.max_range;
    const int n_range = a.n_range[entry * a.n_range_stride + kv_head], step = blocks * kWarps;
    int i = rank + blocks * warp, j = i;
    count_rows(
        [&]() -> Part {
          if (i * kRows < len) {
            const int row = i * kRows;
            i += step;
            return {row, min(kRows, len - row), -1, 0};
          }
          if (j >= n_range) return {0, 0, 0, 0};
          const int at = j;
          j += step;
          return {range[at].x, range[at].y - (at > 0 ? range[at - 1].y : 0), -1, 1};
        },
        [&](const Part& part, int head, Mass m) { collect_mass(part.to, head, m); });
    __syncthreads();
    merge_warps(0, 2, [](int) { return 0; });
    cluster_arrive();
    if (rank != 0) return;
    cluster_wait();
#pragma unroll 1
    for (int head = warp; head < a.group; head += kWarps) {
      const Mass all = merge_blocks(0, head), held = merge_blocks(1, head);
      if (lane != 0) continue;
      const float is = share(held.under(all.top), all.total);
      a.true_mass[entry * a.true_stride + kv_head * a.group + head] = is;
      if (!a.counters) continue;
      add(&AttentionCounters::n_true, 1);
      add(&AttentionCounters::true_mass, static_cast<int64_t>(is * 0x1p32f));
      add(&AttentionCounters::n_reached, is >= a.p);
      atomicAdd(a.counters + kv_head * kAttentionCounters + offsetof(AttentionCounters, histogram) / 8 +
                    min(static_cast<int>(is * PRT_MASS_BINS), PRT_MASS_BINS - 1),
                1ull);
    }
  }
};

template <class T, int D, int kThreads>
__global__ void __launch_bounds__(kThreads, 1) select_kernel(const __grid_constant__ SelectArgs a) {
  Selector<T, D, kThreads>(a).run();
}
template <class T, int D, int kThreads>
__global__ void __launch_bounds__(kThreads, 1) select_measure_kernel(const __grid_constant__ SelectArgs a) {
  Selector<T, D, kThreads>(a).measure();
}

// Like launch(), by clusters of gridDim.x blocks.
void launch_clusters(const CudaStream& stream, void (*kernel)(SelectArgs), dim3 grid, int threads, int64_t smem, const SelectArgs& a) {
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem)),
             "shared memory of a kernel");
  if (grid.x > 8) cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "size of a cluster");
  cudaLaunchAttribute attrs[2]{};
  attrs[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attrs[0].val.programmaticStreamSerializationAllowed = 1;
  attrs[1].id = cudaLaunchAttributeClusterDimension;
  attrs[1].val.clusterDim.x = grid.x, attrs[1].val.clusterDim.y = 1, attrs[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<uint32_t>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(smem);
  config.stream = stream.handle;
  config.attrs = attrs;
  config.numAttrs = stream.arch >= 90 ? 2 : 0;
  cuda_check(cudaLaunchKernelEx(&config, kernel, a), "kernel launch");
}

Layout layout(const SelectArgs& a, int warps) {
  const int n_block = (a.group + 7) / 8, steps = (a.d + 63) / 64 * 4, blocks = 1 << a.log_blocks, own = (a.group + blocks - 1) / blocks;
  Layout at{};
  const auto take = [&](int32_t& p, int64_t bytes) {
    p = at.bytes;
    at.bytes += static_cast<int32_t>((bytes + 15) / 16 * 16);
  };
  for (int32_t* q : {&at.mean_q, &at.square_q, &at.key_q}) take(*q, 8 * n_block * steps * 32);
  take(at.plain_q, 4 * a.group * a.d), take(at.scale_q, 8 * a.group), take(at.pages, 4 * a.n_table);
  take(at.parts, 16 * a.group * kParts / blocks), take(at.warp_mass, 24 * warps * a.group), take(at.mass, 24 * kMaxBlocks * a.group);
  take(at.tops, 8 * a.group), take(at.heads, static_cast<int64_t>(sizeof(Head)) * own), take(at.histogram, 8 * kBins);
  take(at.list, 8 * kList), take(at.weights, 4 * kList), take(at.room, 8 * 64), take(at.chosen, 4 * (a.room / 32 + 1));
  take(at.begin, 4 * a.capacity), take(at.keys, 4 * own * a.capacity);
  return at;
}

template <class T, int D, int kThreads>
void run(const CudaStream& stream, SelectArgs a, int64_t n_entry) {
  const int blocks = 1 << a.log_blocks, own = (a.group + blocks - 1) / blocks,
            left = stream.smem_per_block - layout(a, kThreads / 32).bytes;
  check(left >= 0, "select: ", a.group, " query heads per kv head and ", a.room, " clusters do not fit into shared memory");
  a.capacity = std::min(a.room, left / (4 * (own + 1)) / 4 * 4);
  a.at = layout(a, kThreads / 32);
  const dim3 grid(static_cast<uint32_t>(blocks), static_cast<uint32_t>(a.h_kv), static_cast<uint32_t>(n_entry));
  launch_clusters(stream, select_kernel<T, D, kThreads>, grid, kThreads, a.at.bytes, a);
  if (a.true_mass) launch_clusters(stream, select_measure_kernel<T, D, kThreads>, grid, kThreads, a.at.bytes, a);
}

#ifndef PRT_SELECT_THREADS
#define PRT_SELECT_THREADS 512
#endif

}  // namespace

int64_t select_scratch_bytes(const CudaStream&, int64_t n_entry, int64_t h_q, int64_t h_kv, int64_t max_pages, int64_t n_slot) {
  const int64_t room = (max_pages * n_slot + 1 + 3) / 4 * 4;
  return n_entry * room * (4 * h_kv + 12 * h_q);
}

void select(const CudaStream& stream, const Select& x) {
  const int64_t n_entry = x.q.shape[0], d = x.k_pages.shape[3], h_kv = x.k_pages.shape[1], group = x.q.shape[1] / d / h_kv;
  const int64_t n_slot = x.index.centroid.shape[2], max_pages = x.page_table.shape[1];
  if (n_entry == 0) return;
  check(max_pages * n_slot < 1 << kNumberBits, "select: ", max_pages, " pages of ", n_slot, " clusters, expected less than ",
        1 << kNumberBits, " clusters");
  SelectArgs a{};
  a.ranges = x.ranges.as<int2>(), a.n_range = x.n_range.as<int32_t>();
  a.tail = x.tail.as<float>(), a.mass = x.mass.as<float>(), a.true_mass = x.true_mass.as<float>();
  a.counters = x.counters.as<unsigned long long>();
  a.q = x.q.data, a.k = x.k_pages.data;
  a.page_table = x.page_table.as<int32_t>(), a.kv_len = x.kv_len.as<int32_t>(), a.closed = x.closed.as<int32_t>();
  a.centroid = x.index.centroid.as<uint8_t>(), a.variance = x.index.variance.as<uint8_t>(), a.range = x.index.range.as<int2>();
  a.scratch = x.scratch.as<char>();
  a.q_stride = x.q.row_stride, a.table_stride = x.page_table.row_stride, a.closed_stride = x.closed.row_stride;
  a.ranges_stride = x.ranges.row_stride / 2, a.n_range_stride = x.n_range.row_stride, a.tail_stride = x.tail.row_stride,
  a.tail_row = x.tail ? x.tail.shape[2] : 0;
  a.mass_stride = x.mass.row_stride, a.true_stride = x.true_mass.row_stride, a.max_range = x.ranges.shape[2];
  a.h_kv = static_cast<int32_t>(h_kv), a.group = static_cast<int32_t>(group), a.d = static_cast<int32_t>(d);
  a.n_slot = static_cast<int32_t>(n_slot), a.per_slot = static_cast<uint32_t>((int64_t{1} << 31) / n_slot + 1),
  a.room = static_cast<int32_t>((max_pages * n_slot + 1 + 3) / 4 * 4);
  a.n_table = static_cast<int32_t>(std::min<int64_t>(max_pages, 4096));
  a.scale = x.scale, a.p = x.p, a.fraction = x.fraction, a.fit = x.estimator == Estimator::fit;
  // As many blocks as the SMs take at once; clusters of 16 are more than every GPU promises.
  a.log_blocks = stream.arch == 90 ? 3 : stream.arch > 90 ? 3 : 0;
  while (a.log_blocks > 0 && h_kv * n_entry << a.log_blocks > stream.n_sm) --a.log_blocks;
  const bool aligned = reinterpret_cast<uintptr_t>(x.k_pages.data) % 16 == 0;
  with_dtype(x.k_pages.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, float>) {
      if (aligned && !a.fit && d == 128) return run<T, 128, PRT_SELECT_THREADS>(stream, a, n_entry);
      if (aligned && !a.fit && d == 64) return run<T, 64, PRT_SELECT_THREADS>(stream, a, n_entry);
    }
    run<T, 0, 256>(stream, a, n_entry);
  });
}

}  // namespace prt::cuda
