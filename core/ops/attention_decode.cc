// Operands of prt_op_run: see attention_prefill.cc; every entry has one row. Then, all or none: scores, log_total, state (may be empty).
#include "ops/attention.h"
#include "ops/contents.h"
#include "ops/cpu_table.h"
#include "ops/cuda_table.h"

namespace prt {

void attention_decode(const Backend& backend, const Attention& a) {
  check_attention(backend, "attention_decode", a);
  const int64_t n_entry = a.kv_len.shape[0], d = a.k_pages.shape[3], h_kv = a.k_pages.shape[1], h_q = a.q.shape[1] / d;
  check(a.q.shape[0] == n_entry, "attention_decode: q has ", a.q.shape[0], " rows, expected one for each of ", n_entry, " entries");
  if (a.scores) {
    check_shape("attention_decode", "scores", a.scores, DType::f32, {n_entry, h_q, -1});
    check_shape("attention_decode", "log_total", a.log_total, DType::f32, {n_entry, h_q});
  }
  if (a.state) check_shape("attention_decode", "state", a.state, DType::i32, {n_entry});
  if (backend.cuda) {
    const int64_t need = attention_scratch_bytes(backend, n_entry, 0, h_q, h_kv, d);
    check(a.scratch.bytes() >= need, "attention_decode: scratch has ", a.scratch.bytes(), " bytes, ", need, " are needed");
    return backend.cuda->attention_decode(*backend.stream, a);
  }
  check_contents("attention_decode", a);
  int64_t longest = 0;
  for (int64_t e = 0; e < n_entry; ++e) {
    longest = std::max<int64_t>(longest, a.kv_len.as<int32_t>()[e]);
  }
  const int64_t need = attention_scratch_bytes(backend, n_entry, longest, h_q, h_kv, d);
  check(a.scratch.bytes() >= need, "attention_decode: scratch has ", a.scratch.bytes(), " bytes, ", need, " are needed");
  backend.cpu->attention_decode(*backend.pool, a);
}

}  // namespace prt
