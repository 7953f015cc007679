// The matrix product of a decode step, 1 to 64 rows, on Hopper: bound by reading the weights once. docs/kernels/linear_rows.md has the
// measurements.
//
// The copy engine streams boxes of 128 weight rows x 64 columns through a ring in shared memory, and the tensor cores read them where they
// lie: weight rows are the M side of the products, rows of x the N side, so that 8 rows cost what 1 costs. The ring fills with weights,
// which no kernel writes, before pdl_wait(). The columns of an output are dealt to several blocks, whose sums meet in one of two ways:
//   cluster_kernel  four blocks of a cluster have a quarter of the columns each, send each other their sums straight into shared memory,
//                   and finish a quarter of the outputs each.
//   shared_kernel   all blocks read the same number of boxes, 128 outputs may lie in several, and the last of those to arrive adds the
//                   parts up. Every multiprocessor has the same work, which for one or two rows is worth more than the detour of the parts.
// Parts are always added in the order of the blocks.
#pragma once
#include "cuda/hopper.cuh"
#include "cuda/launch.cuh"
#include "cuda/types.cuh"
#include "ops/cuda_table.h"

namespace prt::cuda::rows_sm90 {

namespace {

constexpr int kTileRows = 128, kTileIn = 64, kWeightBytes = kTileRows * kTileIn * 2;
constexpr int kNormPieces = 2, kNormRows = 8, kWholePieces = 8;  // of the norm: float4 a thread holds of a row, and rows at a time
constexpr int kCluster = 4, kConsumers = 128, kThreads = kConsumers + 32, kMaxStages = 12;
constexpr int64_t kSharedRows = 2;  // up to here large products are shared_kernel's
constexpr int64_t kSmem = 112 << 10;  // of 227 KB: the next kernel's block is already there, filling its ring

struct Problem {
  const float* x;  // kNorm
  const float* norm;  // kNorm
  const float* bias;
  void* out;
  float* partial;  // shared_kernel: [2 n_block][n_row][kTileRows]
  uint32_t* counters;  // shared_kernel: [n_tile]
  int64_t ld_x, ld_out;
  float norm_eps;
  int n_row, n_in, n_out;  // n_out after the gate
  int n_tile, n_chunk;  // chunks per tile
  int n_stage;
  bool accumulate, gated, out_f32, launch_early;
};

template <int kN, class T>
struct Product : Wgmma<kN, T> {};
#ifdef PRT_SM90A
#define PRT_ROWS_ASM(...) asm volatile(__VA_ARGS__)
#else
#define PRT_ROWS_ASM(...)
#endif
#define PRT_PRODUCT(T, NAME)                                                                                                              \
  template <>                                                                                                                             \
  struct Product<8, T> {                                                                                                                  \
    static __device__ __forceinline__ void mma(float (&d)[4], uint64_t a, uint64_t b, int accumulate) {                                   \
      PRT_ROWS_ASM("{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\nwgmma.mma_async.sync.aligned.m64n8k16.f32." NAME "." NAME                    \
                   " {%0,%1,%2,%3}, %4, %5, p, 1, 1, 0, 0;\n}" : "+f"(d[0]),                                                              \
                   "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b), "r"(accumulate));                                                 \
    }                                                                                                                                     \
  };                                                                                                                                      \
  template <>                                                                                                                             \
  struct Product<16, T> {                                                                                                                 \
    static __device__ __forceinline__ void mma(float (&d)[8], uint64_t a, uint64_t b, int accumulate) {                                   \
      PRT_ROWS_ASM("{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\nwgmma.mma_async.sync.aligned.m64n16k16.f32." NAME "." NAME                  \
                   " {%0,%1,%2,%3,%4,%5,%6,%7}, %8, %9, p, 1, 1, 0, 0;\n}" : "+f"(d[0]),                                                  \
                   "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]) : "l"(a), "l"(b), "r"(accumulate)); \
    }                                                                                                                                     \
  };
PRT_PRODUCT(bf16, "bf16")
PRT_PRODUCT(f16, "f16")

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

