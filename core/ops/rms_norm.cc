// prt_op_run("rms_norm", {out, x, weight}, {eps})
#include "ops/cpu_table.h"
#include "ops/cuda_table.h"

namespace prt {

void rms_norm(const Backend& backend, const RmsNorm& a) {
  check_shape("rms_norm", "x", a.x, DType::f32, {-1, -1});
  check_stored("rms_norm", "out", a.out, {a.x.shape[0], a.x.shape[1]});
  check(backend.cuda || a.out.dtype == DType::f32, "rms_norm: out is ", shape_text(a.out), ", expected f32 on the CPU");
  check_shape("rms_norm", "weight", a.weight, DType::f32, {a.x.shape[1]});
  check(a.eps >= 0 && a.eps < 1, "rms_norm: eps is ", a.eps, ", expected 0 <= eps < 1");
  if (backend.cuda) return backend.cuda->rms_norm(*backend.stream, a);
  backend.cpu->rms_norm(*backend.pool, a);
}

}  // namespace prt
