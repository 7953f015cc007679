// prt_op_run("score_rows", {scores, log_total, q, k_pages, page_table, kv_len, state or empty}, {scale})
#include "attention/choice.h"
#include "ops/cpu_table.h"
#include "ops/cuda_table.h"

namespace prt {

void check_entries(const char* op, const Tensor& kv_len, const Tensor& page_table, int64_t n_page) {
  for (int64_t e = 0; e < kv_len.shape[0]; ++e) {
    const int32_t len = kv_len.as<int32_t>()[e];
    const int64_t used = (int64_t{len} + kPageTokens - 1) / kPageTokens;
    check(len >= 1 && used <= page_table.shape[1], op, ": entry ", e, " has kv_len ", len, ", its page table ", page_table.shape[1],
          " pages");
    for (int64_t p = 0; p < used; ++p) {
      const int32_t page = page_table.row<int32_t>(e)[p];
      check(page >= 0 && page < n_page, op, ": page ", page, " (number ", p, " of entry ", e, ") is outside the ", n_page, " pages");
    }
  }
}

void check_state(const char* op, const Tensor& state, int64_t n_entry, int64_t n_state) {
  for (int64_t e = 0; e < n_entry; ++e) {
    const int32_t s = state.as<int32_t>()[e];
    check(s >= -1 && s < n_state, op, ": state of entry ", e, " is ", s, ", expected -1 or one of ", n_state);
  }
}

void check_contents(const ScoreRows& a) {
  const char* op = "score_rows";
  check_entries(op, a.kv_len, a.page_table, a.k_pages.shape[0]);
  for (int64_t e = 0; e < a.kv_len.shape[0]; ++e)
    check(a.kv_len.as<int32_t>()[e] <= a.scores.shape[2], op, ": entry ", e, " has kv_len ", a.kv_len.as<int32_t>()[e],
          ", scores has room for ", a.scores.shape[2]);
}

void score_rows(const Backend& backend, const ScoreRows& a) {
  const char* op = "score_rows";
  check_stored(op, "k_pages", a.k_pages, {-1, -1, kPageTokens, -1});
  const int64_t h_kv = a.k_pages.shape[1], d = a.k_pages.shape[3];
  check(d > 0 && d <= kMaxHead, op, ": d_head is ", d, ", expected 1..", kMaxHead);
  check_shape(op, "q", a.q, backend.activation(a.k_pages.dtype), {-1, -1});
  const int64_t n_entry = a.q.shape[0], width = a.q.shape[1];
  check(h_kv > 0 && width > 0 && width % (d * h_kv) == 0, op, ": q has ", width, " columns, not a multiple of h_kv x d_head = ", h_kv,
        " x ", d);
  check_shape(op, "scores", a.scores, DType::f32, {n_entry, width / d, -1});
  check_shape(op, "log_total", a.log_total, DType::f32, {n_entry, width / d});
  check_shape(op, "page_table", a.page_table, DType::i32, {n_entry, -1});
  check_shape(op, "kv_len", a.kv_len, DType::i32, {n_entry});
  if (a.state) check_shape(op, "state", a.state, DType::i32, {n_entry});
  check(a.scale > 0 && a.scale <= 1e30f, op, ": scale is ", a.scale, ", expected a positive number");
  if (backend.cuda) return backend.cuda->score_rows(*backend.stream, a);
  check_contents(a);
  backend.cpu->score_rows(*backend.pool, a);
}

}  // namespace prt
