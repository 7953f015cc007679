// RMS norm of one row, shared by rms_norm and the q/k norm inside rope_kv_write.
#pragma once
#include "cpu/simd.h"

namespace prt::PRT_ISA {

PRT_INLINE void rms_row(float* out, const float* x, const float* weight, int64_t d, float eps) {
  vf squares{};
  int64_t i = 0;
  for (; i + kWidth <= d; i += kWidth) squares = fma(load(x + i), load(x + i), squares);
  float total = sum(squares);
  for (; i < d; ++i) total += x[i] * x[i];
  const float scale = 1.0f / __builtin_sqrtf(total / static_cast<float>(d) + eps);
  for (i = 0; i + kWidth <= d; i += kWidth) store(out + i, load(x + i) * scale * load(weight + i));
  for (; i < d; ++i) out[i] = x[i] * scale * weight[i];
}

}  // namespace prt::PRT_ISA
