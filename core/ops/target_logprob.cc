// prt_op_run("target_logprob", {out, logits, targets})
#include "ops/contents.h"
#include "ops/cpu_table.h"
#include "ops/cuda_table.h"

namespace prt {

void check_contents(const TargetLogprob& a) {
  for (int64_t r = 0; r < a.logits.shape[0]; ++r) {
    const int32_t id = a.targets.as<int32_t>()[r];
    check(id >= -1 && id < a.logits.shape[1], "target ", id, " of row ", r, " is outside the vocabulary of ", a.logits.shape[1]);
  }
}

void target_logprob(const Backend& backend, const TargetLogprob& a) {
  check_shape("target_logprob", "logits", a.logits, DType::f32, {-1, -1});
  check_shape("target_logprob", "targets", a.targets, DType::i32, {a.logits.shape[0]});
  check_shape("target_logprob", "out", a.out, DType::f32, {a.logits.shape[0]});
  if (backend.cuda) return backend.cuda->target_logprob(*backend.stream, a);
  check_contents(a);
  backend.cpu->target_logprob(*backend.pool, a);
}

}  // namespace prt
