// The matrix product of a decode step, 1 to 64 rows: bound by reading the weights once. Hopper has its own kernels, linear_rows_sm90.cuh.
//
// Work is cut into tiles of kM weight rows, a tile into chunks of kK columns. Each block owns a contiguous range of chunks and streams it
// through a ring in shared memory, far ahead of the tensor cores; weight rows are the M side of the products, so that 8 rows of x cost
// what 1 costs. The ring fills with weights, which no kernel writes, before pdl_wait(): while the kernel before this one finishes, memory
// goes on being read. For that two blocks of successive kernels must fit one multiprocessor, hence the budgets below.
//
// A tile that several blocks share is summed by the last of them to arrive, always in the order of the blocks.
#include "cuda/launch.cuh"
#include "cuda/types.cuh"
#include "ops/cuda_table.h"
#include "ops/linear_cuda.h"
#include "ops/linear_rows_sm90.cuh"

namespace prt::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMaxStages = 10;
constexpr int64_t kMaxRows = 64;
constexpr int64_t kSmem = 112 << 10;    // of 227 KB, so that the next kernel's block is already there, filling its ring
constexpr int64_t kNormBytes = 32 << 10;  // x kept whole in shared memory, normed by each block; more rows are normed by a kernel

struct Problem {
  const char* weight;
  const char* x;        // with norm f32
  const float* norm;
  const float* bias;
  void* out;
  float* partial;       // [2 n_block][n][m]: of tiles shared by blocks
  uint32_t* counters;   // [n_tile]
  int64_t ld_w, ld_x, ld_out;  // elements
  float norm_eps;
  int n_row, n_in, n_out;  // n_out after the gate
  int n_tile, n_chunk;     // chunks per tile
  int n_unit, unit_chunks; // what blocks are dealt: whole tiles, or single chunks
  int n_stage, x_bytes, stage_bytes;
  bool accumulate, gated, out_f32;
};

__device__ __forceinline__ uint32_t shared_addr(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes to shared memory, or 16 zeros
__device__ __forceinline__ void copy_16(uint32_t dst, const void* src, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}
__device__ __forceinline__ void copy_wait_for(int left) {  // until all but the last `left` groups are there
  switch (left) {
    case 0: return copy_wait<0>();
    case 1: return copy_wait<1>();
    case 2: return copy_wait<2>();
    case 3: return copy_wait<3>();
    case 4: return copy_wait<4>();
    case 5: return copy_wait<5>();
    case 6: return copy_wait<6>();
    case 7: return copy_wait<7>();
    default: return copy_wait<8>();
  }
}

__device__ __forceinline__ void load_blocks(uint32_t (&r)[4], uint32_t addr) {  // four 8 x 8 blocks of 16 bits
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(addr)
               : "memory");
}

template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A weight format: how many bytes a row of columns takes, and how a 16 x 16 fragment comes out of a chunk in shared memory, where
// 16-byte unit u of row r lies at unit u ^ (r % 8), free of bank conflicts.
template <class T>
struct Dense {
  using Act = T;
  static __host__ __device__ constexpr int64_t bytes(int64_t columns) { return columns * 2; }
  template <int kK>
  static __device__ __forceinline__ void fragment(uint32_t (&a)[4], uint32_t chunk, int row, int k) {
    const int lane = threadIdx.x % 32, r = row + lane % 16, u = k / 8 + lane / 16;
    load_blocks(a, chunk + r * (kK * 2) + ((u ^ (r & 7)) << 4));
  }
};

__device__ float block_sum(float v, float* warp_sums) {
#pragma unroll
  for (int i = 16; i; i /= 2) v += __shfl_xor_sync(~0u, v, i);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = v;
  __syncthreads();
  v = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) v += warp_sums[i];
  return v;
}

