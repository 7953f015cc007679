// prt_op_run("reuse", {anew, kept, ranges, n_range, made, query, q, kv_len, state}, {stride, check, threshold})
#include "attention/choice.h"
#include "ops/cpu_table.h"
#include "ops/cuda_table.h"

namespace prt {

void check_contents(const Reuse& a) {
  const char* op = "reuse";
  const int64_t n_entry = a.q.shape[0];
  check_state(op, a.state, n_entry, a.ranges.shape[0]);
  for (int64_t e = 0; e < n_entry; ++e) {
    const int32_t place = a.state.as<int32_t>()[e], len = a.kv_len.as<int32_t>()[e];
    check(len >= 1, op, ": entry ", e, " has kv_len ", len, ", expected 1 or more");
    if (place < 0) continue;
    const int32_t made = a.made.as<int32_t>()[place];
    for (int64_t h = 0; made > 0 && made < len && h < a.ranges.shape[1]; ++h) {
      const int32_t n = a.n_range.row<int32_t>(place)[h];
      check(n >= 1 && n <= a.ranges.shape[2], op, ": n_range of state ", place, " is ", n, ", ranges has room for ", a.ranges.shape[2]);
    }
  }
}

void reuse(const Backend& backend, const Reuse& a) {
  const char* op = "reuse";
  check_stored(op, "q", a.q, {-1, -1});
  check_shape(op, "query", a.query, DType::f32, {-1, -1});
  const int64_t n_entry = a.q.shape[0], n_state = a.query.shape[0], w = a.query.shape[1];
  check(w > 0 && a.q.shape[1] % w == 0, op, ": query has ", w, " columns, which do not divide the ", a.q.shape[1], " of q");
  check_shape(op, "anew", a.anew, DType::i32, {n_entry});
  check_shape(op, "kept", a.kept, DType::i32, {n_entry});
  check_shape(op, "kv_len", a.kv_len, DType::i32, {n_entry});
  check_shape(op, "state", a.state, DType::i32, {n_entry});
  check_shape(op, "ranges", a.ranges, DType::i32, {n_state, -1, -1, 2});
  check_shape(op, "n_range", a.n_range, DType::i32, {n_state, a.ranges.shape[1]});
  check_shape(op, "made", a.made, DType::i32, {n_state});
  check(a.stride >= 0 && a.check >= 0, op, ": stride is ", a.stride, " and check ", a.check, ", expected 0 or more");
  check(a.threshold >= -1 && a.threshold <= 1, op, ": threshold is ", a.threshold, ", expected a cosine");
  if (backend.cuda) return backend.cuda->reuse(*backend.stream, a);
  check_shape(op, "q", a.q, DType::f32, {n_entry, -1});
  check_contents(a);
  backend.cpu->reuse(*backend.pool, a);
}

}  // namespace prt
