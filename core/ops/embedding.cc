// prt_op_run("embedding", {out, tokens, weight})
#include "ops/cpu_table.h"

namespace prt {

void embedding(const Backend& backend, const Embedding& a) {
  const int64_t n_tok = a.tokens.shape[0], d_model = a.weight.shape[1];
  check_shape("embedding", "tokens", a.tokens, DType::i32, {-1});
  check_stored("embedding", "weight", a.weight, {-1, -1});
  check_shape("embedding", "out", a.out, DType::f32, {n_tok, d_model});
  for (int64_t t = 0; t < n_tok; ++t) {
    const int32_t id = a.tokens.as<int32_t>()[t];
    check(id >= 0 && id < a.weight.shape[0], "token ", id, " at position ", t, " is outside the vocabulary of ", a.weight.shape[0]);
  }
  backend.cpu->embedding(*backend.pool, a);
}

}  // namespace prt
