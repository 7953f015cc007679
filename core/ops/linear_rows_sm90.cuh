// The matrix product of a decode step, 1 to 64 rows, on Hopper: bound by reading the weights once. docs/kernels/linear_rows.md has the
// measurements.
//
// A cluster of two blocks makes the sums of 64 weight rows at a time, each block those of half of the columns. The copy engine streams
// boxes of weights through a ring in shared memory, and the tensor cores read them where they lie: weight rows are the M side of the
// products, rows of x the N side, so that 8 rows cost what 1 costs. The ring takes most of a multiprocessor and fills with weights, which
// no kernel writes, before pdl_wait(): wherever the kernel before has nothing more to do, memory goes on being read. At the end of a tile
// the two blocks send each other their sums, straight into shared memory, and each finishes half of the outputs, always adding in the same
// order.
#pragma once
#include "cuda/hopper.cuh"
#include "cuda/launch.cuh"
#include "cuda/types.cuh"
#include "ops/cuda_table.h"

namespace prt::cuda::rows_sm90 {

namespace {

constexpr int kCluster = 2, kConsumers = 128, kThreads = kConsumers + 32, kMaxStages = 12;
constexpr int kTileRows = 64, kBoxes = 2, kChunk = 64 * kBoxes;  // a stage of the ring has kChunk columns of a tile, in boxes of 64
constexpr int kBoxBytes = kTileRows * 128, kWeightBytes = kBoxes * kBoxBytes;
constexpr int64_t kSmem = 200 << 10;                // of 227 KB: small kernels in between find room beside it
constexpr int kNormRows = 2, kNormColumns = 4096;  // most that are normed here, by each cluster for itself

struct Problem {
  const float* x;     // kNorm
  const float* norm;  // kNorm
  const float* bias;
  void* out;
  int64_t ld_x, ld_out;
  float norm_eps;
  int n_row, n_in, n_out;  // n_out after the gate
  int n_tile, n_chunk;     // chunks per tile
  int n_stage;
  bool accumulate, gated, out_f32;
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
// At another block's barrier, after reads that are complete; it orders nothing else.
__device__ __forceinline__ void arrive_at(uint64_t* bar, uint32_t cta) {
#ifdef PRT_SM90A
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(cluster_addr(bar, cta)) : "memory");
#endif
}

// 64 columns of a tile's weight rows. Gated weights are seen as [n_out / 8][gate, up][8] rows, so that the sums of a gate and of its up
// projection meet in one thread.
__device__ __forceinline__ void load_box(void* dst, const CUtensorMap* map, uint64_t* bar, int column, int row, int group) {
#ifdef PRT_SM90
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], "
      "%7;" ::"r"(smem_addr(dst)),
      "l"(map), "r"(smem_addr(bar)), "r"(column), "r"(row), "r"(0), "r"(group), "l"(kCacheEvictFirst)
      : "memory");
#endif
}

// x as plain rows of 8 columns: those of row r + 1 follow those of row r, the next 8 columns are core bytes further. Products run past the
// last row, into columns of the result that nobody looks at.
__host__ __device__ constexpr int core_bytes(int n_row) { return (n_row | 1) * 16; }  // odd: fewer bank conflicts
__device__ __forceinline__ uint64_t plain_desc(const char* x, int core) {
  return uint64_t{(smem_addr(x) & 0x3ffff) >> 4} | uint64_t{static_cast<uint32_t>(core) >> 4} << 16 | uint64_t{128 >> 4} << 32;
}

struct NormRoom {
  float warps[kConsumers / 32][kNormRows], ranks[kCluster][kNormRows];  // sums of squares
  uint64_t full;
};

// This block's columns of x, normed and rounded, to shared memory. The blocks tell each other their sums of squares.
template <class T>
__device__ void norm_columns(const Problem& p, char* xs, NormRoom& room, int rank, int first, int n_column) {
  constexpr int kPieces = kNormColumns / kCluster / 4 / kConsumers;
  const int tid = threadIdx.x, core = core_bytes(p.n_row);
  float4 w[kPieces], v[kNormRows][kPieces];
  auto column = [&](int i) { return (i * kConsumers + tid) * 4; };
  auto valid = [&](int i) { return column(i) < n_column && first + column(i) < p.n_in; };
#pragma unroll
  for (int i = 0; i < kPieces; ++i) w[i] = valid(i) ? __ldg(reinterpret_cast<const float4*>(p.norm + first + column(i))) : float4{};
  cluster_wait();
  pdl_wait();
#pragma unroll
  for (int r = 0; r < kNormRows; ++r)
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      v[r][i] = r < p.n_row && valid(i) ? __ldcg(reinterpret_cast<const float4*>(p.x + r * p.ld_x + first + column(i))) : float4{};
#pragma unroll
  for (int r = 0; r < kNormRows; ++r) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) sum += v[r][i].x * v[r][i].x + v[r][i].y * v[r][i].y + v[r][i].z * v[r][i].z + v[r][i].w * v[r][i].w;
