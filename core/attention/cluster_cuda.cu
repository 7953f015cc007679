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
// What does not fit (f32, other head sizes, longer segments, other GPUs) goes to the plain form, cluster_any_cuda.cu.
// docs/kernels/cluster.md has the measurements, and what lost.
#include "attention/segment_cuda.cuh"
#include "cuda/hopper.cuh"
#include "cuda/mma.cuh"
#include "ops/cuda_table.h"

namespace prt::cuda {
namespace {

constexpr int kBlocks = 4, kWarps = 16, kThreads = 32 * kWarps;
constexpr int kUnit = kPage / (kWarps / 8);  // rows that a warp counts
constexpr int kTile = 64;                    // rows of keys, and of centroids, of one product

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

template <class T, int D>
void cluster_fast(const CudaStream& stream, const ClusterArgs& args, int64_t n_segment) {
  launch(stream, cluster_kernel<T, D>, dim3(kBlocks, static_cast<uint32_t>(args.h_kv), static_cast<uint32_t>(n_segment)), dim3(kThreads),
         Layout(args.n, args.k_clusters, D).bytes, args);
}

}  // namespace

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
  if (!fast) return cluster_any(stream, a, args);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    d == 64 ? cluster_fast<T, 64>(stream, args, a.pages.shape[0]) : cluster_fast<T, 128>(stream, args, a.pages.shape[0]);
  };
  type == DType::bf16 ? run(bf16{}) : run(f16{});
}

}  // namespace prt::cuda
