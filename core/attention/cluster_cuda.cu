// K-means of a segment's keys in the shared memory of a thread block cluster, and the rows' change of places.
//
// Four blocks take one segment and kv head, each the keys of a quarter of its pages: 2048 keys of 128 x 16 bits are 128 KB of each block's
// shared memory. An iteration:
//   assign   keys x centroids^T on the tensor cores, and the largest key.c - |c|^2 / 2 of each row
//   sort     the rows by cluster, stable: numbers within a warp's rows by match_any, warps' and blocks' counts added up, and every row
//   writes
//            itself to its place in `order`
//   update   a warp per cluster adds up its rows in f32. It reads them from device memory, that is, from L2: the shared memory of other
//            blocks gives 8 bytes a cycle when all SMs ask for it
// No float atomics: every sum has one order. The centroids are rounded to the keys' type, and their |c|^2 is that of the rounded ones.
//
// What does not fit (f32, other head sizes, longer segments, other GPUs) goes to the plain form at the end of this file.
// docs/kernels/cluster.md has the measurements, and what lost.
#include <cuda_fp8.h>

#include <algorithm>

#include "attention/segment_cuda.cuh"
#include "attention/sparse.h"
#include "cuda/hopper.cuh"
#include "cuda/mma.cuh"
#include "cuda/reduce.cuh"
#include "ops/cuda_table.h"

namespace prt::cuda {
namespace {

constexpr int kBlocks = 4, kWarps = 16, kThreads = 32 * kWarps;
constexpr int kUnit = kPage / (kWarps / 8);  // rows that a warp counts
constexpr int kTile = 64;                    // rows of keys, and of centroids, of one product

struct ClusterArgs {
  void *k, *v;           // [n_page][h_kv][64][d_head]
  const int32_t* pages;  // [n_segment], rows of pages_stride
  __nv_fp8_storage_t *centroid, *variance, *value;
  int32_t* range;
  uint16_t* order;
  uint64_t seed;
  int64_t pages_stride;
  int32_t h_kv, n_slot, n, k_clusters, iterations;  // n: pages of a segment

  __device__ Segment segment(int segment, int head) const { return {pages + segment * pages_stride, h_kv, head}; }
};

__device__ __forceinline__ uint64_t random_at(uint64_t seed, int i) {  // number i of splitmix64
  uint64_t z = seed + 0x9e3779b97f4a7c15u * static_cast<uint64_t>(i + 1);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Draws k different rows out of n as the CPU twin does, by changing places in a deck: the place that draw j takes its row from is pick[j],
// and what lay there then follows from the draws before. The whole block; put(j, row) of each.
template <class F>
__device__ __forceinline__ void draw_rows(int* pick, int k, int n, uint64_t seed, int head, F&& put) {
  seed += 0x632be59bd9b4e019u * static_cast<uint64_t>(head);
  for (int j = threadIdx.x; j < k; j += blockDim.x) pick[j] = j + static_cast<int>(random_at(seed, j) % static_cast<uint64_t>(n - j));
  __syncthreads();
  for (int j = threadIdx.x; j < k; j += blockDim.x) {
    int at = pick[j];
    for (int m = j - 1; m >= 0; --m)
      if (pick[m] == at) at = m;
    put(j, at);
  }
}

__device__ __forceinline__ int lanes_before(unsigned mask) { return __popc(mask & ((1u << threadIdx.x % 32) - 1)); }

__device__ __forceinline__ int scan_warp(int x) {  // inclusive
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const int y = __shfl_up_sync(kWarp, x, i);
    if (static_cast<int>(threadIdx.x % 32) >= i) x += y;
  }
  return x;
}

__device__ __forceinline__ __nv_fp8_storage_t to_f8(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }

template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t x) {
  if constexpr (std::is_same_v<T, bf16>) return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
  else return __half22float2(*reinterpret_cast<const __half2*>(&x));
}

// Shared memory of a block, in bytes from its start. Keys and centroids lie as the tensor cores want them (128-byte swizzle): tiles of 64
// rows, each of panels of 64 elements, and 16-byte piece p of row r of a panel in place p ^ r % 8.
struct Layout {
  int rows, k_pad;  // rows: of a block
  int centroids, bias, count, first, base, moved, hist, tiles, order, place, cluster_of, bytes;
  __host__ __device__ Layout(int n, int k, int d) {
    rows = (n + kBlocks - 1) / kBlocks * kPage, k_pad = (k + 2 * kTile - 1) / (2 * kTile) * (2 * kTile);
    centroids = rows * d * 2;                 // [k_pad] rows
    bias = centroids + k_pad * d * 2;         // [k_pad] f32: -|c|^2 / 2
    count = bias + 4 * k_pad;                 // [kBlocks][k_pad] i32: rows in each block
    first = count + 4 * kBlocks * k_pad;      // [k_pad + 1] i32: where the clusters begin
    base = first + 4 * (k_pad + 4);           // [k_pad] i32: where this block's rows of them do
    moved = base + 4 * k_pad;                 // [kBlocks] i32: did a row change its cluster?
    hist = moved + 4 * kBlocks;               // [rows / kUnit][k_pad] u16: rows of a unit; then those of the units before
    tiles = hist + 2 * rows / kUnit * k_pad;  // [kBlocks rows / 64] i32: of all pages of the segment
    order = tiles + 4 * kBlocks * rows / kPage;  // [rows] u16: block b has places b rows ... of the whole order
    place = order + 2 * rows;       // [rows] u16: rows of the same unit and cluster before; then the row's place in the order
    cluster_of = place + 2 * rows;  // [rows] u16
    bytes = cluster_of + 2 * rows;
  }
};

// A block of the cluster and what it holds. Lane l has elements 8 (l % kLanes) ... + 7 of a row; kGroups rows are read at a time.
template <class T, int D>
struct Block {
  static constexpr int kLanes = D / 8, kGroups = 32 / kLanes;