#pragma unroll
    for (int i = 16; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
    if (tid % 32 == 0) room.warps[tid / 32][r] = sum;
  }
  named_sync(1, kConsumers);
  if (tid < kCluster * kNormRows) {
    const int r = tid % kNormRows, to = tid / kNormRows;
    const float sum = room.warps[0][r] + room.warps[1][r] + room.warps[2][r] + room.warps[3][r];
    send(cluster_addr(&room.ranks[rank][r], to), cluster_addr(&room.full, to), sum);
  }
  mbar_wait(&room.full, 0);
#pragma unroll
  for (int r = 0; r < kNormRows; ++r) {
    if (r >= p.n_row) break;
    const float scale = rsqrtf((room.ranks[0][r] + room.ranks[1][r]) / static_cast<float>(p.n_in) + p.norm_eps);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int k = column(i);
      if (k >= n_column) continue;
      const T t[4] = {from_float<T>(v[r][i].x * scale * w[i].x), from_float<T>(v[r][i].y * scale * w[i].y),
                      from_float<T>(v[r][i].z * scale * w[i].z), from_float<T>(v[r][i].w * scale * w[i].w)};
      *reinterpret_cast<uint2*>(xs + k / 8 * core + r * 16 + k % 8 * 2) = *reinterpret_cast<const uint2*>(t);
    }
  }
  fence_async_proxy();
  named_sync(1, kConsumers);
}

__device__ __forceinline__ float load_old(const Problem& p, int row, int out) {  // what the product is added to
  return p.accumulate && row < p.n_row && out < p.n_out ? __ldcg(static_cast<float*>(p.out) + row * p.ld_out + out) : 0.0f;
}
template <class T>
__device__ __forceinline__ void store_out(const Problem& p, int row, int out, float v, float up, float old) {
  if (row >= p.n_row || out >= p.n_out) return;
  if (p.bias) v += __ldg(p.bias + out);
  if (p.gated) v = v / (1.0f + __expf(-v)) * (up + (p.bias ? __ldg(p.bias + p.n_out + out) : 0.0f));
  const int64_t i = row * p.ld_out + out;
  if (p.out_f32) static_cast<float*>(p.out)[i] = old + v;
  else static_cast<T*>(p.out)[i] = from_float<T>(v);
}

