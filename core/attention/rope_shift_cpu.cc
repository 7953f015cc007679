#include "attention/choice.h"
#include "cpu/simd.h"
#include "ops/cpu_table.h"

namespace prt::PRT_ISA {

void rope_shift(ThreadPool& pool, const RopeShift& a) {
  const int64_t h_kv = a.k_pages.shape[1], d = a.k_pages.shape[3], half = d / 2;
  const float *cos = static_cast<const float*>(a.cos_sin.data), *sin = cos + half;
  with_weight(static_cast<int32_t>(a.k_pages.dtype), [&](auto format) {
    using W = decltype(format);
    using T = typename W::T;
    pool.parallel_for(a.pages.shape[0] * h_kv, [&](int64_t item, int32_t) {
      T* k =
          static_cast<T*>(a.k_pages.data) + (static_cast<const int32_t*>(a.pages.data)[item / h_kv] * h_kv + item % h_kv) * kPageTokens * d;
      for (int64_t row = 0; row < kPageTokens; ++row, k += d)
        for (int64_t i = 0; i < half; ++i) {
          const float x = W::get(k[i]), y = W::get(k[half + i]);
          k[i] = W::put(x * cos[i] - y * sin[i]);
          k[half + i] = W::put(y * cos[i] + x * sin[i]);
        }
    });
  });
}

}  // namespace prt::PRT_ISA