// old: what out held, where the product is added to it.
template <class T>
__device__ __forceinline__ void store_out(const Problem& p, int row, int out, float v, float up, float old) {
  if (row >= p.n_row || out >= p.n_out) return;
  if (p.bias) v += __ldg(p.bias + out);
  if (p.gated) v = silu(v) * (up + (p.bias ? __ldg(p.bias + p.n_out + out) : 0.0f));
  const int64_t i = row * p.ld_out + out;
  if (p.out_f32) static_cast<float*>(p.out)[i] = old + v;
  else static_cast<T*>(p.out)[i] = from_float<T>(v);
}
__device__ __forceinline__ float load_old(const Problem& p, int row, int out) {
  return p.accumulate && row < p.n_row && out < p.n_out ? __ldcg(static_cast<float*>(p.out) + row * p.ld_out + out) : 0.0f;
}

// A box times its columns of x; acc[m] is half m of its rows.
template <int kN, class T>
__device__ __forceinline__ void multiply(float (&acc)[2][kN / 2], const char* box, uint64_t x, uint64_t x_step) {
  const uint64_t w = wgmma_desc(box);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kTileIn / 16; ++k)
#pragma unroll
    for (int m = 0; m < 2; ++m) Product<kN, T>::mma(acc[m], w + 512 * m + 2 * k, x + k * x_step, 1);
  wgmma_commit();
  wgmma_wait<0>();
}

__host__ __device__ constexpr int core_bytes(int n_row) { return (n_row | 1) * 16; }  // odd: fewer bank conflicts

// x as plain rows of 8 columns: those of row r + 1 follow those of row r, the next 8 columns are core bytes further. Products run past the
// last row, into columns of the result that nobody looks at.
__device__ __forceinline__ uint64_t plain_desc(const char* x, int core) {
  return uint64_t{(smem_addr(x) & 0x3ffff) >> 4} | uint64_t{static_cast<uint32_t>(core) >> 4} << 16 | uint64_t{128 >> 4} << 32;
}

// ---- cluster_kernel

// Floats into the shared memory of a block of the cluster, counted by a barrier beside them.
__device__ __forceinline__ void send(uint32_t to, uint32_t bar, float v) {
#ifdef PRT_SM90A
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to), "f"(v), "r"(bar) : "memory");
#endif
}
__device__ __forceinline__ void send(uint32_t to, uint32_t bar, float2 v) {
#ifdef PRT_SM90A
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to), "f"(v.x), "f"(v.y),
               "r"(bar)
               : "memory");
#endif
}
__device__ __forceinline__ void cluster_arrive() {
#ifdef PRT_SM90A
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#ifdef PRT_SM90A
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// At another block's barrier, after reads that are complete; it orders nothing else.
__device__ __forceinline__ void arrive_at(uint64_t* bar, uint32_t cta) {
#ifdef PRT_SM90A
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(cluster_addr(bar, cta)) : "memory");
#endif
}

struct NormRoom {
  float warps[kConsumers / 32][kNormRows], ranks[kCluster][kNormRows];  // sums of squares
  uint64_t full;
};

