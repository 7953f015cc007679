// Operands of prt_op_run: see attention_prefill.cc; every entry has one row.
#include "ops/attention.h"
#include "ops/cpu_table.h"

namespace prt {

void attention_decode(const Backend& backend, const Attention& a) {
  check_attention("attention_decode", a);
  const int64_t n_entry = a.kv_len.shape[0], d = a.k_pages.shape[3], h_kv = a.k_pages.shape[1], h_q = a.q.shape[1] / d;
  int64_t longest = 0;
  for (int64_t e = 0; e < n_entry; ++e) {
    const int32_t* begin = a.q_begin.as<int32_t>() + e;
    check(begin[1] - begin[0] == 1, "attention_decode: entry ", e, " has ", begin[1] - begin[0], " query rows, expected 1");
    longest = std::max<int64_t>(longest, a.kv_len.as<int32_t>()[e]);
  }
  const int64_t need = attention_scratch_bytes(backend.pool->size(), n_entry, longest, h_q, h_kv, d);
  check(a.scratch.bytes() >= need, "attention_decode: scratch has ", a.scratch.bytes(), " bytes, ", need, " are needed");
  backend.cpu->attention_decode(*backend.pool, a);
}

}  // namespace prt
