// prt_op_run("silu_mul", {out, gate_up})
#include "ops/cpu_table.h"

namespace prt {

void silu_mul(const Backend& backend, const SiluMul& a) {
  check_shape("silu_mul", "out", a.out, DType::f32, {-1, -1});
  check_shape("silu_mul", "gate_up", a.gate_up, DType::f32, {a.out.shape[0], 2 * a.out.shape[1]});
  backend.cpu->silu_mul(*backend.pool, a);
}

}  // namespace prt
