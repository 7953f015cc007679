// 8192 rows of Llama-3.1-8B: 201 MB, a floor of 48 us at 4.2 TB/s; one row is a matter of latency.
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "ops/cuda_table.h"

namespace prt::cuda {

namespace {

constexpr int kThreads = 256;

template <class T>
struct Rows {  // of one layer
  T *qkv, *k_pages, *v_pages;
  const float *q_norm, *k_norm, *cos_sin;
  const int32_t* slots;
  int64_t stride, stride_angles;
  int32_t h_q, h_kv, d;
  float norm_eps;

  __device__ T* page_row(T* pages, int slot, int h) const {
    return pages + ((static_cast<int64_t>(slot / kPageTokens) * h_kv + h) * kPageTokens + slot % kPageTokens) * d;
  }
};

// kLanes threads have a head, each N elements of its first half and the N that they are rotated with.
template <int N, int kLanes, class T>
__global__ void __launch_bounds__(kThreads) rope_kv_write_kernel(const Rows<T> a) {
  constexpr int kHalf = N * kLanes;
  const int item = blockIdx.y * blockDim.x + threadIdx.x, head = item / kLanes, i = item % kLanes * N;
  const bool is_q = head < a.h_q, is_v = head >= a.h_q + a.h_kv, exists = head < a.h_q + 2 * a.h_kv;
  const float* norm = is_q ? a.q_norm : is_v ? nullptr : a.k_norm;
  float w1[N], w2[N];
  if (exists && norm) {
    load(w1, norm + i);
    load(w2, norm + kHalf + i);
  }
  pdl_wait();
  pdl_launch();
  if (!exists) return;  // all lanes of a head
  const int64_t t = blockIdx.x;
  T* x = a.qkv + t * a.stride + head * 2 * kHalf;
  float x1[N], x2[N], cos[N], sin[N];
  const int slot = a.slots[t];
  load(x1, x + i);
  load(x2, x + kHalf + i);
  load(cos, a.cos_sin + t * a.stride_angles + i);
  load(sin, a.cos_sin + t * a.stride_angles + kHalf + i);
  if (a.q_norm || a.k_norm) {  // all lanes of a warp take part in the sum
    float squares = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) squares += x1[j] * x1[j] + x2[j] * x2[j];
    const float scale = 1.0f / sqrtf(warp_sum<kLanes>(squares) / (2 * kHalf) + a.norm_eps);
    if (norm) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        x1[j] *= scale * w1[j];
        x2[j] *= scale * w2[j];
      }
    }
  }
  if (!is_v) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float y = x1[j] * cos[j] - x2[j] * sin[j];
      x2[j] = x2[j] * cos[j] + x1[j] * sin[j];
      x1[j] = y;
    }
  }
  T* to = is_q ? x : is_v ? a.page_row(a.v_pages, slot, head - a.h_q - a.h_kv) : a.page_row(a.k_pages, slot, head - a.h_q);
  store(to + i, x1);
  store(to + kHalf + i, x2);
}

// Any even d_head: one warp has a head.
template <class T>
__global__ void rope_kv_write_any_kernel(const Rows<T> a) {
  const int head = (blockIdx.y * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32, half = a.d / 2;
  pdl_wait();
  pdl_launch();
  if (head >= a.h_q + 2 * a.h_kv) return;
  const int64_t t = blockIdx.x;
  const bool is_q = head < a.h_q, is_v = head >= a.h_q + a.h_kv;
  const float* norm = is_q ? a.q_norm : is_v ? nullptr : a.k_norm;
  T* x = a.qkv + t * a.stride + head * a.d;
  T* to = is_q ? x : is_v ? a.page_row(a.v_pages, a.slots[t], head - a.h_q - a.h_kv) : a.page_row(a.k_pages, a.slots[t], head - a.h_q);
  float scale = 1;
  if (norm) {
    float squares = 0;
    for (int i = lane; i < a.d; i += 32) squares += to_float(x[i]) * to_float(x[i]);
    scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(a.d) + a.norm_eps);
  }
  const float *cos = a.cos_sin + t * a.stride_angles, *sin = cos + half;
  for (int i = lane; i < half; i += 32) {
    float x1 = to_float(x[i]), x2 = to_float(x[half + i]);
    if (norm) {
      x1 *= scale * norm[i];
      x2 *= scale * norm[half + i];
    }
    to[i] = from_float<T>(is_v ? x1 : x1 * cos[i] - x2 * sin[i]);
    to[half + i] = from_float<T>(is_v ? x2 : x2 * cos[i] + x1 * sin[i]);
  }
}

}  // namespace

void rope_kv_write(const CudaStream& s, const RopeKvWrite& a) {
  const int64_t n_tok = a.slots.shape[0], h_kv = a.k_pages.shape[1], d = a.k_pages.shape[3], heads = a.h_q + 2 * h_kv;
  const bool wide = in_pieces(a.qkv, 8) && in_pieces(a.cos_sin, 4) && in_pieces(a.k_pages, 8) && in_pieces(a.v_pages, 8) &&
                    (!a.q_norm || in_pieces(a.q_norm, 4)) && (!a.k_norm || in_pieces(a.k_norm, 4));
  with_dtype(a.k_pages.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> rows{a.qkv.as<T>(),
                       a.k_pages.as<T>(),
                       a.v_pages.as<T>(),
                       a.q_norm.as<float>(),
                       a.k_norm.as<float>(),
                       a.cos_sin.as<float>(),
                       a.slots.as<int32_t>(),
                       a.qkv.row_stride,
                       a.cos_sin.row_stride,
                       static_cast<int32_t>(a.h_q),
                       static_cast<int32_t>(h_kv),
                       static_cast<int32_t>(d),
                       a.norm_eps};
    const auto run = [&](auto kernel, int64_t lanes) {
      const int64_t items = heads * lanes, threads = std::min<int64_t>(kThreads, (items + 31) / 32 * 32);
      launch(s, kernel, dim3(n_tok, (items + threads - 1) / threads), dim3(threads), 0, rows);
    };
    if (wide && d == 32) run(rope_kv_write_kernel<8, 2, T>, 2);
    else if (wide && d == 64) run(rope_kv_write_kernel<8, 4, T>, 4);
    else if (wide && d == 128) run(rope_kv_write_kernel<8, 8, T>, 8);
    else if (wide && d == 256) run(rope_kv_write_kernel<8, 16, T>, 16);
    else run(rope_kv_write_any_kernel<T>, 32);
  });
}

}  // namespace prt::cuda
