// prt_op_run("count_rows", {counters, true_mass or empty, q, k_pages, page_table, kv_len, ranges, n_range, state or empty, made or empty,
//                           closed or empty}, {unit, sinks, window, scale, p})
#include "attention/choice.h"
#include "ops/cpu_table.h"
#include "ops/cuda_table.h"

namespace prt {

void check_contents(const CountRows& a) {
  check_entries("count_rows", a.kv_len, a.page_table, a.k_pages.shape[0]);
  if (a.state) check_state("count_rows", a.state, a.kv_len.shape[0], a.ranges.shape[0]);
}

void count_rows(const Backend& backend, const CountRows& a) {
  const char* op = "count_rows";
  check_stored(op, "k_pages", a.k_pages, {-1, -1, kPageTokens, -1});
  const int64_t h_kv = a.k_pages.shape[1], d = a.k_pages.shape[3];
  check(d > 0 && d <= kMaxHead, op, ": d_head is ", d, ", expected 1..", kMaxHead);
  check_shape(op, "q", a.q, backend.activation(a.k_pages.dtype), {-1, -1});
  const int64_t n_entry = a.q.shape[0], width = a.q.shape[1];
  check(h_kv > 0 && width > 0 && width % (d * h_kv) == 0, op, ": q has ", width, " columns, not a multiple of h_kv x d_head = ", h_kv,
        " x ", d);
  check_shape(op, "counters", a.counters, DType::i64, {h_kv, kAttentionCounters});
  if (a.true_mass) check_shape(op, "true_mass", a.true_mass, DType::f32, {n_entry, width / d});
  check_shape(op, "page_table", a.page_table, DType::i32, {n_entry, -1});
  check_shape(op, "kv_len", a.kv_len, DType::i32, {n_entry});
  check_shape(op, "ranges", a.ranges, DType::i32, {a.state ? -1 : n_entry, h_kv, -1, 2});
  check_shape(op, "n_range", a.n_range, DType::i32, {a.ranges.shape[0], h_kv});
  if (a.state) check_shape(op, "state", a.state, DType::i32, {n_entry});
  if (a.made) check_shape(op, "made", a.made, DType::i32, {a.ranges.shape[0]});
  if (a.closed) check_shape(op, "closed", a.closed, DType::i32, {n_entry, 2});
  check(a.window >= 1 || a.closed, op, ": window is ", a.window, ", expected at least 1");
  check(a.scale > 0 && a.scale <= 1e30f, op, ": scale is ", a.scale, ", expected a positive number");
  if (backend.cuda) return backend.cuda->count_rows(*backend.stream, a);
  check_contents(a);
  backend.cpu->count_rows(*backend.pool, a);
}

}  // namespace prt