  const ClusterArgs& a;
  const Segment s;
  const Layout at;
  char* const shared;
  const int rank, warp, lane, group, piece;  // piece: of a row, 16 bytes, that is this lane's
  const int rows, n, k;  // rows: of a full block; n: of this block

  __device__ Block(const ClusterArgs& a, char* shared)
      : a(a),
        s(a.segment(blockIdx.z, blockIdx.y)),
        at(a.n, a.k_clusters, D),
        shared(shared),
        rank(static_cast<int>(cluster_rank())),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        group(lane / kLanes),
        piece(lane % kLanes),
        rows(at.rows),
        n(max(min(a.n * kPage - rank * rows, rows), 0)),
        k(a.k_clusters) {}

  // Loads and stores in the shared memory of any block of the cluster.
  static __device__ __forceinline__ int load_cluster_u16(uint32_t at) {
    uint16_t x = 0;
#ifdef PRT_SM90
    asm volatile("ld.shared::cluster.u16 %0, [%1];" : "=h"(x) : "r"(at) : "memory");
#endif
    return x;
  }
  static __device__ __forceinline__ void store_cluster(uint32_t at, uint4 x) {
#ifdef PRT_SM90
    asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
#endif
  }
  static __device__ __forceinline__ void store_cluster(uint32_t at, int x) {
#ifdef PRT_SM90
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
#endif
  }
  static __device__ __forceinline__ void store_cluster(uint32_t at, uint16_t x) {
#ifdef PRT_SM90
    asm volatile("st.shared::cluster.u16 [%0], %1;" ::"r"(at), "h"(x) : "memory");
#endif
  }

  // Of the cluster, after stores to any block's shared memory that the tensor cores are to read.
  static __device__ __forceinline__ void sync_for_products() {
#ifdef PRT_SM90
    asm volatile("fence.proxy.async;" ::: "memory");
    cluster_sync();
    asm volatile("fence.proxy.async;" ::: "memory");
#endif
  }

  template <class X>
  __device__ X* part(int offset) const {
    return reinterpret_cast<X*>(shared + offset);
  }
  static __device__ int piece_at(int row, int piece) {
    return (row / kTile * (D / 64) + piece / 8) * 8192 + row % kTile * 128 + (piece % 8 ^ row % 8) * 16;
  }
  __device__ uint32_t order_address(int place) const { return cluster_addr(part<uint16_t>(at.order) + place % rows, place / rows); }

  __device__ void load_rows(const void* from) const {
    for (int i = threadIdx.x; i < n * (D / 8); i += kThreads) {
      const int row = i / (D / 8), c = i % (D / 8);
      cp_async_16(smem_addr(shared + piece_at(row, c)), static_cast<const T*>(from) + s.row(rank * rows + row) * D + 8 * c);
    }
    cp_async_commit();
  }

  // Where a row of the segment is in device memory, in rows.
  __device__ int row_at(int row) const { return part<int>(at.tiles)[row / kPage] * kPage + row % kPage; }