// x, normed and rounded, to shared memory; columns up to the last chunk's end are zero.
template <class T>
__device__ void norm_rows(const Problem& p, char* xs, int pitch, int n_column, float* warp_sums) {
  constexpr int kBlock = 4 * 4 * kThreads;  // columns held in registers
  const bool once = p.n_in <= kBlock;
  for (int r = 0; r < p.n_row; ++r) {
    const float* x = reinterpret_cast<const float*>(p.x) + r * p.ld_x;
    float4 v[4];
    float sum = 0;
    auto load = [&](int base) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int k = base + (j * kThreads + static_cast<int>(threadIdx.x)) * 4;
        v[j] = k < p.n_in ? __ldcg(reinterpret_cast<const float4*>(x + k)) : float4{};
      }
    };
    for (int base = 0; base < p.n_in; base += kBlock) {
      load(base);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum += v[j].x * v[j].x + v[j].y * v[j].y + v[j].z * v[j].z + v[j].w * v[j].w;
    }
    const float scale = rsqrtf(block_sum(sum, warp_sums) / static_cast<float>(p.n_in) + p.norm_eps);
    for (int base = 0; base < n_column; base += kBlock) {
      if (!once) load(base);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int k = base + (j * kThreads + static_cast<int>(threadIdx.x)) * 4;
        if (k >= n_column) continue;
        const float4 w = k < p.n_in ? __ldg(reinterpret_cast<const float4*>(p.norm + k)) : float4{};
        T t[4] = {from_float<T>(v[j].x * scale * w.x), from_float<T>(v[j].y * scale * w.y), from_float<T>(v[j].z * scale * w.z),
                  from_float<T>(v[j].w * scale * w.w)};
        *reinterpret_cast<uint2*>(xs + r * pitch + k * 2) = *reinterpret_cast<const uint2*>(t);
      }
    }
  }
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

template <class T>
__device__ __forceinline__ void store_out(const Problem& p, int row, int out, float v) {
  const int64_t i = row * p.ld_out + out;
  if (p.accumulate) static_cast<float*>(p.out)[i] = __ldcg(static_cast<float*>(p.out) + i) + v;
  else if (p.out_f32) static_cast<float*>(p.out)[i] = v;
  else static_cast<T*>(p.out)[i] = from_float<T>(v);
}

template <int kM, int kN, int kK, int kWarpsM>
struct Tile {
  static constexpr int kWarpsK = kWarps / kWarpsM, kBlocksM = kM / kWarpsM / 16, kBlocksN = kN / 8, kStepsK = kK / kWarpsK / 16;
  static constexpr int kSumLd = kM + 4;  // two columns apart is 8 banks apart
  static constexpr int64_t kSumBytes = kWarpsK * 8 * kSumLd * 4;
  static_assert(kM % (16 * kWarpsM) == 0 && kK % (16 * kWarpsK) == 0 && kM * kK / 8 % kThreads == 0);
};