template <class T, int kN, bool kNorm>
__global__ void PRT_CLUSTER(kCluster) __launch_bounds__(kThreads, 1)
    linear_rows_kernel(const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap x_map,
                       const __grid_constant__ Problem p) {
#ifdef PRT_SM90A
  constexpr int kXBytes = kN * 128, kStageBytes = kWeightBytes + (kNorm ? 0 : kBoxes * kXBytes);
  // The sums of a thread in pairs, 8 weight rows apart; block o of the cluster finishes kMine of them, from o kMine on.
  constexpr int kMine = kN / 4 / kCluster, kExchangeBytes = kN / 4 * kConsumers * 8;
  extern __shared__ __align__(1024) char smem[];
  float2* exchange = reinterpret_cast<float2*>(smem + p.n_stage * kStageBytes);  // [kCluster][kMine][kConsumers]
  char* xs = reinterpret_cast<char*>(exchange) + kExchangeBytes;                 // kNorm
  __shared__ uint64_t full[kMaxStages], empty[kMaxStages], exchange_full, exchange_empty;
  __shared__ NormRoom norm_room;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, rank = static_cast<int>(cluster_rank());
  const int n_cluster = gridDim.x / kCluster, first_tile = blockIdx.x / kCluster;
  const int first = p.n_chunk * rank / kCluster, n_chunk = p.n_chunk * (rank + 1) / kCluster - first;

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
    mbar_expect(&norm_room.full, sizeof norm_room.ranks);
  }
  __syncthreads();
  cluster_arrive();

  if (warp == kConsumers / 32) {
    if (!elect_one()) return;
    int tile = first_tile, chunk = 0, x_chunk = 0, slot = 0;
    const int total = (p.n_tile - first_tile + n_cluster - 1) / n_cluster * n_chunk, ahead = min(p.n_stage, total);
    auto load_weights = [&](int slot) {
      mbar_expect(full + slot, kWeightBytes + (kNorm ? 0 : kBoxes * p.n_row * 128));
#pragma unroll
      for (int b = 0; b < kBoxes; ++b)
        load_box(smem + slot * kStageBytes + b * kBoxBytes, &weight_map, full + slot, (first + chunk) * kChunk + b * 64,
                 p.gated ? 0 : tile * kTileRows, p.gated ? tile * kTileRows / 16 : 0);
      if (++chunk == n_chunk) chunk = 0, tile += n_cluster;
    };
    auto load_x = [&](int slot) {
#pragma unroll
      for (int b = 0; b < kBoxes; ++b)
        tma_load(smem + slot * kStageBytes + kWeightBytes + b * kXBytes, &x_map, full + slot, (first + x_chunk) * kChunk + b * 64, 0,
                 kCacheEvictLast);
      if (++x_chunk == n_chunk) x_chunk = 0;
    };
    pdl_launch();
    for (int i = 0; i < ahead; ++i) load_weights(i);
    if (!kNorm) {
      pdl_wait();
      for (int i = 0; i < ahead; ++i) load_x(i);
    }
    uint32_t phase = 0;
    for (int at = ahead; at < total; ++at) {
      mbar_wait(empty + slot, phase);
      load_weights(slot);
      if (!kNorm) load_x(slot);
      if (++slot == p.n_stage) slot = 0, phase ^= 1;
    }
    return;
  }

  if constexpr (kNorm) {
    norm_columns<T>(p, xs, norm_room, rank, first * kChunk, n_chunk * kChunk);
  } else {
    cluster_wait();
    pdl_wait();
  }

  // Element e of acc is row 16 warp + lane / 4 + 8 (e / 2 % 2) of the tile and row 8 (e / 4) + lane % 4 * 2 + e % 2 of x. Pair i is
  // elements e = 4 (i / 2) + i % 2 and e + 2: two outputs 8 apart, or what makes a gated one.
  auto x_row = [&](int i) { return i / 2 * 8 + lane % 4 * 2 + i % 2; };
  const int core = core_bytes(p.n_row), x_step = kNorm ? 2 * core / 16 : 2;
  int slot = 0;
  uint32_t phase = 0, tile_phase = 0;
  for (int tile = first_tile; tile < p.n_tile; tile += n_cluster, tile_phase ^= 1) {
    const int out = (tile * kTileRows + warp * 16) / (p.gated ? 2 : 1) + lane / 4;
    float2 old[kMine];
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int row = x_row(rank * kMine + i);
      old[i] = {load_old(p, row, out), load_old(p, row, out + 8)};
    }
    float acc[kN / 2] = {};
    int before = 0;
    for (int chunk = 0; chunk < n_chunk; ++chunk) {
      mbar_wait(full + slot, phase);
      const char* stage = smem + slot * kStageBytes;
      wgmma_fence();
#pragma unroll
      for (int b = 0; b < kBoxes; ++b) {
        const uint64_t w = wgmma_desc(stage + b * kBoxBytes);
        const uint64_t x = kNorm ? plain_desc(xs + (chunk * kBoxes + b) * 8 * core, core) : wgmma_desc(stage + kWeightBytes + b * kXBytes);
#pragma unroll
        for (int k = 0; k < 4; ++k) Product<kN, T>::mma(acc, w + 2 * k, x + k * x_step, 1);
      }
      wgmma_commit();
      wgmma_wait<1>();  // for the stage before this one
      if (chunk > 0 && lane == 0) mbar_arrive(empty + before);
      before = slot;
      if (++slot == p.n_stage) slot = 0, phase ^= 1;
    }
    wgmma_wait<0>();
    if (n_chunk > 0 && lane == 0) mbar_arrive(empty + before);
    wgmma_keep(acc);

    if (tile != first_tile) mbar_wait(&exchange_empty, tile_phase ^ 1);
#pragma unroll
    for (int i = 0; i < kCluster * kMine; ++i) {
      const int to = i / kMine, e = i / 2 * 4 + i % 2;
      send(cluster_addr(exchange + (rank * kMine + i % kMine) * kConsumers + tid, to), cluster_addr(&exchange_full, to),
           float2{acc[e], acc[e + 2]});
    }
    mbar_wait(&exchange_full, tile_phase);
    float2 v[kMine];
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const float2 a = exchange[i * kConsumers + tid], b = exchange[(kMine + i) * kConsumers + tid];
      v[i] = {a.x + b.x, a.y + b.y};
    }
    if (tile + n_cluster < p.n_tile) {
      if (tid == 0) mbar_expect(&exchange_full, kExchangeBytes);
      __syncwarp();
      if (lane < kCluster) arrive_at(&exchange_empty, lane);
    }
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int row = x_row(rank * kMine + i);
      store_out<T>(p, row, out, v[i].x, v[i].y, old[i].x);
      if (!p.gated) store_out<T>(p, row, out + 8, v[i].y, 0, old[i].y);
    }
  }
