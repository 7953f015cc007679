// The product of many rows on Hopper: out[n_row][n_out] = x[n_row][n_in] weight[n_out][n_in]^T in bf16 or f16, f32 accumulators.
//
// A block makes tiles of 128 rows x kOuts outputs, one after the other (the grid is the number of multiprocessors). One thread of its third
// warpgroup keeps the copy engine busy filling a ring of stages, 64 columns of x and of the weights each; the other two warpgroups
// multiply, 64 rows each, with all of a stage's weights. The accumulators leave through a small ring of their own, per warp, as TMA stores
// (TMA additions where the result goes onto the residual stream: each element is added to once, so the result does not depend on an order).
//
// The weight rows of a tile are two runs of kOuts / 2. For a gated product these are gate rows and the matching up rows, which so meet in
// the same thread's accumulators; otherwise they are adjacent.
//
// Products with too few tiles to fill the chip: kSplit = 2 blocks, a cluster, each take half of n_in; they exchange partial sums through
// shared memory, each finishes half of the columns, and the order of the sum is fixed. (Clusters of 4: at most 29 run at once on 132
// multiprocessors, and a second wave costs more than the finer split gains.)
//
// What limits it: 4 kOuts cycles of tensor cores per stage against 240 + 2 kOuts to bring the stage in at 64 bytes per cycle. Clusters that
// share the weights by multicast gained nothing (that port is not relieved), nor did L2 hints or the width of a band: on large products the
// chip runs at its power limit. Figures: docs/kernels/linear_gemm_cuda.md.
#include <iterator>
#include <utility>

#include "cuda/hopper.cuh"
#include "cuda/mma.cuh"
#include "ops/linear_cuda.h"

