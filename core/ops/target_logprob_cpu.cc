#include "cpu/softmax.h"
#include "ops/cpu_table.h"

namespace prt::PRT_ISA {

void target_logprob(ThreadPool& pool, const TargetLogprob& a) {
  pool.parallel_for(a.logits.shape[0], [&](int64_t r, int32_t) {
    const int32_t target = static_cast<const int32_t*>(a.targets.data)[r];
    const float* logits = a.logits.row<float>(r);
    static_cast<float*>(a.out.data)[r] = target < 0 ? 0.0f : logits[target] - log_sum_exp(logits, a.logits.shape[1]);
  });
}

}  // namespace prt::PRT_ISA