// This block's columns of x, normed and rounded, to shared memory as plain_desc reads it. The blocks tell each other their sums of squares.
template <class T>
__device__ void norm_columns(const Problem& p, char* xs, NormRoom& room, int rank, int first, int n_chunk) {
  const int tid = threadIdx.x, core = core_bytes(p.n_row);
  float4 w[kNormPieces], v[kNormRows][kNormPieces];
  auto column = [&](int i) { return (i * kConsumers + tid) * 4; };
  auto valid = [&](int i) { return column(i) < n_chunk * kTileIn && first * kTileIn + column(i) < p.n_in; };
#pragma unroll
  for (int i = 0; i < kNormPieces; ++i)
    w[i] = valid(i) ? __ldg(reinterpret_cast<const float4*>(p.norm + first * kTileIn + column(i))) : float4{};
  cluster_wait();
  pdl_wait();
#pragma unroll
  for (int r = 0; r < kNormRows; ++r)
#pragma unroll
    for (int i = 0; i < kNormPieces; ++i)
      v[r][i] =
          r < p.n_row && valid(i) ? __ldcg(reinterpret_cast<const float4*>(p.x + r * p.ld_x + first * kTileIn + column(i))) : float4{};
#pragma unroll
  for (int r = 0; r < kNormRows; ++r) {
    if (r >= p.n_row) break;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kNormPieces; ++i)
      sum += v[r][i].x * v[r][i].x + v[r][i].y * v[r][i].y + v[r][i].z * v[r][i].z + v[r][i].w * v[r][i].w;
#pragma unroll
    for (int i = 16; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
    if (tid % 32 == 0) room.warps[tid / 32][r] = sum;
  }
  named_sync(1, kConsumers);
  if (tid < kCluster * kNormRows && tid % kNormRows < p.n_row) {
    const int r = tid % kNormRows, to = tid / kNormRows;
    const float sum = room.warps[0][r] + room.warps[1][r] + room.warps[2][r] + room.warps[3][r];
    send(cluster_addr(&room.ranks[rank][r], to), cluster_addr(&room.full, to), sum);
  }
  mbar_wait(&room.full, 0);
#pragma unroll
  for (int r = 0; r < kNormRows; ++r) {
    if (r >= p.n_row) break;
    const float sum = room.ranks[0][r] + room.ranks[1][r] + room.ranks[2][r] + room.ranks[3][r];
    const float scale = rsqrtf(sum / static_cast<float>(p.n_in) + p.norm_eps);
#pragma unroll
    for (int i = 0; i < kNormPieces; ++i) {
      const int k = column(i);
      if (k >= n_chunk * kTileIn) continue;
      const T t[4] = {from_float<T>(v[r][i].x * scale * w[i].x), from_float<T>(v[r][i].y * scale * w[i].y),
                      from_float<T>(v[r][i].z * scale * w[i].z), from_float<T>(v[r][i].w * scale * w[i].w)};
      *reinterpret_cast<uint2*>(xs + k / 8 * core + r * 16 + k % 8 * 2) = *reinterpret_cast<const uint2*>(t);
    }
  }
  fence_async_proxy();
  named_sync(1, kConsumers);
}