namespace prt::cuda {

namespace {

constexpr int kTileRows = 128, kTileIn = 64, kConsumerWarps = 8, kThreads = 384;
constexpr int kStagingBytes = 2 << 10;  // per warp and buffer: 16 rows of 128 bytes
constexpr int kBand = 16;  // row tiles that share the weights in L2: see place()

enum class Epilogue { act, f32, gated };

// A weight format: how a tile of weights gets from memory to shared memory, and how a warpgroup multiplies 64 rows of x with it. This and
// start_plan() are all that knows it.
template <class T>
struct DenseWeight {
  using Act = T;
  static constexpr int stage_bytes(int outs) { return outs * kTileIn * 2; }
  static CUtensorMap map(const Tensor& weight, int run) {
    return make_matrix_map(weight.data, weight.dtype, weight.shape[0], weight.shape[1], weight.row_stride, run, kTileIn,
                           CU_TENSOR_MAP_SWIZZLE_128B);
  }
  template <int kOuts>
  static __device__ __forceinline__ void multiply(float (&d)[kOuts / 2], uint64_t x, const char* weights, bool accumulate) {
    const uint64_t w = wgmma_desc(weights);
#pragma unroll
    for (int k = 0; k < kTileIn / 16; ++k) Wgmma<kOuts, T>::mma(d, x + 2 * k, w + 2 * k, accumulate || k > 0);
  }
};

struct GemmShape {
  int32_t row_tiles, out_tiles, steps;  // steps of kTileIn
  int32_t tail_rows;  // rows of the last row tile
  int32_t half;  // weight rows from a tile's first run to its second
  int32_t out_step;  // weight rows from one tile's first run to the next tile's
  int32_t n_weight_out;  // rows of the weight
  const float* bias;
  bool add;
};

// ---- what kernel and host agree on
template <class Format, int kOuts, int kSplit>
struct TileShape {
  static constexpr int kRun = kOuts / 2 / kSplit;  // columns of one run that a block finishes
  static constexpr int kXBytes = kTileRows * kTileIn * 2, kWeightBytes = Format::stage_bytes(kOuts), kStageBytes = kXBytes + kWeightBytes;
  static constexpr int kExchangeBytes = kSplit > 1 ? kTileRows * kOuts * 4 : 0;
  static constexpr int kOtherBytes = kConsumerWarps * 2 * kStagingBytes + kExchangeBytes + 1024;
  static constexpr int kStages = (227 * 1024 - kOtherBytes) / kStageBytes < 8 ? (227 * 1024 - kOtherBytes) / kStageBytes : 8;
  static constexpr int kBytes = kStages * kStageBytes + kOtherBytes;
};
// Columns of one TMA store: rows of at most 128 bytes that tile a run exactly.
__host__ __device__ constexpr int store_cols(int run, int element_bytes) {
  int n = 128 / element_bytes;
  while (run % n) n /= 2;
  return n;
}

// Tiles in an order that keeps L2 busy with little: all outputs of a band of row tiles, row tiles fastest, so that the blocks running at
// one time work on a near-square part of the result.
[[maybe_unused]] __device__ __forceinline__ void place(const GemmShape& g, int tile, int& row_tile, int& out_tile) {
  const int per_band = kBand * g.out_tiles, first = tile / per_band * kBand, in_band = tile % per_band;
  const int rows = min(kBand, g.row_tiles - first);
  row_tile = first + in_band % rows;
  out_tile = in_band / rows;
}

[[maybe_unused]] __device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

// One run of kRun columns of a warp's 16 rows, values v[kFirst...] in wgmma's layout, to out[row...][col...].
template <class T, bool kF32, int kRun, int kFirst, int kValues>
__device__ __forceinline__ void store_run(const float (&v)[kValues], const CUtensorMap* map, char* staging, int& buffer, int row, int col,
                                          bool add) {
  constexpr int kCols = store_cols(kRun, kF32 ? 4 : 2), kPitch = kCols * (kF32 ? 4 : 2), kSwizzle = kPitch / 16 - 1;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < kRun; c += kCols) {
    char* buf = staging + buffer * kStagingBytes;
    buffer ^= 1;
    if (lane == 0) bulk_wait_read<1>();  // the store before the last one has left this buffer
    __syncwarp();
    const uint32_t base = smem_addr(buf);
    const auto at = [&](int r, int byte) { return base + ((r * kPitch + byte) ^ (r * kPitch >> 7 & kSwizzle) << 4); };
#pragma unroll
    for (int j = 0; j < kCols; j += kF32 ? 8 : 16) {
      const float* p = v + kFirst + (c + j) / 2;
      if constexpr (kF32) {
        const int r = lane / 4, byte = (j + 2 * (lane % 4)) * 4;
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at(r, byte)), "f"(p[0]), "f"(p[1]) : "memory");
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at(r + 8, byte)), "f"(p[2]), "f"(p[3]) : "memory");
      } else {
        stmatrix_x4(at(lane % 16, (j + lane / 16 * 8) * 2), pack2<T>(p[0], p[1]), pack2<T>(p[2], p[3]), pack2<T>(p[4], p[5]),
                    pack2<T>(p[6], p[7]));
      }
    }
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) {
      if (kF32 && add) tma_add(map, buf, col + c, row);
      else tma_store(map, buf, col + c, row);
      bulk_commit();
    }
  }
}

// Bias, gate and store of the two runs of kRun columns that a warp holds in v; first: weight row of the first run's first column.
template <class T, Epilogue kEpilogue, int kRun>
__device__ __forceinline__ void finish(float (&v)[kRun], const GemmShape& g, const CUtensorMap* map, char* staging, int& buffer, int row,
                                       int first) {
  if (g.bias) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int o = first + i / (kRun / 2) * g.half + i % (kRun / 2) / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
      if (o < g.n_weight_out) v[i] += __ldg(g.bias + o);
    }
  }
  if constexpr (kEpilogue == Epilogue::gated) {
#pragma unroll
    for (int i = 0; i < kRun / 2; ++i) v[i] = silu(v[i]) * v[i + kRun / 2];
    store_run<T, false, kRun, 0>(v, map, staging, buffer, row, first, false);
  } else {
    store_run<T, kEpilogue == Epilogue::f32, kRun, 0>(v, map, staging, buffer, row, first, g.add);
    store_run<T, kEpilogue == Epilogue::f32, kRun, kRun / 2>(v, map, staging, buffer, row, first + g.half, g.add);
  }
}