  // mean[e] of f(x[e], e) over the rows at places [begin, end) of the order; every group gets it. kStored: rows are at their places
  // already. Past the end the last row is read again, and weighs nothing: a load on a condition would wait for the one before.
  template <bool kStored, class F>
  __device__ void mean_of(float (&mean)[8], const void* from, int begin, int end, F&& f) const {
    constexpr int kEach = 16 / kGroups;
    const char* base = static_cast<const char*>(from) + piece * 16;
#pragma unroll
    for (float& m : mean) m = 0;
    for (int p = begin; p < end; p += 32) {
      const int mine = min(p + lane, end - 1), row = row_at(kStored ? mine : load_cluster_u16(order_address(mine)));
      for (int half = 0; half < 32 && p + half < end; half += 16) {
        uint4 x[kEach];
#pragma unroll
        for (int i = 0; i < kEach; ++i)
          x[i] = __ldcg(reinterpret_cast<const uint4*>(base + int64_t{__shfl_sync(kWarp, row, half + i * kGroups + group)} * (D * 2)));
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const float weight = p + half + i * kGroups + group < end ? 1 : 0;
          const uint32_t w[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
          for (int e = 0; e < 8; e += 2) {
            const float2 pair = unpack2<T>(w[e / 2]);
            mean[e] = fmaf(f(pair.x, e), weight, mean[e]), mean[e + 1] = fmaf(f(pair.y, e + 1), weight, mean[e + 1]);
          }
        }
      }
    }
#pragma unroll
    for (int step = kLanes; step < 32; step *= 2)
#pragma unroll
      for (int e = 0; e < 8; ++e) mean[e] += __shfl_xor_sync(kWarp, mean[e], step);
    const float share = 1 / static_cast<float>(max(end - begin, 1));
#pragma unroll
    for (float& m : mean) m *= share;
  }

  // Clusters are dealt out to the warps of all blocks.
  template <class F>
  __device__ void for_clusters(F&& f) const {
    const int* first = part<int>(at.first);
    for (int j = warp * kBlocks + rank; j < k; j += kBlocks * kWarps) f(j, first[j], first[j + 1]);
  }

  __device__ void update() const {
    for_clusters([&](int j, int begin, int end) {
      if (begin == end) return;
      float mean[8], square = 0;
      mean_of<false>(mean, a.k, begin, end, [](float x, int) { return x; });
      uint32_t w[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        w[e] = pack2<T>(mean[2 * e], mean[2 * e + 1]);
        const float2 rounded = unpack2<T>(w[e]);
        square += rounded.x * rounded.x + rounded.y * rounded.y;
      }
      square = warp_sum<kLanes>(square);
      for (int b = group; b < kBlocks; b += kGroups) {
        store_cluster(cluster_addr(shared + at.centroids + piece_at(j, piece), b), uint4{w[0], w[1], w[2], w[3]});
        if (piece == 0) store_cluster(cluster_addr(part<float>(at.bias) + j, b), __float_as_int(square * -0.5f));
      }
    });
  }

