// log(sum(e^x)) of one row of logits.
#pragma once
#include "cpu/simd.h"

namespace prt::PRT_ISA {

PRT_INLINE float row_max(const float* x, int64_t n) {
  vf best = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) best = max(best, load(x + i));
  float top = max_of(best);
  for (; i < n; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

// Sum of e^((x - top) * scale). The vector sums run over 4096 values before they go into a double: a plain float sum over a
// vocabulary of 128K loses 4 digits.
PRT_INLINE double sum_exp(const float* x, int64_t n, float top, float scale) {
  double total = 0;
  int64_t i = 0;
  while (i + kWidth <= n) {
    vf part{};
    const int64_t end = min64(n - n % kWidth, i + 4096);
    for (; i < end; i += kWidth) part += exp((load(x + i) - top) * scale);
    total += static_cast<double>(sum(part));
  }
  for (; i < n; ++i) total += static_cast<double>(exp(splat((x[i] - top) * scale))[0]);
  return total;
}

PRT_INLINE float log_sum_exp(const float* x, int64_t n) {
  const float top = row_max(x, n);
  return top + static_cast<float>(__builtin_log(sum_exp(x, n, top, 1.0f)));
}

}  // namespace prt::PRT_ISA