template <class T, int kN, bool kNorm>
__global__ void PRT_CLUSTER(kCluster) __launch_bounds__(kThreads, 2)
    cluster_kernel(const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap x_map,
                   const __grid_constant__ Problem p) {
#ifdef PRT_SM90A
  constexpr int kStageBytes = kWeightBytes + (kNorm ? 0 : kN * kTileIn * 2), kExchangeBytes = kN * 4 * kConsumers;
  extern __shared__ __align__(1024) char smem[];
  float2* exchange = reinterpret_cast<float2*>(smem + p.n_stage * kStageBytes);  // [kCluster][kN / 8][kConsumers]: both halves' element
  char* xs = reinterpret_cast<char*>(exchange) + kExchangeBytes;  // kNorm
  __shared__ uint64_t full[kMaxStages], empty[kMaxStages], exchange_full, exchange_empty;
  __shared__ NormRoom norm_room;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, rank = static_cast<int>(cluster_rank());
  const int n_cluster = gridDim.x / kCluster, first_tile = blockIdx.x / kCluster;
  const int first = p.n_chunk * rank / kCluster, n_chunk = p.n_chunk * (rank + 1) / kCluster - first;
  const int half = p.gated ? kTileRows / 2 : kTileRows;  // rows of a tile that make outputs

  if (tid == kConsumers) {
    tma_prefetch_map(&weight_map);
    if (!kNorm) tma_prefetch_map(&x_map);
    for (int i = 0; i < p.n_stage; ++i) {
      mbar_init(full + i, 1);
      mbar_init(empty + i, kConsumers / 32);
    }
    mbar_init(&exchange_full, 1);
    mbar_init(&exchange_empty, kCluster * kConsumers / 32);
    mbar_init(&norm_room.full, 1);
    mbar_init_fence();
    mbar_expect(&exchange_full, kExchangeBytes);
    mbar_expect(&norm_room.full, kCluster * p.n_row * 4);
  }
  __syncthreads();
  cluster_arrive();

  if (warp == kConsumers / 32) {
    if (!elect_one()) return;
    int tile = first_tile, chunk = 0, x_chunk = 0;
    const int total = (p.n_tile - first_tile + n_cluster - 1) / n_cluster * n_chunk;
    auto load_weights = [&](int slot) {
      mbar_expect(full + slot, kWeightBytes + (kNorm ? 0 : p.n_row * kTileIn * 2));
      char* dst = smem + slot * kStageBytes;
      tma_load(dst, &weight_map, full + slot, (first + chunk) * kTileIn, tile * half, kCacheEvictFirst);
      if (p.gated)
        tma_load(dst + kWeightBytes / 2, &weight_map, full + slot, (first + chunk) * kTileIn, p.n_out + tile * half, kCacheEvictFirst);
      if (++chunk == n_chunk) chunk = 0, tile += n_cluster;
    };
    auto load_x = [&](int slot) {
      tma_load(smem + slot * kStageBytes + kWeightBytes, &x_map, full + slot, (first + x_chunk) * kTileIn, 0, kCacheEvictLast);
      if (++x_chunk == n_chunk) x_chunk = 0;
    };
    const int ahead = min(p.n_stage, total);
    if (p.launch_early) pdl_launch();
    for (int i = 0; i < ahead; ++i) load_weights(i);
    if (!kNorm) {
      pdl_wait();
      for (int i = 0; i < ahead; ++i) load_x(i);
    }
    int slot = 0;
    uint32_t phase = 0;
    for (int at = ahead; at < total; ++at) {
      mbar_wait(empty + slot, phase);
      load_weights(slot);
      if (!kNorm) load_x(slot);
      if (++slot == p.n_stage) slot = 0, phase ^= 1;
    }
    pdl_launch();
    return;
  }

  if constexpr (kNorm) {
    norm_columns<T>(p, xs, norm_room, rank, first, n_chunk);
  } else {
    cluster_wait();
    pdl_wait();
  }

  [[maybe_unused]] const int core = core_bytes(p.n_row);
  float acc[2][kN / 2];
  int slot = 0;
  uint32_t phase = 0, tile_phase = 0;
  for (int tile = first_tile; tile < p.n_tile; tile += n_cluster, tile_phase ^= 1) {
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) acc[0][i] = acc[1][i] = 0;
    for (int chunk = 0; chunk < n_chunk; ++chunk) {
      mbar_wait(full + slot, phase);
      const char* stage = smem + slot * kStageBytes;
      if constexpr (kNorm) multiply<kN, T>(acc, stage, plain_desc(xs + chunk * 8 * core, core), 2 * core / 16);
      else multiply<kN, T>(acc, stage, wgmma_desc(stage + kWeightBytes), 2);
      if (lane == 0) mbar_arrive(empty + slot);
      if (++slot == p.n_stage) slot = 0, phase ^= 1;
    }
    wgmma_keep(acc[0]);
    wgmma_keep(acc[1]);

    // Element i of acc[m] is row 16 warp + lane / 4 + 8 (i / 2 % 2) of half m, row 8 (i / 4) + lane % 4 * 2 + i % 2 of x. Block o of the
    // cluster finishes the kN / 8 elements from o kN / 8.
    constexpr int kMine = kN / 2 / kCluster;
    if (tile != first_tile) mbar_wait(&exchange_empty, tile_phase ^ 1);
#pragma unroll
    for (int o = 0; o < kCluster; ++o) {
      const uint32_t to = cluster_addr(exchange + rank * kMine * kConsumers + tid, o), bar = cluster_addr(&exchange_full, o);
#pragma unroll
      for (int i = 0; i < kMine; ++i) send(to + i * kConsumers * 8, bar, float2{acc[0][o * kMine + i], acc[1][o * kMine + i]});
    }
    const bool more = tile + n_cluster < p.n_tile;
    float old[kMine][2];
    int row[kMine], out[kMine];
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int e = rank * kMine + i;
      row[i] = e / 4 * 8 + lane % 4 * 2 + e % 2;
      out[i] = tile * half + warp * 16 + lane / 4 + e / 2 % 2 * 8;
      old[i][0] = load_old(p, row[i], out[i]);
      old[i][1] = p.gated ? 0 : load_old(p, row[i], out[i] + 64);
    }
    mbar_wait(&exchange_full, tile_phase);
    float2 v[kMine];
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      v[i] = float2{};
#pragma unroll
      for (int r = 0; r < kCluster; ++r) {
        const float2 t = exchange[(r * kMine + i) * kConsumers + tid];
        v[i].x += t.x, v[i].y += t.y;
      }
    }
    if (more) {
      if (tid == 0) mbar_expect(&exchange_full, kExchangeBytes);
      __syncwarp();
      if (lane < kCluster) arrive_at(&exchange_empty, lane);
    }
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      store_out<T>(p, row[i], out[i], v[i].x, v[i].y, old[i][0]);
      if (!p.gated) store_out<T>(p, row[i], out[i] + 64, v[i].y, 0, old[i][1]);
    }
  }