template <class Format, int kM, int kN, int kK, int kWarpsM, bool kNorm>
__global__ void __launch_bounds__(kThreads, 2) linear_rows_kernel(const __grid_constant__ Problem p) {
  using T = typename Format::Act;
  using L = Tile<kM, kN, kK, kWarpsM>;
  extern __shared__ __align__(128) char smem[];
  __shared__ float warp_sums[kWarps];
  __shared__ bool is_last;
  float* sums = reinterpret_cast<float*>(smem);  // [kWarpsK][8][kSumLd]
  char* xs = smem + L::kSumBytes;                // kNorm: [n_row][pitch]
  char* ring = xs + p.x_bytes;                   // [n_stage] weights [kM][kK], and without kNorm x [n_row][kK]
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const int warp_m = warp % kWarpsM * (kM / kWarpsM), warp_k = warp / kWarpsM * (kK / L::kWarpsK);
  const int pitch = p.n_chunk * kK * 2 + 16;

  pdl_launch();
  auto range_begin = [&](int block) { return static_cast<int>(int64_t{block} * p.n_unit / gridDim.x) * p.unit_chunks; };
  const int begin = range_begin(blockIdx.x), end = range_begin(blockIdx.x + 1);
  const int half = p.gated ? kM / 2 : kM;  // rows of a tile that make outputs

  auto load_weights = [&](int slot, int tile, int chunk) {
    constexpr int kUnits = kK / 8;
    const uint32_t dst = shared_addr(ring + slot * p.stage_bytes);
#pragma unroll
    for (int j = 0; j < kM * kUnits / kThreads; ++j) {
      const int i = tid + j * kThreads, r = i / kUnits, u = i % kUnits, k = chunk * kK + u * 8;
      const bool up = r >= half;
      const int out = tile * half + (up ? r - half : r);
      const bool valid = out < p.n_out && k < p.n_in;
      const int64_t at = valid ? (out + (up ? p.n_out : 0)) * p.ld_w + k : 0;
      copy_16(dst + r * (kK * 2) + ((u ^ (r & 7)) << 4), p.weight + at * 2, valid);
    }
  };
  auto load_x = [&](int slot, int chunk) {
    constexpr int kUnits = kK / 8;
    const uint32_t dst = shared_addr(ring + slot * p.stage_bytes + kM * kK * 2);
#pragma unroll
    for (int j = 0; j < (kN * kUnits + kThreads - 1) / kThreads; ++j) {
      const int i = tid + j * kThreads, r = i / kUnits, u = i % kUnits, k = chunk * kK + u * 8;
      const bool valid = k < p.n_in;
      if (r < p.n_row) copy_16(dst + r * (kK * 2) + ((u ^ (r & 7)) << 4), p.x + (valid ? r * p.ld_x + k : 0) * 2, valid);
    }
  };

  // Where loading is, and where computing is.
  int load_at = begin, load_slot = 0, load_tile = begin / p.n_chunk, load_chunk = begin % p.n_chunk;
  auto load_next = [&] {
    ++load_at;
    if (++load_slot == p.n_stage) load_slot = 0;
    if (++load_chunk == p.n_chunk) load_chunk = 0, ++load_tile;
  };
  for (int s = 0; s < p.n_stage; ++s) {
    if (load_at < end) {
      load_weights(load_slot, load_tile, load_chunk);
      load_next();
    }
    if (kNorm) copy_commit();
  }
  pdl_wait();
  if constexpr (kNorm) {
    norm_rows<T>(p, xs, pitch, p.n_chunk * kK, warp_sums);
  } else {
    for (int s = 0; s < p.n_stage; ++s) {
      if (begin + s < end) load_x(s, (begin + s) % p.n_chunk);
      copy_commit();
    }
  }

  float acc[L::kBlocksM][L::kBlocksN][4] = {};
  int slot = 0, tile = begin / p.n_chunk, chunk = begin % p.n_chunk, first = chunk;
  for (int at = begin; at < end; ++at) {
    copy_wait_for(p.n_stage - 2);
    __syncthreads();
    if (at > begin) {  // into the slot that everybody has just left
      if (load_at < end) {
        load_weights(load_slot, load_tile, load_chunk);
        if (!kNorm) load_x(load_slot, load_chunk);
        load_next();
      }
      copy_commit();
    }

    const uint32_t weights = shared_addr(ring + slot * p.stage_bytes);
    uint32_t x_base;  // of row lane % 8 and unit lane / 8
    int x_row = lane % 8, x_unit = lane / 8;
    if (kNorm) x_base = shared_addr(xs) + chunk * (kK * 2);
    else x_base = weights + kM * kK * 2;
    // b[n][0..1] columns k..k+15, b[n][2..3] the 16 after them
#pragma unroll
    for (int step = 0; step < L::kStepsK; step += 2) {
      uint32_t b[L::kBlocksN][4];
      const int unit = (warp_k + step * 16) / 8 + (L::kStepsK == 1 ? x_unit % 2 : x_unit);
#pragma unroll
      for (int n = 0; n < L::kBlocksN; ++n) {
        const int r = min(n * 8 + x_row, p.n_row - 1);  // rows past the last repeat it, and are not stored
        load_blocks(b[n], kNorm ? x_base + r * pitch + unit * 16 : x_base + r * (kK * 2) + ((unit ^ (r & 7)) << 4));
      }
#pragma unroll
      for (int s = 0; s < 2 && step + s < L::kStepsK; ++s)
#pragma unroll
        for (int m = 0; m < L::kBlocksM; ++m) {
          uint32_t a[4];
          Format::template fragment<kK>(a, weights, warp_m + m * 16, warp_k + (step + s) * 16);
#pragma unroll
          for (int n = 0; n < L::kBlocksN; ++n) mma<T>(acc[m][n], a, b[n][2 * s], b[n][2 * s + 1]);
        }
    }
    if (++slot == p.n_stage) slot = 0;
    if (++chunk < p.n_chunk && at + 1 < end) continue;

    // The end of a tile, or of this block's part of it.
    const bool whole = first == 0 && chunk == p.n_chunk;
    auto finish = [&](int n, int m, auto value) {  // value(m): the sum of the tile's row m
      const int out = tile * half + m;
      if (n >= p.n_row || out >= p.n_out) return;
      float v = value(m) + (p.bias ? p.bias[out] : 0.0f);
      if (p.gated) v = silu(v) * (value(m + half) + (p.bias ? p.bias[p.n_out + out] : 0.0f));
      store_out<T>(p, n, out, v);
    };
    float* mine = p.partial + (2 * blockIdx.x + (first == 0)) * (kM * kN);
#pragma unroll
    for (int b = 0; b < L::kBlocksN; ++b) {
      if (b * 8 >= p.n_row) break;
      __syncthreads();
      float* dst = sums + warp / kWarpsM * 8 * L::kSumLd + lane % 4 * 2 * L::kSumLd + warp_m + lane / 4;
#pragma unroll
      for (int m = 0; m < L::kBlocksM; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) dst[i % 2 * L::kSumLd + m * 16 + i / 2 * 8] = acc[m][b][i];
      __syncthreads();
      auto warps_sum = [&](int n, int m) {
        float v = 0;
#pragma unroll
        for (int w = 0; w < L::kWarpsK; ++w) v += sums[(w * 8 + n) * L::kSumLd + m];
        return v;
      };
      if (whole) {
        for (int i = tid; i < 8 * half; i += kThreads) finish(b * 8 + i / half, i % half, [&](int m) { return warps_sum(i / half, m); });
      } else {
        for (int i = tid; i < 8 * kM; i += kThreads)
          if (b * 8 + i / kM < p.n_row) mine[b * 8 * kM + i] = warps_sum(i / kM, i % kM);
      }
    }
    if (!whole) {
      // Blocks that share this tile: the one that owns its first chunk up to the one that owns its last.
      auto owner = [&](int at) {
        const int64_t unit = at / p.unit_chunks;
        return static_cast<int>(((unit + 1) * gridDim.x - 1) / p.n_unit);
      };
      const int from = owner(tile * p.n_chunk), to = owner((tile + 1) * p.n_chunk - 1);
      __threadfence();
      __syncthreads();
      if (tid == 0) {
        is_last = atomicAdd(p.counters + tile, 1u) == static_cast<uint32_t>(to - from);
        if (is_last) p.counters[tile] = 0;
      }
      __syncthreads();
      if (is_last) {
        __threadfence();
        for (int i = tid; i < p.n_row * half; i += kThreads) {
          const int n = i / half;
          finish(n, i % half, [&](int m) {
            float v = __ldcg(p.partial + (2 * from + 1) * (kM * kN) + n * kM + m);
            for (int b = from + 1; b <= to; ++b) v += __ldcg(p.partial + 2 * b * (kM * kN) + n * kM + m);
            return v;
          });
        }
      }
    }
    if (chunk == p.n_chunk) chunk = 0, ++tile;
    first = 0;
#pragma unroll
    for (int m = 0; m < L::kBlocksM; ++m)
#pragma unroll
      for (int b = 0; b < L::kBlocksN; ++b)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][b][i] = 0;
  }
}