  // The nearest centroid of each row goes to cluster_of, -> some row changed its cluster. The lowest number wins ties. Warpgroup by 64
  // rows; while it looks at the scores of 64 centroids, the tensor cores are at others.
  __device__ bool assign() const {
    constexpr int kGroups = kWarps / 4;
    const int c = lane % 4;
    const uint64_t keys = wgmma_desc(shared), centroids = wgmma_desc(shared + at.centroids);
    bool changed = false;
    for (int tile = __shfl_sync(kWarp, warp / 4, 0); tile < n / kTile; tile += kGroups) {
      float score[2][kTile / 2], best[2] = {-INFINITY, -INFINITY};
      int nearest[2] = {};
      const auto multiply = [&](float (&s)[kTile / 2], int j) {
        wgmma_keep(s);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
          const int step = i / 4 * 512 + i % 4 * 2;
          Wgmma<kTile, T>::mma(s, keys + tile * (D / 64 * 512) + step, centroids + j * (D / 64 * 8) + step, i > 0);
        }
        wgmma_commit();
      };
      const auto look = [&](float (&s)[kTile / 2], int j) {
        wgmma_keep(s);
#pragma unroll
        for (int i = 0; i < kTile / 2; i += 4) {
          const float2 bias = *reinterpret_cast<const float2*>(part<float>(at.bias) + j + 2 * i + 2 * c);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float value = s[i + e] + (e % 2 ? bias.y : bias.x);
            if (value > best[e / 2]) best[e / 2] = value, nearest[e / 2] = j + 2 * i + 2 * c + e % 2;
          }
        }
      };
      for (int j = 0; j < k; j += 2 * kTile) {
        multiply(score[0], j);
        multiply(score[1], j + kTile);
        wgmma_wait<1>();
        look(score[0], j);
        wgmma_wait<0>();
        look(score[1], j + kTile);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int lanes = 1; lanes < 4; lanes *= 2) {
          const float other = __shfl_xor_sync(kWarp, best[h], lanes);
          const int number = __shfl_xor_sync(kWarp, nearest[h], lanes);
          if (other > best[h] || (other == best[h] && number < nearest[h])) best[h] = other, nearest[h] = number;
        }
        uint16_t& cluster = part<uint16_t>(at.cluster_of)[tile * kTile + warp % 4 * 16 + 8 * h + lane / 4];
        if (c == 0) changed |= cluster != nearest[h], cluster = static_cast<uint16_t>(nearest[h]);
      }
    }
    return changed;
  }

  // How many rows of each cluster a unit has, and each row's number among them.
  __device__ void count(int unit) const {
    uint16_t* hist = part<uint16_t>(at.hist) + unit * at.k_pad;
    for (int j = 2 * lane; j < at.k_pad; j += 64) *reinterpret_cast<uint32_t*>(hist + j) = 0;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kUnit; i += 32) {
      const int row = unit * kUnit + i + lane, j = part<uint16_t>(at.cluster_of)[row];
      const unsigned same = __match_any_sync(kWarp, j);
      const int before = hist[j];
      part<uint16_t>(at.place)[row] = static_cast<uint16_t>(before + lanes_before(same));
      __syncwarp();
      if (lanes_before(same) == 0) hist[j] = static_cast<uint16_t>(before + __popc(same));
      __syncwarp();
    }
  }

  __device__ void tell_counts(bool changed) const {
    uint16_t* hist = part<uint16_t>(at.hist);
    for (int j = threadIdx.x; j < k; j += kThreads) {
      int sum = 0;
      for (int unit = 0; unit < n / kUnit; ++unit) {
        const int here = hist[unit * at.k_pad + j];
        hist[unit * at.k_pad + j] = static_cast<uint16_t>(sum);
        sum += here;
      }
      for (int b = 0; b < kBlocks; ++b) store_cluster(cluster_addr(part<int>(at.count) + rank * at.k_pad + j, b), sum);
    }
    if (threadIdx.x < kBlocks) store_cluster(cluster_addr(part<int>(at.moved) + rank, threadIdx.x), changed ? 1 : 0);
  }

  // Where clusters begin, from all blocks' counts; then every row goes to its place.
  __device__ void sort() const {
    const int *count = part<int>(at.count), *base = part<int>(at.base);
    for (int block = 32 * warp; block < k; block += kThreads) {
      int before = 0;
      for (int i = lane; i < block; i += 32)
        for (int b = 0; b < kBlocks; ++b) before += count[b * at.k_pad + i];
      before = warp_sum(before);
      const int j = block + lane;
      int total = 0, others = 0;  // others: in the blocks before this one
      for (int b = 0; b < kBlocks && j < k; ++b) {
        if (b == rank) others = total;
        total += count[b * at.k_pad + j];
      }
      const int begin = before + scan_warp(total) - total;
      if (j < k) part<int>(at.first)[j] = begin, part<int>(at.base)[j] = begin + others;
    }
    if (threadIdx.x == 0) part<int>(at.first)[k] = a.n * kPage;
    __syncthreads();
    for (int row = threadIdx.x; row < n; row += kThreads) {
      const int j = part<uint16_t>(at.cluster_of)[row];
      const int place = base[j] + part<uint16_t>(at.hist)[row / kUnit * at.k_pad + j] + part<uint16_t>(at.place)[row];
      part<uint16_t>(at.place)[row] = static_cast<uint16_t>(place);
      store_cluster(order_address(place), static_cast<uint16_t>(rank * rows + row));
    }
  }

  __device__ void k_means() const {
    for (int i = threadIdx.x; i < rows; i += kThreads) part<uint16_t>(at.cluster_of)[i] = 0xffff;
    for (int i = threadIdx.x; i < a.n; i += kThreads) part<int>(at.tiles)[i] = static_cast<int>(s.tile(i));
    for (int i = threadIdx.x; i < (at.k_pad - k) * (D / 8); i += kThreads)
      *part<uint4>(at.centroids + piece_at(k + i / (D / 8), i % (D / 8))) = uint4{};
    for (int j = k + threadIdx.x; j < at.k_pad; j += kThreads) part<float>(at.bias)[j] = -INFINITY;
    // The first centroids are means too, of clusters of one row.
    draw_rows(part<int>(at.base), k, a.n * kPage, a.seed, s.head, [&](int j, int row) {
      part<int>(at.first)[j] = j;
      if (j / rows == rank) part<uint16_t>(at.order)[j % rows] = static_cast<uint16_t>(row);
    });
    if (threadIdx.x == 0) part<int>(at.first)[k] = k;
    cluster_sync();
    update();
    cp_async_wait<0>();
    sync_for_products();
    for (int i = 0; i < a.iterations; ++i) {
      const bool changed = __syncthreads_or(assign()) != 0;
      for (int unit = warp; unit < n / kUnit; unit += kWarps) count(unit);
      __syncthreads();
      tell_counts(changed);
      cluster_sync();
      int moved = 0;
      for (int b = 0; b < kBlocks; ++b) moved |= part<int>(at.moved)[b];
      sort();
      cluster_sync();
      if (moved == 0) break;
      update();
      sync_for_products();
    }
  }

  __device__ void put_f8(__nv_fp8_storage_t* to, int j, const float (&x)[8]) const {
    uint32_t w[2] = {};
#pragma unroll
    for (int e = 0; e < 8; ++e) w[e / 4] |= static_cast<uint32_t>(to_f8(x[e])) << e % 4 * 8;
    *reinterpret_cast<uint2*>(to + s.slot(j, a.n_slot) * D + piece * 8) = uint2{w[0], w[1]};
  }

  // This block's rows go to their places.
  __device__ void put_rows(void* to) const {
    constexpr int kEach = 16 / kGroups;
    for (int row = kEach * kGroups * warp; row < n; row += kEach * kGroups * kWarps) {
      uint4 x[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) x[i] = *part<uint4>(piece_at(row + i * kGroups + group, piece));
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int64_t place = row_at(part<uint16_t>(at.place)[row + i * kGroups + group]);
        *reinterpret_cast<uint4*>(static_cast<char*>(to) + place * D * 2 + piece * 16) = x[i];
      }
    }
  }
};