#else
  __trap();  // started only on Hopper
#endif
}

// ---- shared_kernel

__device__ __forceinline__ uint32_t count_arrival(uint32_t* counter) {
  uint32_t old;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(old) : "l"(counter) : "memory");
  return old;
}

// x, normed and rounded, to shared memory as plain_desc reads it, by each block for itself.
template <class T>
__device__ void norm_whole(const Problem& p, char* xs, float* sums) {
  const int tid = threadIdx.x, n_column = p.n_chunk * kTileIn;
  float4 w[kWholePieces], v[kWholePieces];
  auto load = [&](float4(&v)[kWholePieces], const float* from) {
#pragma unroll
    for (int i = 0; i < kWholePieces; ++i) {
      const int k = (i * kConsumers + tid) * 4;
      v[i] = k < p.n_in ? __ldcg(reinterpret_cast<const float4*>(from + k)) : float4{};
    }
  };
  load(w, p.norm);
  pdl_wait();
  for (int r = 0; r < p.n_row; ++r) {
    load(v, p.x + r * p.ld_x);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kWholePieces; ++i) sum += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
#pragma unroll
    for (int i = 16; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
    if (tid % 32 == 0) sums[r % 2 * 4 + tid / 32] = sum;
    named_sync(1, kConsumers);
    const float* s = sums + r % 2 * 4;
    const float scale = rsqrtf((s[0] + s[1] + s[2] + s[3]) / static_cast<float>(p.n_in) + p.norm_eps);
#pragma unroll
    for (int i = 0; i < kWholePieces; ++i) {
      const int k = (i * kConsumers + tid) * 4;
      if (k >= n_column) continue;
      const T t[4] = {from_float<T>(v[i].x * scale * w[i].x), from_float<T>(v[i].y * scale * w[i].y),
                      from_float<T>(v[i].z * scale * w[i].z), from_float<T>(v[i].w * scale * w[i].w)};
      *reinterpret_cast<uint2*>(xs + k / 8 * core_bytes(p.n_row) + r * 16 + k % 8 * 2) = *reinterpret_cast<const uint2*>(t);
    }
  }
  fence_async_proxy();
  named_sync(1, kConsumers);
}

