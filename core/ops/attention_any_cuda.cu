#include "cuda/launch.cuh"
#include "cuda/types.cuh"
#include "ops/attention_cuda.h"

namespace prt::cuda {
namespace {

constexpr int kThreads = 128;  // one key each for the scores, then one or two columns each for the values

struct Params {
  const int32_t *q_begin, *kv_len, *page_table;
  int64_t max_pages, q_stride, out_stride;
  int32_t n_entry, h_kv, group, d, window;
  float scale;
  bool wide;  // rows of k_pages are whole aligned 16-byte units
  float *scores, *log_total;  // of attention_decode, as in Attention, or null
  const int32_t* state;
  int64_t room;
};

// f of all threads' x, in a fixed order
template <class F>
__device__ float block_reduce(float x, float* shared, F f) {
  for (int i = 16; i > 0; i /= 2) x = f(x, __shfl_xor_sync(~0u, x, i));
  __syncthreads();  // the previous result has been read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = shared[0];
  for (int i = 1; i < kThreads / 32; ++i) x = f(x, shared[i]);
  return x;
}

template <class T>
__device__ float dot(const float* query, const T* key, int32_t d, bool wide) {
  constexpr int kUnit = 16 / sizeof(T);
  float sum = 0;
  if (wide) {
    for (int32_t i = 0; i < d; i += kUnit) {
      const uint4 unit = *reinterpret_cast<const uint4*>(key + i);
      const T* x = reinterpret_cast<const T*>(&unit);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) sum = fmaf(query[i + j], to_float(x[j]), sum);
    }
  } else {
    for (int32_t i = 0; i < d; ++i) sum = fmaf(query[i], to_float(key[i]), sum);
  }
  return sum;
}

// A block per (query row, head): softmax over 128 keys at a time, with a running maximum.
template <class T>
__global__ void __launch_bounds__(kThreads) attention_any_kernel(T* out, const T* q, const T* k_pages, const T* v_pages, Params p) {
  __shared__ float query[kMaxHead], weight[kThreads], shared[kThreads / 32];
  __shared__ int64_t key_row[kThreads];  // of k_pages and v_pages as rows of d
  pdl_wait();
  pdl_launch();
  const int32_t row = static_cast<int32_t>(blockIdx.x), head = static_cast<int32_t>(blockIdx.y), thread = static_cast<int32_t>(threadIdx.x);
  int32_t entry = 0;  // the last one that begins at or before the row, empty ones skipped
  for (int32_t end = p.n_entry; entry + 1 < end;) {
    const int32_t middle = (entry + end) / 2;
    (p.q_begin[middle] <= row ? entry : end) = middle;
  }
  if (row >= p.q_begin[p.n_entry] || (p.state && p.state[entry] < 0)) return;
  const int32_t key_end = p.kv_len[entry] - (p.q_begin[entry + 1] - row) + 1;
  const int32_t key_begin = p.window > 0 ? max(0, key_end - p.window) : 0;
  const int32_t* pages = p.page_table + entry * p.max_pages;
  for (int32_t i = thread; i < p.d; i += kThreads) query[i] = to_float(q[row * p.q_stride + head * p.d + i]) * p.scale;

  float top = -INFINITY, total = 0, sum[2] = {0, 0};
  for (int32_t k0 = key_begin; k0 < key_end; k0 += kThreads) {
    const int32_t k = k0 + thread;
    __syncthreads();  // query is there, and the previous weights have been read
    float score = -INFINITY;
    if (k < key_end) {
      key_row[thread] = (static_cast<int64_t>(pages[k / kPageTokens]) * p.h_kv + head / p.group) * kPageTokens + k % kPageTokens;
      score = dot(query, k_pages + key_row[thread] * p.d, p.d, p.wide);
      if (p.scores) p.scores[(int64_t{entry} * gridDim.y + head) * p.room + k] = score;
    }
    const float most = fmaxf(top, block_reduce(score, shared, [](float a, float b) { return fmaxf(a, b); }));
    const float rescale = expf(top - most);
    weight[thread] = expf(score - most);
    total = total * rescale + block_reduce(weight[thread], shared, [](float a, float b) { return a + b; });
    top = most;
    const int32_t n = min(kThreads, key_end - k0);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int32_t i = thread + c * kThreads;
      sum[c] *= rescale;
      if (i < p.d)
        for (int32_t j = 0; j < n; ++j) sum[c] = fmaf(weight[j], to_float(v_pages[key_row[j] * p.d + i]), sum[c]);
    }
  }
  for (int c = 0; c < 2; ++c)
    if (thread + c * kThreads < p.d) out[row * p.out_stride + head * p.d + thread + c * kThreads] = from_float<T>(sum[c] / total);
  if (p.log_total && thread == 0) p.log_total[int64_t{entry} * gridDim.y + head] = top + logf(total);
}

}  // namespace

void attention_any(const CudaStream& s, const Attention& a) {
  const int64_t d = a.k_pages.shape[3], h_kv = a.k_pages.shape[1], n_tok = a.q.shape[0], h_q = a.q.shape[1] / d;
  const Params p{a.q_begin.as<int32_t>(),
                 a.kv_len.as<int32_t>(),
                 a.page_table.as<int32_t>(),
                 a.page_table.shape[1],
                 a.q.row_stride,
                 a.out.row_stride,
                 static_cast<int32_t>(a.kv_len.shape[0]),
                 static_cast<int32_t>(h_kv),
                 static_cast<int32_t>(h_q / h_kv),
                 static_cast<int32_t>(d),
                 static_cast<int32_t>(std::min<int64_t>(a.window, 1 << 30)),
                 a.scale,
                 d * dtype_size(a.k_pages.dtype) % 16 == 0 && reinterpret_cast<uintptr_t>(a.k_pages.data) % 16 == 0,
                 a.scores.as<float>(),
                 a.log_total.as<float>(),
                 a.state.as<int32_t>(),
                 a.scores ? a.scores.shape[2] : 0};
  with_dtype(a.k_pages.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(s, attention_any_kernel<T>, dim3(static_cast<uint32_t>(n_tok), static_cast<uint32_t>(h_q)), kThreads, 0, a.out.as<T>(),
           a.q.as<T>(), a.k_pages.as<T>(), a.v_pages.as<T>(), p);
  });
}

}  // namespace prt::cuda
