// prt_op_run("page_bounds", {low, high, k_pages, pages}, {})
// prt_op_run("score_blocks", {scores, log_total, q, low, high, page_table, kv_len}, {scale})
#include "attention/choice.h"
#include "ops/cpu_table.h"
#include "ops/cuda_table.h"

namespace prt {

void check_contents(const PageBounds& a) {
  for (int64_t i = 0; i < a.pages.shape[0]; ++i) {
    const int32_t page = a.pages.as<int32_t>()[i];
    check(page >= 0 && page < a.k_pages.shape[0], "page_bounds: page ", page, " is outside the ", a.k_pages.shape[0], " pages");
  }
}

void page_bounds(const Backend& backend, const PageBounds& a) {
  const char* op = "page_bounds";
  check_stored(op, "k_pages", a.k_pages, {-1, -1, kPageTokens, -1});
  const int64_t n_page = a.k_pages.shape[0], h_kv = a.k_pages.shape[1], d = a.k_pages.shape[3];
  check_shape(op, "low", a.low, a.k_pages.dtype, {n_page, h_kv, kPageTokens / kBlockRows, d});
  check_shape(op, "high", a.high, a.k_pages.dtype, {n_page, h_kv, kPageTokens / kBlockRows, d});
  check_shape(op, "pages", a.pages, DType::i32, {-1});
  if (backend.cuda) return backend.cuda->page_bounds(*backend.stream, a);
  check_contents(a);
  backend.cpu->page_bounds(*backend.pool, a);
}

void check_contents(const ScoreBlocks& a) { check_entries("score_blocks", a.kv_len, a.page_table, a.low.shape[0]); }

void score_blocks(const Backend& backend, const ScoreBlocks& a) {
  const char* op = "score_blocks";
  check_stored(op, "low", a.low, {-1, -1, kPageTokens / kBlockRows, -1});
  const int64_t n_page = a.low.shape[0], h_kv = a.low.shape[1], d = a.low.shape[3];
  check(d > 0 && d <= kMaxHead, op, ": d_head is ", d, ", expected 1..", kMaxHead);
  check_shape(op, "high", a.high, a.low.dtype, {n_page, h_kv, kPageTokens / kBlockRows, d});
  check_shape(op, "q", a.q, backend.activation(a.low.dtype), {-1, -1});
  const int64_t n_entry = a.q.shape[0], width = a.q.shape[1];
  check(h_kv > 0 && width > 0 && width % (d * h_kv) == 0, op, ": q has ", width, " columns, not a multiple of h_kv x d_head = ", h_kv,
        " x ", d);
  check_shape(op, "page_table", a.page_table, DType::i32, {n_entry, -1});
  check_shape(op, "kv_len", a.kv_len, DType::i32, {n_entry});
  check_shape(op, "scores", a.scores, DType::f32, {n_entry, width / d, -1});
  const int64_t need = a.page_table.shape[1] * kPageTokens / kBlockRows;
  check(a.scores.shape[2] >= need, op, ": scores has room for ", a.scores.shape[2], " blocks, ", need, " are needed");
  check_shape(op, "log_total", a.log_total, DType::f32, {n_entry, width / d});
  check(a.scale > 0 && a.scale <= 1e30f, op, ": scale is ", a.scale, ", expected a positive number");
  if (backend.cuda) return backend.cuda->score_blocks(*backend.stream, a);
  check_contents(a);
  backend.cpu->score_blocks(*backend.pool, a);
}

}  // namespace prt
