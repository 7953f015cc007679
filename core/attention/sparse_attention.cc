// prt_op_run("sparse_attention", {out, q, k_pages, v_pages, page_table, ranges, n_range,
//                                 tail, closed, value, or these three empty; state, or left out}, {scale})
#include "attention/sparse_attention.h"

#include "attention/choice.h"
#include "ops/cpu_table.h"
#include "ops/cuda_table.h"

namespace prt {

void check_contents(const SparseAttention& a) {
  const char* op = "sparse_attention";
  const int64_t n_page = a.k_pages.shape[0], h_kv = a.k_pages.shape[1], rows = a.page_table.shape[1] * kPageTokens;
  if (a.state) check_state(op, a.state, a.q.shape[0], a.ranges.shape[0]);
  for (int64_t e = 0; e < a.q.shape[0]; ++e)
    for (int64_t h = 0; h < h_kv; ++h) {
      const int64_t place = a.state ? a.state.as<int32_t>()[e] : e;
      if (place < 0) continue;
      const int32_t n = a.n_range.row<int32_t>(place)[h], *range = a.ranges.row<int32_t>(place) + h * a.ranges.shape[2] * 2;
      check(n >= 0 && n <= a.ranges.shape[2], op, ": n_range of entry ", e, " is ", n, ", ranges has room for ", a.ranges.shape[2]);
      for (int64_t i = 0, end = 0, before = 0; i < n; ++i) {
        const int64_t first = range[2 * i], past = first + range[2 * i + 1] - before;
        check(first >= end && past > first && past <= rows, op, ": range ", i, " of entry ", e, " holds rows ", first, " to ", past,
              ", expected some from ", end, " on, up to ", rows);
        for (int64_t p = first / kPageTokens; p <= (past - 1) / kPageTokens; ++p) {
          const int32_t page = a.page_table.row<int32_t>(e)[p];
          check(page >= 0 && page < n_page, op, ": page ", page, " (number ", p, " of entry ", e, ") is outside the ", n_page, " pages");
        }
        end = past, before = range[2 * i + 1];
      }
    }
  if (!a.tail) return;
  for (int64_t e = 0; e < a.q.shape[0]; ++e) {
    const int32_t* closed = a.closed.row<int32_t>(e);
    check(closed[0] >= 0 && closed[0] <= closed[1] && closed[1] <= a.page_table.shape[1], op, ": entry ", e, " has closed pages ",
          closed[0], " to ", closed[1], ", its page table ", a.page_table.shape[1]);
    for (int64_t p = closed[0]; p < closed[1]; ++p) {
      const int32_t page = a.page_table.row<int32_t>(e)[p];
      check(page >= 0 && page < n_page, op, ": page ", page, " (number ", p, " of entry ", e, ") is outside the ", n_page, " pages");
    }
  }
}

int64_t sparse_attention_scratch_bytes(const Backend& backend, int64_t n_entry, int64_t max_pages, int64_t h_q, int64_t h_kv, int64_t d) {
  if (backend.cuda) return backend.cuda->sparse_attention_scratch_bytes(*backend.stream, n_entry, max_pages, h_q, h_kv, d);
  const int64_t chunks = (max_pages * kPageTokens + kChunkTokens - 1) / kChunkTokens;
  return 4 * (backend.pool->size() * sparse_thread_floats(h_q / h_kv, d) + n_entry * chunks * sparse_partial_floats(h_q, d));
}

void sparse_attention(const Backend& backend, const SparseAttention& a) {
  const char* op = "sparse_attention";
  check_stored(op, "k_pages", a.k_pages, {-1, -1, kPageTokens, -1});
  const int64_t n_page = a.k_pages.shape[0], h_kv = a.k_pages.shape[1], d = a.k_pages.shape[3];
  check(d > 0 && d <= kMaxHead, op, ": d_head is ", d, ", expected 1..", kMaxHead);
  check_shape(op, "v_pages", a.v_pages, a.k_pages.dtype, {n_page, h_kv, kPageTokens, d});
  check_shape(op, "q", a.q, backend.activation(a.k_pages.dtype), {-1, -1});
  const int64_t n_entry = a.q.shape[0], width = a.q.shape[1];
  check(h_kv > 0 && width > 0 && width % (d * h_kv) == 0, op, ": q has ", width, " columns, not a multiple of h_kv x d_head = ", h_kv,
        " x ", d);
  check_shape(op, "out", a.out, a.q.dtype, {n_entry, width});
  check_shape(op, "page_table", a.page_table, DType::i32, {n_entry, -1});
  check_shape(op, "ranges", a.ranges, DType::i32, {a.state ? -1 : n_entry, h_kv, -1, 2});
  check_shape(op, "n_range", a.n_range, DType::i32, {a.ranges.shape[0], h_kv});
  if (a.state) check_shape(op, "state", a.state, DType::i32, {n_entry});
  if (a.tail) {
    check_shape(op, "value", a.value, DType::f8, {n_page, h_kv, -1, d});
    check_shape(op, "closed", a.closed, DType::i32, {n_entry, 2});
    check_shape(op, "tail", a.tail, DType::f32, {a.ranges.shape[0], width / d, a.page_table.shape[1] * a.value.shape[2]});
  }
  check(a.scale > 0 && a.scale <= 1e30f, op, ": scale is ", a.scale, ", expected a positive number");
  const int64_t need = sparse_attention_scratch_bytes(backend, n_entry, a.page_table.shape[1], width / d, h_kv, d);
  check(a.scratch.bytes() >= need, op, ": scratch has ", a.scratch.bytes(), " bytes, ", need, " are needed");
  if (backend.cuda) return backend.cuda->sparse_attention(*backend.stream, a);
  check_contents(a);
  backend.cpu->sparse_attention(*backend.pool, a);
}

}  // namespace prt