// Block (block of the cluster, kv head, segment).
template <class T, int D>
__global__ void PRT_CLUSTER(kBlocks) __launch_bounds__(kThreads, 1) cluster_kernel(const __grid_constant__ ClusterArgs a) {
#ifdef PRT_SM90A
  extern __shared__ __align__(1024) char shared[];
  const Block<T, D> block(a, shared);
  pdl_wait();
  block.load_rows(a.k);
  block.k_means();
  pdl_launch();

  // All reads of the keys as they were are over: the rows change places, the values come into shared memory.
  for (int i = threadIdx.x; i < block.n; i += kThreads)
    a.order[block.row_at(block.rank * block.rows + i)] = block.template part<uint16_t>(block.at.order)[i];
  block.put_rows(a.k);
  __syncthreads();
  block.load_rows(a.v);
  cluster_sync();
  block.for_clusters([&](int j, int begin, int end) {
    float mean[8], variance[8];
    block.template mean_of<true>(mean, a.k, begin, end, [](float x, int) { return x; });
    block.template mean_of<true>(variance, a.k, begin, end, [&](float x, int e) { return (x - mean[e]) * (x - mean[e]); });
    if (block.group == 0) block.put_f8(a.centroid, j, mean);
    else if (block.group == 1) block.put_f8(a.variance, j, variance);
    if (block.lane == 0) {
      int* range = a.range + block.s.slot(j, a.n_slot) * 2;
      range[0] = begin - j / a.n_slot * kPage, range[1] = end - begin;
    }
  });
  cp_async_wait<0>();
  cluster_sync();
  block.put_rows(a.v);
  cluster_sync();
  block.for_clusters([&](int j, int begin, int end) {
    float mean[8];
    block.template mean_of<true>(mean, a.v, begin, end, [](float x, int) { return x; });
    if (block.group == 0) block.put_f8(a.value, j, mean);
  });
#endif
}

// ---- The plain form: everything in scratch, f32 centroids, a launch per step. `iterations` are queued; once nothing changes they leave.
constexpr int kPlainWarps = 8, kPlainThreads = 32 * kPlainWarps, kSortWarps = 32;

struct Plain {
  float *centroid, *bias;  // [k][d], [k]
  int32_t *cluster_of, *first, *hist, *state;  // [n rows], [k + 1], [kSortWarps][k], {changed, done}
  char* copy;  // [n rows][d]
  static __host__ __device__ int64_t bytes(int64_t n, int64_t k, int64_t d) {  // n: rows
    return (4 * (k * d + k + n + k + 1 + kSortWarps * k + 2) + 15) / 16 * 16 + 4 * n * d;
  }
  __device__ Plain(char* base, int64_t n, int64_t k, int64_t d) {
    centroid = reinterpret_cast<float*>(base);
    bias = centroid + k * d;
    cluster_of = reinterpret_cast<int32_t*>(bias + k);
    first = cluster_of + n;
    hist = first + k + 1;
    state = hist + kSortWarps * k;
    copy = base + bytes(n, k, d) - 4 * n * d;
  }
};

