#include "cpu/simd.h"
#include "ops/cpu_table.h"

namespace prt::PRT_ISA {

void embedding(ThreadPool& pool, const Embedding& a) {
  const int64_t d = a.weight.shape[1];
  with_weight(static_cast<int32_t>(a.weight.dtype), [&](auto format) {
    using W = decltype(format);
    pool.parallel_for(a.tokens.shape[0], [&](int64_t t, int32_t) {
      const typename W::T* w = a.weight.row<typename W::T>(a.tokens.as<int32_t>()[t]);
      float* out = a.out.row<float>(t);
      int64_t i = 0;
      for (; i + kWidth <= d; i += kWidth) store(out + i, W::load(w + i));
      for (; i < d; ++i) out[i] = W::get(w[i]);
    });
  });
}

}  // namespace prt::PRT_ISA