template <class Format, int kOuts, Epilogue kEpilogue, int kSplit>
__global__ void PRT_CLUSTER(kSplit) __launch_bounds__(kThreads, 1)
    linear_gemm_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap x_tail_map,
                       const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap out_map, const GemmShape g) {
#ifdef PRT_SM90A
  using T = typename Format::Act;
  using Tile = TileShape<Format, kOuts, kSplit>;
  constexpr int kStages = Tile::kStages;
  extern __shared__ __align__(1024) char smem[];
  char* x_stage = smem;
  char* weight_stage = smem + kStages * Tile::kXBytes;
  char* staging = smem + kStages * Tile::kStageBytes;
  float* exchange = reinterpret_cast<float*>(staging + kConsumerWarps * 2 * kStagingBytes);
  uint64_t* full = reinterpret_cast<uint64_t*>(reinterpret_cast<char*>(exchange) + Tile::kExchangeBytes);
  uint64_t* empty = full + kStages;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = threadIdx.x / 128;
  const int part = kSplit > 1 ? static_cast<int>(cluster_rank()) : 0, tiles = g.row_tiles * g.out_tiles;
  const int first_step = g.steps * part / kSplit, steps = g.steps * (part + 1) / kSplit - first_step;

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbar_init(full + i, 1);
      mbar_init(empty + i, kConsumerWarps);
    }
    mbar_init_fence();
  }
  if constexpr (kSplit > 1) cluster_sync();
  else __syncthreads();

  if (group == 2) {
    registers_down_to<40>();
    if (warp == kConsumerWarps && elect_one()) {
      tma_prefetch_map(&x_map);
      tma_prefetch_map(&weight_map);
      int tile = blockIdx.x / kSplit, row_tile, out_tile, rows;
      const auto next_tile = [&] {
        place(g, tile, row_tile, out_tile);
        rows = row_tile < g.row_tiles - 1 ? kTileRows : g.tail_rows;
      };
      const auto load_weights = [&](int slot, int step) {
        mbar_expect(full + slot, Tile::kWeightBytes + rows * (kTileIn * 2));
        char* dst = weight_stage + slot * Tile::kWeightBytes;
        const int o = out_tile * g.out_step, in = (first_step + step) * kTileIn;
        tma_load(dst, &weight_map, full + slot, in, o);
        tma_load(dst + Tile::kWeightBytes / 2, &weight_map, full + slot, in, o + g.half);
      };
      // The weights are constant, so the first stages of them need not wait for the kernel ahead.
      next_tile();
      int slot = 0, left = min(kStages, steps);
      for (int i = 0; i < left; ++i) load_weights(i, i);
      pdl_wait();
      pdl_launch();
      uint32_t phase = 1;
      for (; tile < tiles; tile += gridDim.x / kSplit) {
        next_tile();
        for (int i = 0; i < steps; ++i) {
          if (left > 0) {
            --left;
          } else {
            mbar_wait(empty + slot, phase);
            load_weights(slot, i);
          }
          // A box that reaches past the last row costs more than the rows it lacks, so the last tile has a map of its own.
          tma_load(x_stage + slot * Tile::kXBytes, rows == kTileRows ? &x_map : &x_tail_map, full + slot, (first_step + i) * kTileIn,
                   row_tile * kTileRows);
          if (++slot == kStages) slot = 0, phase ^= 1;
        }
      }
    }
    if constexpr (kSplit > 1) cluster_sync();
  } else {
    registers_up_to<232>();
    pdl_wait();
    char* my_staging = staging + warp * 2 * kStagingBytes;
    int slot = 0, buffer = 0;
    uint32_t phase = 0;
    for (int tile = blockIdx.x / kSplit; tile < tiles; tile += gridDim.x / kSplit) {
      int row_tile, out_tile;
      place(g, tile, row_tile, out_tile);
      const int row = row_tile * kTileRows + warp * 16;
      float d[kOuts / 2];
      int last = 0;
      for (int i = 0; i < steps; ++i) {
        mbar_wait(full + slot, phase);
        wgmma_fence();
        Format::template multiply<kOuts>(d, wgmma_desc(x_stage + slot * Tile::kXBytes) + group * 512,
                                         weight_stage + slot * Tile::kWeightBytes, i > 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (i > 0 && lane == 0) mbar_arrive(empty + last);
        last = slot;
        if (++slot == kStages) slot = 0, phase ^= 1;
      }
      wgmma_wait<0>();
      wgmma_keep(d);
      if (lane == 0) mbar_arrive(empty + last);
      if constexpr (kSplit == 1) {
        finish<T, kEpilogue>(d, g, &out_map, my_staging, buffer, row, out_tile * g.out_step);
      } else {  // one tile per cluster
        constexpr int kValues = kOuts / 2 / kSplit;
#pragma unroll
        for (int owner = 0; owner < kSplit; ++owner) {
          const uint32_t to = cluster_addr(exchange + part * kValues * 256 + threadIdx.x * 4, owner);
          const auto value = [&](int i) { return d[i / (kValues / 2) * (kOuts / 4) + owner * (kValues / 2) + i % (kValues / 2)]; };
#pragma unroll
          for (int i = 0; i < kValues; i += 4) store_cluster(to + i * 1024, value(i), value(i + 1), value(i + 2), value(i + 3));
        }
        cluster_sync();
        float v[kValues] = {};
#pragma unroll
        for (int p = 0; p < kSplit; ++p)
#pragma unroll
          for (int i = 0; i < kValues; i += 4) {
            const float4 x = *reinterpret_cast<const float4*>(exchange + (p * kValues + i) * 256 + threadIdx.x * 4);
            v[i] += x.x, v[i + 1] += x.y, v[i + 2] += x.z, v[i + 3] += x.w;
          }
        finish<T, kEpilogue>(v, g, &out_map, my_staging, buffer, row, out_tile * g.out_step + part * kValues);
      }
    }
    if (lane == 0) bulk_wait<0>();
  }
#else
  __trap();  // started only on Hopper
#endif
}