template <class T, bool kNorm>
__global__ void __launch_bounds__(kThreads, 2) shared_kernel(const __grid_constant__ CUtensorMap weight_map,
                                                             const __grid_constant__ CUtensorMap x_map, const __grid_constant__ Problem p) {
#ifdef PRT_SM90A
  constexpr int kN = 8, kStageBytes = kWeightBytes + (kNorm ? 0 : kN * kTileIn * 2);
  extern __shared__ __align__(1024) char smem[];
  char* xs = smem + p.n_stage * kStageBytes;  // kNorm
  __shared__ uint64_t full[kMaxStages], empty[kMaxStages];
  __shared__ float sums[8];
  __shared__ bool is_last;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  auto range_begin = [&](int block) { return static_cast<int>(int64_t{block} * (p.n_tile * p.n_chunk) / gridDim.x); };
  const int begin = range_begin(blockIdx.x), end = range_begin(blockIdx.x + 1);
  const int half = p.gated ? kTileRows / 2 : kTileRows;  // rows of a tile that make outputs

  if (tid == kConsumers) {
    tma_prefetch_map(&weight_map);
    if (!kNorm) tma_prefetch_map(&x_map);
    for (int i = 0; i < p.n_stage; ++i) {
      mbar_init(full + i, 1);
      mbar_init(empty + i, kConsumers / 32);
    }
    mbar_init_fence();
  }
  __syncthreads();

  if (warp == kConsumers / 32) {
    if (!elect_one()) return;
    int tile = begin / p.n_chunk, chunk = begin % p.n_chunk;
    auto load_weights = [&](int slot) {
      mbar_expect(full + slot, kWeightBytes + (kNorm ? 0 : p.n_row * kTileIn * 2));
      char* dst = smem + slot * kStageBytes;
      tma_load(dst, &weight_map, full + slot, chunk * kTileIn, tile * half, kCacheEvictFirst);
      if (p.gated) tma_load(dst + kWeightBytes / 2, &weight_map, full + slot, chunk * kTileIn, p.n_out + tile * half, kCacheEvictFirst);
      if (++chunk == p.n_chunk) chunk = 0, ++tile;
    };
    auto load_x = [&](int slot, int at) {
      tma_load(smem + slot * kStageBytes + kWeightBytes, &x_map, full + slot, at % p.n_chunk * kTileIn, 0, kCacheEvictLast);
    };
    const int first = min(p.n_stage, end - begin);
    pdl_launch();
    for (int i = 0; i < first; ++i) load_weights(i);
    if (!kNorm) {
      pdl_wait();
      for (int i = 0; i < first; ++i) load_x(i, begin + i);
    }
    int slot = 0;
    uint32_t phase = 0;
    for (int at = begin + first; at < end; ++at) {
      mbar_wait(empty + slot, phase);
      load_weights(slot);
      if (!kNorm) load_x(slot, at);
      if (++slot == p.n_stage) slot = 0, phase ^= 1;
    }
    return;
  }

  if constexpr (kNorm) norm_whole<T>(p, xs, sums);
  else pdl_wait();

  [[maybe_unused]] const int core = core_bytes(p.n_row);
  float acc[2][kN / 2] = {};
  int slot = 0, tile = begin / p.n_chunk, chunk = begin % p.n_chunk, first = chunk;
  uint32_t phase = 0;
  for (int at = begin; at < end; ++at) {
    mbar_wait(full + slot, phase);
    const char* stage = smem + slot * kStageBytes;
    if constexpr (kNorm) multiply<kN, T>(acc, stage, plain_desc(xs + chunk * 8 * core, core), 2 * core / 16);
    else multiply<kN, T>(acc, stage, wgmma_desc(stage + kWeightBytes), 2);
    if (lane == 0) mbar_arrive(empty + slot);
    if (++slot == p.n_stage) slot = 0, phase ^= 1;
    if (++chunk < p.n_chunk && at + 1 < end) continue;

    // The end of a tile, or of this block's part of it. Element i of acc[m] is row 16 warp + lane / 4 + 8 (i / 2 % 2) of half m, row
    // 8 (i / 4) + lane % 4 * 2 + i % 2 of x.
    wgmma_keep(acc[0]);
    wgmma_keep(acc[1]);
    const int row = warp * 16 + lane / 4, n0 = lane % 4 * 2;
    if (first == 0 && chunk == p.n_chunk) {
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) {
        const int n = n0 + i % 2, out = tile * half + row + i / 2 * 8;
        store_out<T>(p, n, out, acc[0][i], acc[1][i], load_old(p, n, out));
        if (!p.gated) store_out<T>(p, n, out + 64, acc[1][i], 0, load_old(p, n, out + 64));
      }
    } else {
      const int part_floats = p.n_row * kTileRows;
      float* mine = p.partial + (2 * blockIdx.x + (first == 0)) * part_floats;
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) {
        const int n = n0 + i % 2, r = row + i / 2 * 8;
        if (n < p.n_row) {
          __stcg(mine + n * kTileRows + r, acc[0][i]);
          __stcg(mine + n * kTileRows + 64 + r, acc[1][i]);
        }
      }
      // Blocks that share this tile: the one that owns its first chunk up to the one that owns its last.
      auto owner = [&](int at) { return static_cast<int>(((at + 1) * int64_t{gridDim.x} - 1) / (p.n_tile * p.n_chunk)); };
      const int from = owner(tile * p.n_chunk), to = owner((tile + 1) * p.n_chunk - 1);
      named_sync(1, kConsumers);
      if (tid == 0) {
        is_last = count_arrival(p.counters + tile) == static_cast<uint32_t>(to - from);
        if (is_last) p.counters[tile] = 0;
      }
      named_sync(1, kConsumers);
      if (is_last) {
        const int per_row = half / 4;
        for (int i = tid; i < p.n_row * per_row; i += kConsumers) {
          const int n = i / per_row, m = i % per_row * 4, out = tile * half + m;
          float4 v[2]{};
          auto add = [](float4& sum, const float* part) {
            const float4 t = __ldcg(reinterpret_cast<const float4*>(part));
            sum.x += t.x, sum.y += t.y, sum.z += t.z, sum.w += t.w;
          };
#pragma unroll 2
          for (int b = from; b <= to; ++b) {
            const float* part = p.partial + (2 * b + (b == from)) * part_floats + n * kTileRows + m;
            add(v[0], part);
            if (p.gated) add(v[1], part + 64);
          }
          store_out<T>(p, n, out, v[0].x, v[1].x, load_old(p, n, out));
          store_out<T>(p, n, out + 1, v[0].y, v[1].y, load_old(p, n, out + 1));
          store_out<T>(p, n, out + 2, v[0].z, v[1].z, load_old(p, n, out + 2));
          store_out<T>(p, n, out + 3, v[0].w, v[1].w, load_old(p, n, out + 3));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) acc[0][i] = acc[1][i] = 0;
    if (chunk == p.n_chunk) chunk = 0, ++tile;
    first = chunk;
  }
#else
  __trap();  // started only on Hopper
#endif
}

