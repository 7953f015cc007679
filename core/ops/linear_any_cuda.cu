// The plain product: any type, size and stride, f32 arithmetic. f32 models run on it, and what the tensor-core forms cannot address (rows
// that are not whole 16-byte pieces).
#include "cuda/launch.cuh"
#include "cuda/types.cuh"
#include "ops/linear_cuda.h"

namespace prt::cuda {

namespace {

constexpr int kTile = 64, kTileIn = 16, kThreads = 256;  // 64 x 64 outputs per block, 4 x 4 per thread

struct Matrices {
  const void* x;
  const void* weight;
  void* out;
  const float *bias, *norm, *row_scale;
  int64_t x_stride, weight_stride, out_stride;
  int64_t n_row, n_in, n_out;  // n_out: columns of out
  int64_t tile_outs;           // columns of out per block: 64, gated 32
  bool gated, accumulate, out_f32;
};

// row_scale[r] = 1 / sqrt(mean(x[r]^2) + eps); one block per row
__global__ void __launch_bounds__(kThreads) row_scale_kernel(float* row_scale, const float* x, int64_t x_stride, int64_t n_in, float eps) {
  pdl_wait();
  pdl_launch();
  __shared__ float part[kThreads];
  const float* row = x + blockIdx.x * x_stride;
  float sum = 0;
  for (int64_t i = threadIdx.x; i < n_in; i += kThreads) sum += row[i] * row[i];
  part[threadIdx.x] = sum;
  for (int n = kThreads / 2; n > 0; n /= 2) {
    __syncthreads();
    if (threadIdx.x < n) part[threadIdx.x] += part[threadIdx.x + n];
  }
  if (threadIdx.x == 0) row_scale[blockIdx.x] = rsqrtf(part[0] / static_cast<float>(n_in) + eps);
}

template <class W, class X>
__global__ void __launch_bounds__(kThreads, 2) linear_any_kernel(const Matrices m) {
  __shared__ float xs[kTileIn][kTile + 1], ws[kTileIn][kTile + 1];
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const int64_t row0 = blockIdx.y * int64_t{kTile}, out0 = blockIdx.x * m.tile_outs;
  // Column j of the tile; gated: 32 gate rows, then the matching up rows, so that a thread's columns 0, 1 and 2, 3 belong together.
  const auto weight_row = [&](int j) { return m.gated && j >= kTile / 2 ? m.n_out + out0 + j - kTile / 2 : out0 + j; };
  const int64_t n_weight_row = m.gated ? 2 * m.n_out : m.n_out;
  pdl_wait();
  pdl_launch();
  float sum[4][4] = {};
  for (int64_t i0 = 0; i0 < m.n_in; i0 += kTileIn) {
    for (int e = threadIdx.x; e < kTile * kTileIn; e += kThreads) {
      const int64_t i = i0 + e % kTileIn, row = row0 + e / kTileIn, o = weight_row(e / kTileIn);
      float x = 0, w = 0;
      if (i < m.n_in && row < m.n_row) {
        x = to_float(static_cast<const X*>(m.x)[row * m.x_stride + i]);
        if (m.norm) x *= m.row_scale[row] * m.norm[i];
      }
      if (i < m.n_in && o < n_weight_row) w = to_float(static_cast<const W*>(m.weight)[o * m.weight_stride + i]);
      xs[e % kTileIn][e / kTileIn] = x;
      ws[e % kTileIn][e / kTileIn] = w;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kTileIn; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += xs[k][ty + 16 * i] * ws[k][tx + 16 * j];
    __syncthreads();
  }
  const int n_col = m.gated ? 2 : 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = row0 + ty + 16 * i;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t o = out0 + tx + 16 * j;
      if (row >= m.n_row || j >= n_col || o >= m.n_out) continue;
      float y = sum[i][j] + (m.bias ? m.bias[o] : 0.0f);
      if (m.gated) y = y / (1 + expf(-y)) * (sum[i][j ^ 2] + (m.bias ? m.bias[m.n_out + o] : 0.0f));
      const int64_t at = row * m.out_stride + o;
      float* out = static_cast<float*>(m.out) + at;
      if (!m.out_f32) static_cast<W*>(m.out)[at] = from_float<W>(y);
      else *out = m.accumulate ? *out + y : y;
    }
  }
}

}  // namespace

int64_t linear_any_scratch_bytes(int64_t n_row) { return n_row * 4; }

void linear_any(const CudaStream& s, const Linear& a) {
  Matrices m{};
  m.x = a.x.data, m.weight = a.weight.data, m.out = a.out.data, m.bias = a.bias.as<float>(), m.norm = a.norm.as<float>();
  m.x_stride = a.x.row_stride, m.weight_stride = a.weight.row_stride, m.out_stride = a.out.row_stride;
  m.n_row = a.x.shape[0], m.n_in = a.x.shape[1], m.n_out = a.out.shape[1];
  m.tile_outs = a.gated ? kTile / 2 : kTile;
  m.gated = a.gated, m.accumulate = a.accumulate, m.out_f32 = a.out.dtype == DType::f32;
  if (a.norm) {
    m.row_scale = a.scratch.as<float>();
    launch(s, row_scale_kernel, dim3(static_cast<unsigned>(m.n_row)), dim3(kThreads), 0, a.scratch.as<float>(), a.x.as<const float>(),
           m.x_stride, m.n_in, a.norm_eps);
  }
  const dim3 grid(static_cast<unsigned>((m.n_out + m.tile_outs - 1) / m.tile_outs), static_cast<unsigned>((m.n_row + kTile - 1) / kTile));
  with_dtype(a.weight.dtype, [&](auto w) {
    using W = decltype(w);
    if (a.x.dtype == DType::f32) launch(s, linear_any_kernel<W, float>, grid, dim3(kThreads), 0, m);
    else launch(s, linear_any_kernel<W, W>, grid, dim3(kThreads), 0, m);
  });
}

}  // namespace prt::cuda