#else
  __trap();  // started only on Hopper
#endif
}

template <class T, int kN, bool kNorm>
void run(const CudaStream& s, const Linear& a) {
  const int64_t n_row = a.x.shape[0], n_in = a.x.shape[1], n_out = a.weight.shape[0], ld = a.weight.row_stride * 2;
  const TensorMapShape<4> plain{{n_in, n_out, 1, 1}, {ld, ld, ld}, {64, kTileRows, 1, 1}};
  const TensorMapShape<4> gated{{n_in, 8, 2, n_out / 16}, {ld, n_out / 2 * ld, 8 * ld}, {64, 8, 2, kTileRows / 16}};
  // 128-byte promotion: 4.46 TB/s against 4.26 at 256
  const CUtensorMap weight_map = make_tensor_map<4>(a.weight.data, a.weight.dtype, a.gated ? gated : plain, CU_TENSOR_MAP_SWIZZLE_128B,
                                                    CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
  const CUtensorMap x_map = kNorm ? weight_map
                                  : make_matrix_map(a.x.data, a.x.dtype, n_row, n_in, a.x.row_stride, static_cast<int32_t>(n_row), 64,
                                                    CU_TENSOR_MAP_SWIZZLE_128B);
  Problem p{};
  p.x = a.x.as<float>();
  p.norm = a.norm.as<float>();
  p.bias = a.bias.as<float>();
  p.out = a.out.data;
  p.ld_x = a.x.row_stride;
  p.ld_out = a.out.row_stride;
  p.norm_eps = a.norm_eps;
  p.n_row = static_cast<int>(n_row);
  p.n_in = static_cast<int>(n_in);
  p.n_out = static_cast<int>(a.gated ? n_out / 2 : n_out);
  p.n_tile = static_cast<int>((n_out + kTileRows - 1) / kTileRows);
  p.n_chunk = static_cast<int>((n_in + kChunk - 1) / kChunk);
  p.accumulate = a.accumulate;
  p.gated = a.gated;
  p.out_f32 = a.out.dtype == DType::f32;
  const int64_t stage = kWeightBytes + (kNorm ? 0 : kBoxes * kN * 128), exchange = kN / 4 * kConsumers * 8;
  const int64_t normed = kNorm ? (p.n_chunk + 1) / kCluster * (kChunk / 8) * core_bytes(p.n_row) + 256 : 0;
  p.n_stage = static_cast<int>(std::clamp<int64_t>((kSmem - exchange - normed) / stage, 2, kMaxStages));
  const int n_block = kCluster * std::min(p.n_tile, std::max(s.n_sm / kCluster, 1));
  launch(s, linear_rows_kernel<T, kN, kNorm>, dim3(static_cast<unsigned>(n_block)), dim3(kThreads), p.n_stage * stage + exchange + normed,
         weight_map, x_map, p);
}

template <class T>
void dispatch(const CudaStream& s, Linear a) {
  const int64_t n_row = a.x.shape[0], n_in = a.x.shape[1];
  if (a.norm && n_row <= kNormRows && n_in <= kNormColumns) return run<T, 8, true>(s, a);
  if (a.norm) {
    const Tensor x = make_tensor(a.scratch.data, a.weight.dtype, n_row, n_in);
    rms_norm(s, {x, a.x, a.norm, a.norm_eps});
    a.x = x;
    a.norm = {};
  }
  if (n_row <= 8) return run<T, 8, false>(s, a);
  if (n_row <= 16) return run<T, 16, false>(s, a);
  if (n_row <= 32) return run<T, 32, false>(s, a);
  return run<T, 64, false>(s, a);
}

}  // namespace

inline int64_t linear_scratch_bytes(int64_t n_row, int64_t n_in) { return (n_row * n_in * 2 + 15) / 16 * 16; }

inline void linear(const CudaStream& s, const Linear& a) { a.weight.dtype == DType::bf16 ? dispatch<bf16>(s, a) : dispatch<f16>(s, a); }

}  // namespace prt::cuda::rows_sm90
