#include "cpu/simd.h"
#include "ops/cpu_table.h"

namespace prt::PRT_ISA {

void silu_mul(ThreadPool& pool, const SiluMul& a) {
  const int64_t d_ff = a.out.shape[1];
  pool.parallel_for(a.out.shape[0], [&](int64_t t, int32_t) {
    const float *gate = a.gate_up.row<float>(t), *up = gate + d_ff;
    float* out = a.out.row<float>(t);
    int64_t i = 0;
    for (; i + kWidth <= d_ff; i += kWidth) {
      const vf g = load(gate + i);
      store(out + i, g / (1.0f + exp(-g)) * load(up + i));
    }
    for (; i < d_ff; ++i) out[i] = gate[i] / (1.0f + exp(splat(-gate[i]))[0]) * up[i];
  });
}

}  // namespace prt::PRT_ISA