struct PlainArgs : ClusterArgs {
  char* scratch;  // one part per kv head of this launch
  int32_t d, item0;
};

// A thread block's segment and kv head, blockIdx.y of the launch.
struct Item {
  const PlainArgs& a;
  const int item, n, k;
  const Segment s;
  const Plain w;
  __device__ explicit Item(const PlainArgs& a)
      : a(a),
        item(a.item0 + static_cast<int>(blockIdx.y)),
        n(a.n * kPage),
        k(a.k_clusters),
        s(a.segment(item / a.h_kv, item % a.h_kv)),
        w(a.scratch + blockIdx.y * Plain::bytes(n, k, a.d), n, k, a.d) {}
};

__global__ void __launch_bounds__(kPlainThreads) plain_draw_kernel(const __grid_constant__ PlainArgs a) {
  pdl_wait();
  pdl_launch();
  const Item i(a);
  draw_rows(i.w.cluster_of, i.k, i.n, a.seed, i.s.head, [&](int j, int row) {
    i.w.first[j] = j;
    a.order[i.s.row(j)] = static_cast<uint16_t>(row);
  });
  if (threadIdx.x == 0) i.w.first[i.k] = i.k, i.w.state[0] = i.w.state[1] = 0;
  __syncthreads();
  for (int r = threadIdx.x; r < i.n; r += kPlainThreads) i.w.cluster_of[r] = -1;
}

// Warp by cluster: its mean, as a centroid of the iteration or with kIndex as the index's, of keys (then with variance and range) or
// values.
template <class T, bool kIndex>
__global__ void __launch_bounds__(kPlainThreads) plain_mean_kernel(const __grid_constant__ PlainArgs a, bool keys) {
  pdl_wait();
  pdl_launch();
  const Item i(a);
  const int j = static_cast<int>(blockIdx.x) * kPlainWarps + static_cast<int>(threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (j >= i.k || (!kIndex && i.w.state[1] != 0)) return;
  const int begin = i.w.first[j], end = i.w.first[j + 1];
  if (!kIndex && begin == end) return;
  const T* from = static_cast<const T*>(keys ? a.k : a.v);
  const float n = static_cast<float>(max(end - begin, 1));
  const auto mean_of = [&](int e, auto&& f) {
    float sum = 0;
    for (int p = begin; p < end; ++p) sum += f(to_float(from[i.s.row(a.order[i.s.row(p)]) * a.d + e]));
    return sum / n;
  };
  float square = 0;
  for (int e = lane; e < a.d; e += 32) {
    const float mean = mean_of(e, [](float x) { return x; });
    if constexpr (!kIndex) i.w.centroid[j * a.d + e] = mean, square += mean * mean;
    else {
      const int64_t at = i.s.slot(j, a.n_slot) * a.d + e;
      (keys ? a.centroid : a.value)[at] = to_f8(mean);
      if (keys) a.variance[at] = to_f8(mean_of(e, [&](float x) { return (x - mean) * (x - mean); }));
    }
  }
  if constexpr (!kIndex) {
    square = warp_sum(square);
    if (lane == 0) i.w.bias[j] = square * -0.5f;
  } else if (keys && lane == 0) {
    int* range = a.range + i.s.slot(j, a.n_slot) * 2;
    range[0] = begin - j / a.n_slot * kPage, range[1] = end - begin;
  }
}

// Block by page: 64 keys against 64 centroids at a time, 4 x 4 per thread.
template <class T>
__global__ void __launch_bounds__(kPlainThreads) plain_assign_kernel(const __grid_constant__ PlainArgs a) {
  constexpr int kStep = 16;
  __shared__ float xs[kStep][kPage + 4], cs[kStep][kPage + 4];
  pdl_wait();
  pdl_launch();
  const Item i(a);
  if (i.w.state[1] != 0) return;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16, row0 = static_cast<int>(blockIdx.x) * kPage;
  const T* keys = static_cast<const T*>(a.k) + i.s.row(row0) * a.d;
  float best[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
  int nearest[4] = {};
  for (int j0 = 0; j0 < i.k; j0 += kPage) {
    float sum[4][4] = {};
    for (int e0 = 0; e0 < a.d; e0 += kStep) {
      __syncthreads();
      for (int t = threadIdx.x; t < kPage * kStep; t += kPlainThreads) {
        const int e = e0 + t % kStep, r = t / kStep;
        xs[t % kStep][r] = e < a.d ? to_float(keys[r * a.d + e]) : 0;
        cs[t % kStep][r] = e < a.d && j0 + r < i.k ? i.w.centroid[(j0 + r) * int64_t{a.d} + e] : 0;
      }
      __syncthreads();
#pragma unroll
      for (int e = 0; e < kStep; ++e)
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int c = 0; c < 4; ++c) sum[r][c] += xs[e][4 * ty + r] * cs[e][4 * tx + c];
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int j = j0 + 4 * tx + c;
      if (j >= i.k) continue;
      const float bias = i.w.bias[j];
#pragma unroll
      for (int r = 0; r < 4; ++r)
        if (sum[r][c] + bias > best[r]) best[r] = sum[r][c] + bias, nearest[r] = j;
    }
  }
  bool changed = false;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int step = 1; step < 16; step *= 2) {
      const float other = __shfl_xor_sync(kWarp, best[r], step);
      const int number = __shfl_xor_sync(kWarp, nearest[r], step);
      if (other > best[r] || (other == best[r] && number < nearest[r])) best[r] = other, nearest[r] = number;
    }
    if (tx != 0) continue;
    int& cluster = i.w.cluster_of[row0 + 4 * ty + r];
    changed |= cluster != nearest[r];
    cluster = nearest[r];
  }
  if (__syncthreads_or(changed) && threadIdx.x == 0) i.w.state[0] = 1;
}

