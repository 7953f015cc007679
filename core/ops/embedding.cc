// prt_op_run("embedding", {out, tokens, weight})
#include "ops/contents.h"
#include "ops/cpu_table.h"
#include "ops/cuda_table.h"

namespace prt {

void check_contents(const Embedding& a) {
  for (int64_t t = 0; t < a.tokens.shape[0]; ++t) {
    const int32_t id = a.tokens.as<int32_t>()[t];
    check(id >= 0 && id < a.weight.shape[0], "token ", id, " at position ", t, " is outside the vocabulary of ", a.weight.shape[0]);
  }
}

void embedding(const Backend& backend, const Embedding& a) {
  const int64_t n_tok = a.tokens.shape[0], d_model = a.weight.shape[1];
  check_shape("embedding", "tokens", a.tokens, DType::i32, {-1});
  check_stored("embedding", "weight", a.weight, {-1, -1});
  check_shape("embedding", "out", a.out, DType::f32, {n_tok, d_model});
  if (backend.cuda) return backend.cuda->embedding(*backend.stream, a);
  check_contents(a);
  backend.cpu->embedding(*backend.pool, a);
}

}  // namespace prt
