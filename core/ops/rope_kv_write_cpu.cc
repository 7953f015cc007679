#include "cpu/rms.h"
#include "ops/cpu_table.h"

namespace prt::PRT_ISA {

// (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 the two halves of the head
PRT_INLINE void rotate(float* x, const float* cos, const float* sin, int64_t half) {
  int64_t i = 0;
  for (; i + kWidth <= half; i += kWidth) {
    const vf a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(x + i, a * c - b * s);
    store(x + half + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = a * cos[i] - b * sin[i];
    x[half + i] = b * cos[i] + a * sin[i];
  }
}

void rope_kv_write(ThreadPool& pool, const RopeKvWrite& a) {
  const int64_t h_kv = a.k_pages.shape[1], d = a.k_pages.shape[3], half = d / 2, h_q = a.h_q;
  with_weight(static_cast<int32_t>(a.k_pages.dtype), [&](auto format) {
    using W = decltype(format);
    using T = typename W::T;
    pool.parallel_for(a.slots.shape[0], [&](int64_t t, int32_t) {
      float* x = a.qkv.row<float>(t);
      const float *cos = a.cos_sin.row<float>(t), *sin = cos + half;
      for (int64_t h = 0; h < h_q + h_kv; ++h) {
        const Tensor& norm = h < h_q ? a.q_norm : a.k_norm;
        if (norm.data) rms_row(x + h * d, x + h * d, static_cast<const float*>(norm.data), d, a.norm_eps);
        rotate(x + h * d, cos, sin, half);
      }
      const int64_t slot = static_cast<const int32_t*>(a.slots.data)[t], page = slot / kPageTokens, row = slot % kPageTokens;
      for (int64_t h = 0; h < h_kv; ++h) {
        const int64_t at = ((page * h_kv + h) * kPageTokens + row) * d;
        const float *k = x + (h_q + h) * d, *v = x + (h_q + h_kv + h) * d;
        T *k_out = static_cast<T*>(a.k_pages.data) + at, *v_out = static_cast<T*>(a.v_pages.data) + at;
        for (int64_t i = 0; i < d; ++i) {
          k_out[i] = W::put(k[i]);
          v_out[i] = W::put(v[i]);
        }
      }
    });
  });
}

}  // namespace prt::PRT_ISA
