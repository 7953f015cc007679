// prt_op_run("select", {ranges, n_range, tail or empty, mass, true_mass or empty, counters or empty, q, k_pages, page_table, kv_len,
//                       closed, centroid, variance, range; state and made, or left out}, {scale, p, budget, estimator})
#include "attention/choice.h"
#include "ops/cpu_table.h"
#include "ops/cuda_table.h"

namespace prt {

// Per query head: five numbers for each cluster.
int64_t select_scratch_bytes(const Backend& backend, int64_t n_entry, int64_t h_q, int64_t h_kv, int64_t max_pages, int64_t n_slot) {
  if (backend.cuda) return backend.cuda->select_scratch_bytes(*backend.stream, n_entry, h_q, h_kv, max_pages, n_slot);
  return 20 * n_entry * h_q * max_pages * n_slot;
}

void check_contents(const Select& a) {
  const char* op = "select";
  const int64_t n_page = a.k_pages.shape[0], h_kv = a.k_pages.shape[1], n_slot = a.index.centroid.shape[2];
  if (a.state) check_state(op, a.state, a.kv_len.shape[0], a.ranges.shape[0]);
  for (int64_t e = 0; e < a.kv_len.shape[0]; ++e) {
    const int32_t len = a.kv_len.as<int32_t>()[e], *closed = a.closed.row<int32_t>(e), *pages = a.page_table.row<int32_t>(e);
    const int64_t used = (int64_t{len} + kPageTokens - 1) / kPageTokens;
    check(len >= 1 && used <= a.page_table.shape[1], op, ": entry ", e, " has kv_len ", len, ", its page table ", a.page_table.shape[1],
          " pages");
    check(closed[0] >= 0 && closed[0] <= closed[1] && closed[1] <= len / kPageTokens, op, ": entry ", e, " has closed pages ", closed[0],
          " to ", closed[1], ", expected a range of its ", len / kPageTokens, " full pages");
    for (int64_t p = 0; p < used; ++p)
      check(pages[p] >= 0 && pages[p] < n_page, op, ": page ", pages[p], " (number ", p, " of entry ", e, ") is outside the ", n_page,
            " pages");
    const int64_t begin = closed[0] * kPageTokens, end = closed[1] * kPageTokens;
    for (int64_t h = 0; h < h_kv; ++h) {
      int64_t at = begin;  // clusters follow one another without a gap
      for (int64_t p = closed[0]; p < closed[1]; ++p)
        for (int64_t s = 0; s < n_slot; ++s) {
          const int32_t* range = a.index.range.as<int32_t>() + ((pages[p] * h_kv + h) * n_slot + s) * 2;
          const int64_t first = range[0] + p * kPageTokens;
          check(first == at && range[1] >= 0 && range[1] <= end - at, op, ": cluster ", s, " of page ", pages[p], " holds rows ", first,
                " to ", first + range[1], ", expected from ", at, " to at most ", end);
          at += range[1];
        }
      check(at == end, op, ": the clusters of entry ", e, " end at row ", at, ", expected ", end);
    }
  }
}

void select(const Backend& backend, const Select& a) {
  const char* op = "select";
  check_stored(op, "k_pages", a.k_pages, {-1, -1, kPageTokens, -1});
  const int64_t n_page = a.k_pages.shape[0], h_kv = a.k_pages.shape[1], d = a.k_pages.shape[3];
  check(d > 0 && d <= kMaxHead, op, ": d_head is ", d, ", expected 1..", kMaxHead);
  check_index(op, a.index, n_page, h_kv, d);
  check_shape(op, "q", a.q, backend.activation(a.k_pages.dtype), {-1, -1});
  const int64_t n_entry = a.q.shape[0], width = a.q.shape[1], n_slot = a.index.centroid.shape[2];
  check(h_kv > 0 && width > 0 && width % (d * h_kv) == 0, op, ": q has ", width, " columns, not a multiple of h_kv x d_head = ", h_kv,
        " x ", d);
  const int64_t h_q = width / d;
  check_shape(op, "page_table", a.page_table, DType::i32, {n_entry, -1});
  check_shape(op, "kv_len", a.kv_len, DType::i32, {n_entry});
  check_shape(op, "closed", a.closed, DType::i32, {n_entry, 2});
  check_shape(op, "ranges", a.ranges, DType::i32, {a.state ? -1 : n_entry, h_kv, -1, 2});
  const int64_t n_state = a.ranges.shape[0];
  const int64_t max_range = select_max_range(a.page_table.shape[1], n_slot);
  check(a.ranges.shape[2] >= max_range, op, ": ranges has room for ", a.ranges.shape[2], ", expected at least ", max_range);
  check_shape(op, "n_range", a.n_range, DType::i32, {n_state, h_kv});
  if (a.state) check_shape(op, "state", a.state, DType::i32, {n_entry});
  if (a.state) check_shape(op, "made", a.made, DType::i32, {n_state});
  if (a.tail) check_shape(op, "tail", a.tail, DType::f32, {n_state, h_q, a.page_table.shape[1] * n_slot});
  check_shape(op, "mass", a.mass, DType::f32, {n_entry, h_q});
  if (a.true_mass) check_shape(op, "true_mass", a.true_mass, DType::f32, {n_entry, h_q});
  if (a.counters) check_shape(op, "counters", a.counters, DType::i64, {h_kv, kAttentionCounters});
  check(a.scale > 0 && a.scale <= 1e30f, op, ": scale is ", a.scale, ", expected a positive number");
  check(a.p > 0 && a.p <= 1, op, ": p is ", a.p, ", expected above 0 and up to 1");
  check(a.budget > 0 && a.budget <= 1, op, ": budget is ", a.budget, ", expected above 0 and up to 1");
  check(a.estimator == Estimator::fit || a.estimator == Estimator::moment, op, ": estimator is ", static_cast<int32_t>(a.estimator),
        ", expected 0 (fit) or 1 (moment)");
  const int64_t need = select_scratch_bytes(backend, n_entry, h_q, h_kv, a.page_table.shape[1], n_slot);
  check(a.scratch.bytes() >= need, op, ": scratch has ", a.scratch.bytes(), " bytes, ", need, " are needed");
  if (backend.cuda) return backend.cuda->select(*backend.stream, a);
  check_contents(a);
  backend.cpu->select(*backend.pool, a);
}

}  // namespace prt
