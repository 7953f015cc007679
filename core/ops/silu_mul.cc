// prt_op_run("silu_mul", {out, gate_up})
#include "ops/cpu_table.h"
#include "ops/cuda_table.h"

namespace prt {

void silu_mul(const Backend& backend, const SiluMul& a) {
  check_stored("silu_mul", "out", a.out, {-1, -1});
  check(backend.cuda || a.out.dtype == DType::f32, "silu_mul: out is ", shape_text(a.out), ", expected f32 on the CPU");
  check_shape("silu_mul", "gate_up", a.gate_up, a.out.dtype, {a.out.shape[0], 2 * a.out.shape[1]});
  if (backend.cuda) return backend.cuda->silu_mul(*backend.stream, a);
  backend.cpu->silu_mul(*backend.pool, a);
}

}  // namespace prt
