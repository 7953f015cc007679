#include "attention/choice.h"
#include "cpu/simd.h"
#include "ops/cpu_table.h"

namespace prt::PRT_ISA {

namespace {

// What is compared: the query of all heads, or their mean. Scaled alike it makes no difference, so the mean is a sum.
PRT_INLINE float part_of(const float* q, int64_t width, int64_t w, int64_t i) {
  float x = 0;
  for (int64_t j = i; j < width; j += w) x += q[j];
  return x;
}

PRT_INLINE bool serves(const Reuse& a, int64_t place, int64_t kv_len, const float* q) {
  const int64_t made = static_cast<const int32_t*>(a.made.data)[place], since = kv_len - made, w = a.query.shape[1];
  if (made <= 0 || since <= 0 || (a.stride > 0 && since >= a.stride)) return false;
  if (a.check == 0 || since % a.check != 0) return true;
  const float* before = a.query.row<float>(place);
  double both = 0, old = 0, now = 0;
  for (int64_t i = 0; i < w; ++i) {
    const auto x = static_cast<double>(before[i]), y = static_cast<double>(part_of(q, a.q.shape[1], w, i));
    both += x * y, old += x * x, now += y * y;
  }
  return both >= static_cast<double>(a.threshold) * __builtin_sqrt(old) * __builtin_sqrt(now);
}

}  // namespace

void reuse(ThreadPool&, const Reuse& a) {
  const int64_t h_kv = a.ranges.shape[1], w = a.query.shape[1];
  for (int64_t e = 0; e < a.q.shape[0]; ++e) {
    const int32_t place = static_cast<const int32_t*>(a.state.data)[e], kv_len = static_cast<const int32_t*>(a.kv_len.data)[e];
    int32_t &anew = static_cast<int32_t*>(a.anew.data)[e], &kept = static_cast<int32_t*>(a.kept.data)[e];
    anew = kept = -1;
    if (place < 0) continue;
    const float* q = a.q.row<float>(e);
    if (serves(a, place, kv_len, q)) {
      kept = place;
      for (int64_t h = 0; h < h_kv; ++h) {  // the last range reaches to the newest row
        const int32_t n = a.n_range.row<int32_t>(place)[h];
        int32_t* range = a.ranges.row<int32_t>(place) + h * a.ranges.shape[2] * 2;
        range[2 * n - 1] = (n > 1 ? range[2 * n - 3] : 0) + kv_len - range[2 * n - 2];
      }
    } else {
      anew = place;
      float* keep = a.query.row<float>(place);
      for (int64_t i = 0; i < w; ++i) keep[i] = part_of(q, a.q.shape[1], w, i);
    }
  }
}

}  // namespace prt::PRT_ISA
