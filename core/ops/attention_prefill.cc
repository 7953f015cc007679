// prt_op_run("attention_prefill" or "attention_decode", {out, q, k_pages, v_pages, q_begin, kv_len, page_table}, {window, scale})
#include "ops/attention.h"

#include <string_view>

#include "ops/contents.h"
#include "ops/cpu_table.h"
#include "ops/cuda_table.h"

namespace prt {

void check_attention(const Backend& backend, const char* op, const Attention& a) {
  check_stored(op, "k_pages", a.k_pages, {-1, -1, kPageTokens, -1});
  const int64_t n_page = a.k_pages.shape[0], h_kv = a.k_pages.shape[1], d = a.k_pages.shape[3];
  check(d > 0 && d <= kMaxHead, op, ": d_head is ", d, ", expected 1..", kMaxHead);
  check_shape(op, "v_pages", a.v_pages, a.k_pages.dtype, {n_page, h_kv, kPageTokens, d});
  check_shape(op, "q", a.q, backend.activation(a.k_pages.dtype), {-1, -1});
  const int64_t n_tok = a.q.shape[0], width = a.q.shape[1];
  check(h_kv > 0 && width > 0 && width % (d * h_kv) == 0, op, ": q has ", width, " columns, not a multiple of h_kv x d_head = ", h_kv,
        " x ", d);
  check_shape(op, "out", a.out, a.q.dtype, {n_tok, width});
  check_shape(op, "kv_len", a.kv_len, DType::i32, {-1});
  const int64_t n_entry = a.kv_len.shape[0];
  check_shape(op, "q_begin", a.q_begin, DType::i32, {n_entry + 1});
  check_shape(op, "page_table", a.page_table, DType::i32, {n_entry, -1});
  check(a.window >= 0, op, ": window is ", a.window, ", expected 0 (none) or a positive number of tokens");
  check(a.scale > 0 && a.scale <= 1e30f, op, ": scale is ", a.scale, ", expected a positive number");
}

void check_contents(const char* op, const Attention& a) {
  const int64_t n_tok = a.q.shape[0], n_entry = a.kv_len.shape[0], n_page = a.k_pages.shape[0];
  const int32_t *begin = a.q_begin.as<int32_t>(), *kv_len = a.kv_len.as<int32_t>();
  check(begin[0] == 0 && begin[n_entry] == n_tok, op, ": q_begin runs from ", begin[0], " to ", begin[n_entry], ", expected 0 to ", n_tok);
  for (int64_t e = 0; e < n_entry; ++e) {
    const int64_t rows = begin[e + 1] - begin[e];
    check(rows >= 0 && rows <= kv_len[e], op, ": entry ", e, " has ", rows, " query rows and kv_len ", kv_len[e]);
    const int64_t used = (kv_len[e] + kPageTokens - 1) / kPageTokens;
    check(used <= a.page_table.shape[1], op, ": entry ", e, " needs ", used, " pages, its page table has ", a.page_table.shape[1]);
    for (int64_t p = 0; p < used; ++p) {
      const int32_t page = a.page_table.row<int32_t>(e)[p];
      check(page >= 0 && page < n_page, op, ": page ", page, " (number ", p, " of entry ", e, ") is outside the ", n_page, " pages");
    }
  }
  if (std::string_view(op) != "attention_decode") return;
  for (int64_t e = 0; e < n_entry; ++e)
    check(begin[e + 1] - begin[e] == 1, op, ": entry ", e, " has ", begin[e + 1] - begin[e], " query rows, expected 1");
  for (int64_t e = 0; a.scores && e < n_entry; ++e)
    check(kv_len[e] <= a.scores.shape[2], op, ": scores has room for ", a.scores.shape[2], " rows, ", kv_len[e], " are needed");
}

int64_t attention_scratch_bytes(const Backend& backend, int64_t n_decode, int64_t max_context, int64_t h_q, int64_t h_kv, int64_t d) {
  if (backend.cuda) return backend.cuda->attention_scratch_bytes(*backend.stream, n_decode, h_q, h_kv, d);
  const int64_t chunks = (max_context + kChunkTokens - 1) / kChunkTokens;
  const int64_t partials = n_decode > 0 ? (chunks > 64 ? chunks : 64) : 0;
  return 4 * (backend.pool->size() * attention_thread_floats(h_q / h_kv, d) + partials * attention_partial_floats(h_q, d));
}

void attention_prefill(const Backend& backend, const Attention& a) {
  check_attention(backend, "attention_prefill", a);
  const int64_t d = a.k_pages.shape[3], h_kv = a.k_pages.shape[1], h_q = a.q.shape[1] / d;
  const int64_t need = attention_scratch_bytes(backend, 0, 0, h_q, h_kv, d);
  check(a.scratch.bytes() >= need, "attention_prefill: scratch has ", a.scratch.bytes(), " bytes, ", need, " are needed");
  if (backend.cuda) return backend.cuda->attention_prefill(*backend.stream, a);
  check_contents("attention_prefill", a);
  backend.cpu->attention_prefill(*backend.pool, a);
}

}  // namespace prt
