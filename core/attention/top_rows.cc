// prt_op_run("top_rows", {ranges, n_range, made or empty, counters or empty, scores or empty, log_total or empty, kv_len, state or empty},
//                        {h_q, unit, k, fraction, p, sinks, window, vote, pool})
#include "attention/choice.h"
#include "ops/cpu_table.h"
#include "ops/cuda_table.h"

namespace prt {

int64_t top_rows_scratch_bytes(int64_t n_entry, int64_t h_kv, int64_t room) { return 8 * n_entry * h_kv * room; }

int64_t top_rows_max_range(int64_t max_rows, int64_t unit, int64_t k, float fraction, float p) {
  const int64_t rows = p > 0 ? max_rows : fraction > 0 ? static_cast<int64_t>(fraction * static_cast<float>(max_rows)) + 1 : k;
  return std::min(rows / unit + 1, max_rows / unit / 2 + 1) + 2;
}

void check_contents(const TopRows& a) {
  const char* op = "top_rows";
  const int64_t n_entry = a.kv_len.shape[0];
  if (a.state) check_state(op, a.state, n_entry, a.ranges.shape[0]);
  for (int64_t e = 0; e < n_entry; ++e) {
    const int64_t len = a.kv_len.as<int32_t>()[e];
    check(len >= 1, op, ": entry ", e, " has kv_len ", len, ", expected 1 or more");
    if (!a.scores) continue;
    const int64_t used = (len + a.unit - 1) / a.unit;
    check(used <= a.scores.shape[2], op, ": entry ", e, " has ", used, " scores, there is room for ", a.scores.shape[2]);
    const int64_t need = top_rows_max_range(len, a.unit, a.k, a.fraction, a.p);
    check(a.ranges.shape[2] >= need, op, ": ranges has room for ", a.ranges.shape[2], ", entry ", e, " needs ", need);
  }
}

void top_rows(const Backend& backend, const TopRows& a) {
  const char* op = "top_rows";
  check_shape(op, "kv_len", a.kv_len, DType::i32, {-1});
  const int64_t n_entry = a.kv_len.shape[0];
  check_shape(op, "ranges", a.ranges, DType::i32, {a.state ? -1 : n_entry, -1, -1, 2});
  const int64_t n_state = a.ranges.shape[0], h_kv = a.ranges.shape[1];
  check(h_kv > 0 && a.h_q > 0 && a.h_q % h_kv == 0, op, ": h_q is ", a.h_q, ", not a multiple of h_kv = ", h_kv);
  check(a.ranges.shape[2] >= 2, op, ": ranges has room for ", a.ranges.shape[2], ", expected at least 2");
  check_shape(op, "n_range", a.n_range, DType::i32, {n_state, h_kv});
  if (a.made) check_shape(op, "made", a.made, DType::i32, {n_state});
  if (a.counters) check_shape(op, "counters", a.counters, DType::i64, {h_kv, kAttentionCounters});
  if (a.state) check_shape(op, "state", a.state, DType::i32, {n_entry});
  check(a.unit == 1 || a.unit == kBlockRows, op, ": unit is ", a.unit, ", expected 1 or ", kBlockRows);
  check(a.window >= 1 && a.sinks >= 0, op, ": window is ", a.window, " and sinks ", a.sinks, ", expected at least 1 and 0");
  check(a.k >= 0 && a.fraction >= 0 && a.fraction <= 1 && a.p >= 0 && a.p <= 1, op, ": k is ", a.k, ", fraction ", a.fraction, ", p ", a.p,
        ", expected a number, 0..1, 0..1");
  check(a.vote >= Vote::first && a.vote <= Vote::layer, op, ": vote is ", static_cast<int32_t>(a.vote), ", expected 0..3");
  check(a.pool >= 1 && a.pool % 2 == 1, op, ": pool is ", a.pool, ", expected an odd number");
  check(a.p == 0 || a.unit == 1, op, ": p is ", a.p, " with blocks of ", a.unit, " rows, expected rows");
  if (a.scores) {
    check_shape(op, "scores", a.scores, DType::f32, {n_entry, a.h_q, -1});
    check_shape(op, "log_total", a.log_total, DType::f32, {n_entry, a.h_q});
    const int64_t need = top_rows_scratch_bytes(n_entry, h_kv, a.scores.shape[2]);
    check(a.scratch.bytes() >= need, op, ": scratch has ", a.scratch.bytes(), " bytes, ", need, " are needed");
  }
  if (backend.cuda) return backend.cuda->top_rows(*backend.stream, a);
  check_contents(a);
  backend.cpu->top_rows(*backend.pool, a);
}

}  // namespace prt