struct Plan {
  int64_t n_tile, n_chunk, n_unit, unit_chunks, n_block;
};

// split: blocks get equal numbers of chunks and share tiles; otherwise whole tiles.
Plan make_plan(const CudaStream& s, int64_t n_in, int64_t n_out, int64_t m, int64_t k, bool split) {
  Plan p;
  p.n_tile = (n_out + m - 1) / m;
  p.n_chunk = (n_in + k - 1) / k;
  if (p.n_tile > CudaStream::kCounters) split = false;
  p.unit_chunks = split ? 1 : p.n_chunk;
  p.n_unit = p.n_tile * p.n_chunk / p.unit_chunks;
  const int64_t per_block = (p.n_unit + s.n_sm - 1) / s.n_sm;
  p.n_block = split ? std::min<int64_t>(p.n_unit, s.n_sm) : (p.n_unit + per_block - 1) / per_block;
  return p;
}

template <class Format, int kM, int kN, int kK, int kWarpsM, bool kNorm>
void run(const CudaStream& s, const Linear& a, bool split, int64_t smem_budget = kSmem) {
  using L = Tile<kM, kN, kK, kWarpsM>;
  const int64_t n_row = a.x.shape[0], n_in = a.x.shape[1], n_out = a.weight.shape[0];
  const Plan plan = make_plan(s, n_in, n_out, kM, kK, split);
  Problem p{};
  p.weight = a.weight.as<char>();
  p.x = a.x.as<char>();
  p.norm = a.norm.as<float>();
  p.bias = a.bias.as<float>();
  p.out = a.out.data;
  p.partial = a.scratch.as<float>();
  p.counters = s.counters;
  p.ld_w = a.weight.row_stride;
  p.ld_x = a.x.row_stride;
  p.ld_out = a.out.row_stride;
  p.norm_eps = a.norm_eps;
  p.n_row = static_cast<int>(n_row);
  p.n_in = static_cast<int>(n_in);
  p.n_out = static_cast<int>(a.gated ? n_out / 2 : n_out);
  p.n_tile = static_cast<int>(plan.n_tile);
  p.n_chunk = static_cast<int>(plan.n_chunk);
  p.n_unit = static_cast<int>(plan.n_unit);
  p.unit_chunks = static_cast<int>(plan.unit_chunks);
  p.accumulate = a.accumulate;
  p.gated = a.gated;
  p.out_f32 = a.out.dtype == DType::f32;
  p.x_bytes = kNorm ? static_cast<int>((n_row * (plan.n_chunk * kK * 2 + 16) + 127) / 128 * 128) : 0;
  p.stage_bytes = static_cast<int>(Format::bytes(kK) * kM + (kNorm ? 0 : n_row * kK * 2));
  p.stage_bytes = (p.stage_bytes + 127) / 128 * 128;
  const int64_t fixed = L::kSumBytes + p.x_bytes, budget = std::min<int64_t>(smem_budget, s.smem_per_block - 1024);
  p.n_stage = static_cast<int>(std::clamp<int64_t>((budget - fixed) / p.stage_bytes, 2, kMaxStages));
  launch(s, linear_rows_kernel<Format, kM, kN, kK, kWarpsM, kNorm>, dim3(static_cast<unsigned>(plan.n_block)), dim3(kThreads),
         fixed + p.n_stage * int64_t{p.stage_bytes}, p);
}