// ---- host
int32_t pieces(int64_t n, int64_t per) { return static_cast<int32_t>((n + per - 1) / per); }

template <class Format, int kOuts, Epilogue kEpilogue, int kSplit>
void start(const CudaStream& s, const Linear& a, const Tensor& x) {
  using Tile = TileShape<Format, kOuts, kSplit>;
  constexpr int kOutBytes = kEpilogue == Epilogue::f32 ? 4 : 2, kCols = store_cols(Tile::kRun, kOutBytes), kPitch = kCols * kOutBytes;
  constexpr auto kSwizzle = kPitch == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                            : kPitch == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                           : CU_TENSOR_MAP_SWIZZLE_32B;
  const int64_t n_row = x.shape[0], n_in = x.shape[1], n_out = a.weight.shape[0];
  GemmShape g{};
  g.row_tiles = pieces(n_row, kTileRows);
  g.out_tiles = pieces(n_out, kOuts);
  g.steps = pieces(n_in, kTileIn);
  g.tail_rows = static_cast<int32_t>(n_row - (g.row_tiles - 1) * int64_t{kTileRows});
  g.half = kEpilogue == Epilogue::gated ? static_cast<int32_t>(n_out / 2) : kOuts / 2;
  g.out_step = kEpilogue == Epilogue::gated ? kOuts / 2 : kOuts;
  g.n_weight_out = static_cast<int32_t>(n_out);
  g.bias = a.bias.as<float>();
  g.add = a.accumulate;
  const auto x_map = [&](int rows) {
    return make_matrix_map(x.data, x.dtype, n_row, n_in, x.row_stride, rows, kTileIn, CU_TENSOR_MAP_SWIZZLE_128B);
  };
  const CUtensorMap out_map = make_matrix_map(a.out.data, a.out.dtype, n_row, a.out.shape[1], a.out.row_stride, 16, kCols, kSwizzle);
  const int32_t clusters = g.row_tiles * g.out_tiles, grid = kSplit > 1 ? clusters * kSplit : std::min(clusters, s.n_sm);
  launch(s, linear_gemm_kernel<Format, kOuts, kEpilogue, kSplit>, dim3(static_cast<unsigned>(grid)), dim3(kThreads), Tile::kBytes,
         x_map(kTileRows), x_map(g.tail_rows), Format::map(a.weight, kOuts / 2), out_map, g);
}