// One block: rows by cluster, stable. Each warp counts and then places a stretch of the rows.
__global__ void __launch_bounds__(32 * kSortWarps) plain_sort_kernel(const __grid_constant__ PlainArgs a) {
  __shared__ int totals[kSortWarps];
  pdl_wait();
  pdl_launch();
  const Item i(a);
  const bool changed = i.w.state[0] != 0, done = i.w.state[1] != 0;
  __syncthreads();
  if (threadIdx.x == 0) i.w.state[0] = 0, i.w.state[1] = !changed;
  if (done || !changed) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, per_warp = i.n / kSortWarps, row0 = warp * per_warp;
  int* hist = i.w.hist + int64_t{warp} * i.k;
  for (int t = threadIdx.x; t < kSortWarps * i.k; t += blockDim.x) i.w.hist[t] = 0;
  __syncthreads();
  const auto for_rows = [&](auto&& f) {
    for (int r = 0; r < per_warp; r += 32) {
      const bool valid = r + lane < per_warp;
      const int j = valid ? i.w.cluster_of[row0 + r + lane] : -1;
      const unsigned same = __match_any_sync(kWarp, j);
      const int before = valid ? hist[j] : 0;
      if (valid) f(row0 + r + lane, before + lanes_before(same));
      __syncwarp();
      if (valid && lanes_before(same) == 0) hist[j] = before + __popc(same);
      __syncwarp();
    }
  };
  for_rows([](int, int) {});
  __syncthreads();
  for (int j0 = 0, carry = 0; j0 < i.k; j0 += blockDim.x) {
    const int j = j0 + static_cast<int>(threadIdx.x);
    int total = 0;
    for (int w = 0; w < kSortWarps && j < i.k; ++w) total += i.w.hist[w * int64_t{i.k} + j];
    const int until = scan_warp(total);
    if (lane == 31) totals[warp] = until;
    __syncthreads();
    int at = carry + until - total;
    for (int w = 0; w < kSortWarps; ++w) {
      if (w < warp) at += totals[w];
      carry += totals[w];
    }
    if (j < i.k) i.w.first[j] = at;
    for (int w = 0; w < kSortWarps && j < i.k; ++w) {
      int& count = i.w.hist[w * int64_t{i.k} + j];
      const int here = count;
      count = at;
      at += here;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) i.w.first[i.k] = i.n;
  for_rows([&](int row, int place) { a.order[i.s.row(place)] = static_cast<uint16_t>(row); });
}

// Rows change places by way of the copy. Block by page.
template <class Word, bool kBack>
__global__ void __launch_bounds__(kPlainThreads) plain_permute_kernel(const __grid_constant__ PlainArgs a, bool keys, int words) {
  pdl_wait();
  pdl_launch();
  const Item i(a);
  const int page = static_cast<int>(blockIdx.x);
  Word *copy = reinterpret_cast<Word*>(i.w.copy), *tile = static_cast<Word*>(keys ? a.k : a.v) + i.s.tile(page) * kPage * words;
  for (int t = threadIdx.x; t < kPage * words; t += kPlainThreads) {
    if constexpr (kBack) tile[t] = copy[a.order[i.s.row(page * kPage + t / words)] * int64_t{words} + t % words];
    else copy[page * int64_t{kPage} * words + t] = tile[t];
  }
}

template <class T>
void cluster_plain(const CudaStream& stream, const Cluster& a, const ClusterArgs& shared) {
  const int64_t d = a.k_pages.shape[3], part = Plain::bytes(int64_t{shared.n} * kPage, shared.k_clusters, d);
  const int64_t n_item = a.pages.shape[0] * shared.h_kv, at_once = std::min(n_item, a.scratch.bytes() / part);
  PlainArgs args{shared, a.scratch.as<char>(), static_cast<int32_t>(d), 0};
  for (int64_t item = 0; item < n_item; item += at_once) {
    args.item0 = static_cast<int32_t>(item);
    const auto items = static_cast<uint32_t>(std::min(at_once, n_item - item)), pages = static_cast<uint32_t>(shared.n),
               clusters = static_cast<uint32_t>((shared.k_clusters + kPlainWarps - 1) / kPlainWarps);
    launch(stream, plain_draw_kernel, dim3(1, items), dim3(kPlainThreads), 0, args);
    launch(stream, plain_mean_kernel<T, false>, dim3(clusters, items), dim3(kPlainThreads), 0, args, true);
    for (int i = 0; i < shared.iterations; ++i) {
      launch(stream, plain_assign_kernel<T>, dim3(pages, items), dim3(kPlainThreads), 0, args);
      launch(stream, plain_sort_kernel, dim3(1, items), dim3(32 * kSortWarps), 0, args);
      launch(stream, plain_mean_kernel<T, false>, dim3(clusters, items), dim3(kPlainThreads), 0, args, true);
    }
    for (const bool keys : {true, false}) {
      launch(stream, plain_mean_kernel<T, true>, dim3(clusters, items), dim3(kPlainThreads), 0, args, keys);
      with_row_word(a.k_pages, a.v_pages, [&](auto word) {
        using Word = decltype(word);
        const auto words = static_cast<int>(d * static_cast<int64_t>(sizeof(T)) / static_cast<int64_t>(sizeof(Word)));
        launch(stream, plain_permute_kernel<Word, false>, dim3(pages, items), dim3(kPlainThreads), 0, args, keys, words);
        launch(stream, plain_permute_kernel<Word, true>, dim3(pages, items), dim3(kPlainThreads), 0, args, keys, words);
      });
    }
  }
}

template <class T, int D>
void cluster_fast(const CudaStream& stream, const ClusterArgs& args, int64_t n_segment) {
  launch(stream, cluster_kernel<T, D>, dim3(kBlocks, static_cast<uint32_t>(args.h_kv), static_cast<uint32_t>(n_segment)), dim3(kThreads),
         Layout(args.n, args.k_clusters, D).bytes, args);
}

}  // namespace

