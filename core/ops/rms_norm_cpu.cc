#include "cpu/rms.h"
#include "ops/cpu_table.h"

namespace prt::PRT_ISA {

void rms_norm(ThreadPool& pool, const RmsNorm& a) {
  pool.parallel_for(a.x.shape[0], [&](int64_t r, int32_t) {
    rms_row(a.out.row<float>(r), a.x.row<float>(r), a.weight.as<float>(), a.x.shape[1], a.eps);
  });
}

}  // namespace prt::PRT_ISA