// ---- the norm of more rows, one block each; the product behind it starts at once, to fill its rings.
template <class T>
__global__ void __launch_bounds__(512)
    norm_kernel(T* out, int64_t ld_out, const float* x, int64_t ld_x, const float* weight, int n_in, float eps) {
  __shared__ float sums[16];
  pdl_launch();
  pdl_wait();
  x += blockIdx.x * ld_x;
  out += blockIdx.x * ld_out;
  float4 v[2];
  auto load = [&](int base) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int k = base + (i * 512 + static_cast<int>(threadIdx.x)) * 4;
      v[i] = k < n_in ? __ldcg(reinterpret_cast<const float4*>(x + k)) : float4{};
    }
  };
  float sum = 0;
  for (int base = 0; base < n_in; base += 4096) {
    load(base);
#pragma unroll
    for (int i = 0; i < 2; ++i) sum += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
  }
#pragma unroll
  for (int i = 16; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) sum += sums[i];
  const float scale = rsqrtf(sum / static_cast<float>(n_in) + eps);
  for (int base = 0; base < n_in; base += 4096) {
    if (n_in > 4096) load(base);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int k = base + (i * 512 + static_cast<int>(threadIdx.x)) * 4;
      if (k >= n_in) continue;
      const float4 w = __ldg(reinterpret_cast<const float4*>(weight + k));
      const T t[4] = {from_float<T>(v[i].x * scale * w.x), from_float<T>(v[i].y * scale * w.y), from_float<T>(v[i].z * scale * w.z),
                      from_float<T>(v[i].w * scale * w.w)};
      *reinterpret_cast<uint2*>(out + k) = *reinterpret_cast<const uint2*>(t);
    }
  }
}