bool norm_inside(const Linear& a) { return a.norm && a.x.shape[0] * a.x.shape[1] * 2 <= kNormBytes && a.x.shape[0] <= 4; }

int64_t partial_bytes(const CudaStream& s, int64_t n_row) { return int64_t{2} * s.n_sm * 128 * ((n_row + 7) / 8 * 8) * 4 * 2; }

template <class T>
void dispatch(const CudaStream& s, Linear a) {
  const int64_t n_row = a.x.shape[0];
  if (norm_inside(a)) return run<Dense<T>, 32, 8, 256, 1, true>(s, a, false);
  if (a.norm) {
    const Tensor x = make_tensor(a.scratch.as<char>() + partial_bytes(s, n_row), a.weight.dtype, n_row, a.x.shape[1]);
    rms_norm(s, {x, a.x, a.norm, a.norm_eps});
    a.x = x;
    a.norm = {};
  }
  if (n_row <= 8) return run<Dense<T>, 32, 8, 256, 1, false>(s, a, false);
  if (n_row <= 16) return run<Dense<T>, 64, 16, 128, 2, false>(s, a, true);
  if (n_row <= 32) return run<Dense<T>, 128, 32, 64, 4, false>(s, a, true);
  return run<Dense<T>, 128, 64, 64, 4, false>(s, a, true);
}

bool aligned(const Tensor& t, int64_t elements) { return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.row_stride % elements == 0; }

}  // namespace

bool linear_rows_fits(const Linear& a) {
  const int64_t n_row = a.x.shape[0], n_in = a.x.shape[1];
  return n_row <= kMaxRows && a.weight.dtype != DType::f32 && n_in % 8 == 0 && aligned(a.weight, 8) && aligned(a.x, a.norm ? 4 : 8) &&
         (!a.norm || reinterpret_cast<uintptr_t>(a.norm.data) % 16 == 0) && (!a.gated || a.weight.shape[0] % 16 == 0);
}

int64_t linear_rows_scratch_bytes(const CudaStream& s, int64_t n_row, int64_t n_in, int64_t, bool) {
  if (s.arch == 90) return n_row > kMaxRows ? 0 : rows_sm90::linear_scratch_bytes(n_row, n_in);
  return n_row > kMaxRows ? 0 : partial_bytes(s, n_row) + (n_row * n_in * 2 + 15) / 16 * 16;
}

void linear_rows(const CudaStream& s, const Linear& a) {
  if (a.x.shape[0] == 0) return;
  if (s.arch == 90) return rows_sm90::linear(s, a);
  a.weight.dtype == DType::bf16 ? dispatch<bf16>(s, a) : dispatch<f16>(s, a);
}

}  // namespace prt::cuda
