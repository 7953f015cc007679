// The product of many rows with the tensor-core instructions that every GPU since sm_80 has: out[n_row][n_out] = x weight^T in bf16 or f16,
// f32 accumulators. 128 rows x 128 weight rows per block of 8 warps, 64 x 32 per warp, 32 columns at a time through a ring of shared memory
// filled by cp.async. As on Hopper (linear_gemm_cuda.cu), the weight rows of a tile are two runs of 64: for a gated product gate rows and
// the matching up rows, otherwise adjacent; a thread holds the same columns of both.
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "ops/linear_cuda.h"

namespace prt::cuda {

namespace {

constexpr int kTile = 128, kTileIn = 32, kStages = 4, kThreads = 256;
constexpr int kTileBytes = kTile * kTileIn * 2, kStageBytes = 2 * kTileBytes;

struct Matrices {
  const void* x;
  const void* weight;
  void* out;
  const float* bias;
  int64_t x_stride, weight_stride, out_stride;
  int32_t n_row, n_in, n_out, n_weight;  // n_out: columns of out; n_weight: rows of the weight
  int32_t half, out_step;  // weight rows from a tile's first run to its second; to the next tile
  bool accumulate;
};

// Rows of 64 bytes, their 16-byte pieces permuted so that 8 consecutive rows lie in different banks.
__device__ __forceinline__ uint32_t at(uint32_t tile, int row, int piece) { return tile + row * 64 + ((piece ^ (row >> 1 & 3)) << 4); }

template <class T, bool kGated, bool kF32>
__global__ void __launch_bounds__(kThreads, 1) linear_mma_kernel(const Matrices m) {
  extern __shared__ __align__(128) char smem[];
  const uint32_t base = smem_addr(smem);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_row = warp / 4 * 64, warp_out = warp % 4 * 16;
  const int row0 = blockIdx.x * kTile, out0 = blockIdx.y * m.out_step, steps = (m.n_in + kTileIn - 1) / kTileIn;
  const T* x = static_cast<const T*>(m.x);
  const T* weight = static_cast<const T*>(m.weight);

  const auto load = [&](int step) {
    if (step < steps) {
      const uint32_t stage = base + step % kStages * kStageBytes;
#pragma unroll
      for (int e = threadIdx.x; e < kTile * 4; e += kThreads) {
        const int r = e / 4, piece = e % 4, in = step * kTileIn + piece * 8, row = row0 + r, o = out0 + r % 64 + r / 64 * m.half;
        const bool x_valid = in < m.n_in && row < m.n_row, weight_valid = in < m.n_in && o < m.n_weight;
        cp_async_16(at(stage, r, piece), x_valid ? x + row * m.x_stride + in : x, x_valid);
        cp_async_16(at(stage + kTileBytes, r, piece), weight_valid ? weight + o * m.weight_stride + in : weight, weight_valid);
      }
    }
    cp_async_commit();
  };

  pdl_wait();
  pdl_launch();
  float c[4][4][4] = {};  // [16 rows][8 weight rows: two of the first run, two of the second]
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    load(step + kStages - 1);
    const uint32_t xs = base + step % kStages * kStageBytes, ws = xs + kTileBytes;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint32_t a[4][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) ldmatrix_x4(a[i], at(xs, warp_row + 16 * i + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int run = 0; run < 2; ++run) ldmatrix_x4(b[run], at(ws, run * 64 + warp_out + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_16816<T>(c[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }

  // Two neighbouring columns at a time; n_out is even.
#pragma unroll
  for (int j = 0; j < (kGated ? 2 : 4); ++j) {
    const int run = j / 2, o = warp_out + j % 2 * 8 + lane % 4 * 2, col = out0 + run * m.half + o;
    if (col >= m.n_out) continue;
    float bias[2] = {}, up_bias[2] = {};
    if (m.bias) {
      bias[0] = m.bias[col], bias[1] = m.bias[col + 1];
      if (kGated) up_bias[0] = m.bias[col + m.half], up_bias[1] = m.bias[col + m.half + 1];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = row0 + warp_row + 16 * (i / 2) + i % 2 * 8 + lane / 4;
      if (row >= m.n_row) continue;
      float y[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        y[e] = c[i / 2][j][i % 2 * 2 + e] + bias[e];
        if (kGated) y[e] = y[e] / (1 + __expf(-y[e])) * (c[i / 2][j ^ 2][i % 2 * 2 + e] + up_bias[e]);
      }
      const int64_t at = row * m.out_stride + col;
      if constexpr (kF32) {
        float2* out = reinterpret_cast<float2*>(static_cast<float*>(m.out) + at);
        const float2 old = m.accumulate ? *out : float2{};
        *out = m.accumulate ? float2{old.x + y[0], old.y + y[1]} : float2{y[0], y[1]};
      } else {
        *reinterpret_cast<uint32_t*>(static_cast<T*>(m.out) + at) = pack2<T>(y[0], y[1]);
      }
    }
  }
}

}  // namespace

void linear_mma(const CudaStream& s, const Linear& a, const Tensor& x) {
  Matrices m{};
  m.x = x.data, m.weight = a.weight.data, m.out = a.out.data, m.bias = a.bias.as<float>();
  m.x_stride = x.row_stride, m.weight_stride = a.weight.row_stride, m.out_stride = a.out.row_stride;
  m.n_row = static_cast<int32_t>(x.shape[0]), m.n_in = static_cast<int32_t>(x.shape[1]);
  m.n_out = static_cast<int32_t>(a.out.shape[1]), m.n_weight = static_cast<int32_t>(a.weight.shape[0]);
  m.half = a.gated ? m.n_out : kTile / 2;
  m.out_step = a.gated ? kTile / 2 : kTile;
  m.accumulate = a.accumulate;
  const dim3 grid(static_cast<unsigned>((m.n_row + kTile - 1) / kTile), static_cast<unsigned>((m.n_out + m.out_step - 1) / m.out_step));
  with_dtype(a.weight.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, float>) {
      const auto start = [&](auto* kernel) { launch(s, kernel, grid, dim3(kThreads), kStages * kStageBytes, m); };
      if (a.gated) start(linear_mma_kernel<T, true, false>);
      else if (a.out.dtype == DType::f32) start(linear_mma_kernel<T, false, true>);
      else start(linear_mma_kernel<T, false, false>);
    }
  });
}

}  // namespace prt::cuda