// ---- host
template <class T, int kN, bool kNorm, bool kShared>
void run(const CudaStream& s, const Linear& a, bool launch_early) {
  const int64_t n_row = a.x.shape[0], n_in = a.x.shape[1], n_out = a.weight.shape[0];
  const int tile_out = a.gated ? kTileRows / 2 : kTileRows;
  // 128-byte promotion: 4.46 TB/s against 4.26 at 256
  const CUtensorMap weight_map =
      make_tensor_map<2>(a.weight.data, a.weight.dtype, {{n_in, n_out}, {a.weight.row_stride * 2}, {kTileIn, tile_out}},
                         CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
  const CUtensorMap x_map = kNorm ? weight_map
                                  : make_matrix_map(a.x.data, a.x.dtype, n_row, n_in, a.x.row_stride, static_cast<int32_t>(n_row), kTileIn,
                                                    CU_TENSOR_MAP_SWIZZLE_128B);
  Problem p{};
  p.x = a.x.as<float>();
  p.norm = a.norm.as<float>();
  p.bias = a.bias.as<float>();
  p.out = a.out.data;
  p.partial = a.scratch.as<float>();
  p.counters = s.counters;
  p.ld_x = a.x.row_stride;
  p.ld_out = a.out.row_stride;
  p.norm_eps = a.norm_eps;
  p.n_row = static_cast<int>(n_row);
  p.n_in = static_cast<int>(n_in);
  p.n_out = static_cast<int>(a.gated ? n_out / 2 : n_out);
  p.n_tile = (p.n_out + tile_out - 1) / tile_out;
  p.n_chunk = static_cast<int>((n_in + kTileIn - 1) / kTileIn);
  p.accumulate = a.accumulate;
  p.gated = a.gated;
  p.out_f32 = a.out.dtype == DType::f32;
  p.launch_early = launch_early;
  const int64_t stage = kWeightBytes + (kNorm ? 0 : kN * kTileIn * 2);
  const int64_t x_chunks = kShared ? p.n_chunk : (p.n_chunk + kCluster - 1) / kCluster;
  const int64_t rest = (kShared ? 0 : kN * 4 * kConsumers) + (kNorm ? x_chunks * 8 * core_bytes(p.n_row) + 256 : 0);
  p.n_stage = static_cast<int>(std::clamp<int64_t>((kSmem - rest) / stage, 2, kMaxStages));
  const auto start = [&](auto kernel, int n_block) {
    launch(s, kernel, dim3(static_cast<unsigned>(n_block)), dim3(kThreads), p.n_stage * stage + rest, weight_map, x_map, p);
  };
  if constexpr (kShared) start(shared_kernel<T, kNorm>, std::min(p.n_tile * p.n_chunk, s.n_sm));
  else start(cluster_kernel<T, kN, kNorm>, kCluster * std::min(p.n_tile, std::max(s.n_sm / kCluster, 1)));
}

int64_t partial_bytes(const CudaStream& s, int64_t n_row) { return int64_t{2} * s.n_sm * kTileRows * n_row * 4; }

// Figures behind the choice: docs/kernels/linear_rows.md.
template <class T>
void dispatch(const CudaStream& s, Linear a) {
  const int64_t n_row = a.x.shape[0], n_in = a.x.shape[1], n_out = a.weight.shape[0];
  const bool large = n_in * n_out >= 8 << 20, share = large && n_row <= kSharedRows && n_out / 64 < CudaStream::kCounters;
  if (share && !a.norm) return run<T, 8, false, true>(s, a, true);
  if (share && n_in <= 4 * kWholePieces * kConsumers) return run<T, 8, true, true>(s, a, true);
  if (a.norm && !large && n_row <= kNormRows && n_in <= 4 * kNormPieces * kConsumers * kCluster) return run<T, 8, true, false>(s, a, true);
  if (a.norm) {
    const Tensor x = make_tensor(a.scratch.data, a.weight.dtype, n_row, n_in);
    launch(s, norm_kernel<T>, dim3(static_cast<unsigned>(n_row)), dim3(512), 0, x.as<T>(), x.row_stride, a.x.as<float>(), a.x.row_stride,
           a.norm.as<float>(), static_cast<int>(n_in), a.norm_eps);
    a.x = x;
    a.norm = {};
  }
  const bool launch_early = !large || n_row > 16;
  if (n_row <= 8) return run<T, 8, false, false>(s, a, launch_early);
  if (n_row <= 16) return run<T, 16, false, false>(s, a, launch_early);
  if (n_row <= 32) return run<T, 32, false, false>(s, a, launch_early);
  return run<T, 64, false, false>(s, a, launch_early);
}

}  // namespace

inline int64_t linear_scratch_bytes(const CudaStream& s, int64_t n_row, int64_t n_in) {
  return std::max(partial_bytes(s, std::min(n_row, kSharedRows)), (n_row * n_in * 2 + 15) / 16 * 16);
}

inline void linear(const CudaStream& s, const Linear& a) { a.weight.dtype == DType::bf16 ? dispatch<bf16>(s, a) : dispatch<f16>(s, a); }

}  // namespace prt::cuda::rows_sm90