// The closed list of tiles, and the choice among them: cycles by the count at the top of this file, in whole waves of the chip. 3000 cycles
// per tile and 8000 for the exchange fit the measurements; over 60 products (66 to 8192 rows) the chosen tile was 0.2 % slower than the
// best of the list on average, 6 % at most.
struct Plan {
  int outs, split;
};
constexpr Plan kPlans[] = {{256, 1}, {224, 1}, {192, 1}, {160, 1}, {128, 1}, {96, 1}, {64, 1}, {128, 2}, {64, 2}};

int plan_for(const CudaStream& s, int64_t n_row, int64_t n_in, int64_t n_out) {
  const int64_t steps = pieces(n_in, kTileIn);
  int best = 0;
  int64_t least = INT64_MAX;
  for (int i = 0; i < static_cast<int>(std::size(kPlans)); ++i) {
    const Plan p = kPlans[i];
    if (p.split > 1 && steps < 16) continue;
    const int64_t waves = pieces(int64_t{pieces(n_row, kTileRows)} * pieces(n_out, p.outs) * p.split, s.n_sm);
    const int64_t cycles = waves * (steps / p.split * std::max(4 * p.outs, 240 + 2 * p.outs) + 3000 + (p.split > 1 ? 8000 : 0));
    if (cycles < least) least = cycles, best = i;
  }
  return best;
}

template <class Format, Epilogue kEpilogue, size_t... i>
void start_plan(const CudaStream& s, const Linear& a, const Tensor& x, size_t plan, std::index_sequence<i...>) {
  ((i == plan ? start<Format, kPlans[i].outs, kEpilogue, kPlans[i].split>(s, a, x) : void()), ...);
}

void start_plan(const CudaStream& s, const Linear& a, const Tensor& x, int plan) {
  with_dtype(a.weight.dtype, [&](auto zero) {
    if constexpr (!std::is_same_v<decltype(zero), float>) {
      using Format = DenseWeight<decltype(zero)>;
      const auto plans = std::make_index_sequence<std::size(kPlans)>();
      if (a.gated) start_plan<Format, Epilogue::gated>(s, a, x, plan, plans);
      else if (a.out.dtype == DType::f32) start_plan<Format, Epilogue::f32>(s, a, x, plan, plans);
      else start_plan<Format, Epilogue::act>(s, a, x, plan, plans);
    }
  });
}

}  // namespace

// What tensor maps and 16-byte copies can address.
bool linear_gemm_fits(const Linear& a) {
  const auto aligned = [](const Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.row_stride * dtype_size(t.dtype) % 16 == 0;
  };
  return a.weight.dtype != DType::f32 && (a.norm || (a.x.dtype == a.weight.dtype && aligned(a.x))) && aligned(a.weight) && aligned(a.out) &&
         a.x.shape[1] % 8 == 0 && a.out.shape[1] % 2 == 0 && (!a.gated || a.out.dtype == a.weight.dtype);
}

int64_t linear_gemm_scratch_bytes(int64_t n_row, int64_t n_in) { return n_row * n_in * 2; }

void linear_gemm(const CudaStream& s, const Linear& a) {
  Tensor x = a.x;
  if (a.norm) {
    x = make_tensor(a.scratch.data, a.weight.dtype, x.shape[0], x.shape[1]);
    rms_norm(s, {x, a.x, a.norm, a.norm_eps});
  }
  if (s.arch != 90) return linear_mma(s, a, x);
  start_plan(s, a, x, plan_for(s, x.shape[0], x.shape[1], a.weight.shape[0]));
}

}  // namespace prt::cuda