// Of the plain form, for as many kv heads at a time as fit in 32 MiB, at least one. The fast form needs none.
int64_t cluster_scratch_bytes(const CudaStream&, int64_t n_page, int64_t n_slot, int64_t d_head) {
  const int64_t part = Plain::bytes(n_page * kPage, n_page * n_slot, d_head);
  return part * std::clamp<int64_t>((int64_t{32} << 20) / part, 1, 16);
}

void cluster(const CudaStream& stream, const Cluster& a) {
  const int64_t d = a.k_pages.shape[3], n = a.pages.shape[1], n_slot = a.index.centroid.shape[2];
  const DType type = a.k_pages.dtype;
  const ClusterArgs args{a.k_pages.data,
                         a.v_pages.data,
                         a.pages.as<int32_t>(),
                         a.index.centroid.as<__nv_fp8_storage_t>(),
                         a.index.variance.as<__nv_fp8_storage_t>(),
                         a.index.value.as<__nv_fp8_storage_t>(),
                         a.index.range.as<int32_t>(),
                         a.index.order.as<uint16_t>(),
                         a.seed,
                         a.pages.row_stride,
                         static_cast<int32_t>(a.k_pages.shape[1]),
                         static_cast<int32_t>(n_slot),
                         static_cast<int32_t>(n),
                         static_cast<int32_t>(n * n_slot),
                         static_cast<int32_t>(a.iterations)};
  const auto aligned = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data) % 16 == 0; };
  const bool fast = stream.arch == 90 && type != DType::f32 && (d == 64 || d == 128) && aligned(a.k_pages) && aligned(a.v_pages) &&
                    aligned(a.index.centroid) && aligned(a.index.variance) && aligned(a.index.value) &&
                    Layout(args.n, args.k_clusters, static_cast<int>(d)).bytes <= stream.smem_per_block;
  with_dtype(type, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, float>)
      if (fast) return d == 64 ? cluster_fast<T, 64>(stream, args, a.pages.shape[0]) : cluster_fast<T, 128>(stream, args, a.pages.shape[0]);
    cluster_plain<T>(stream, a, args);
  });
}

}  // namespace prt::cuda
