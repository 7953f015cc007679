// prt_op_run("rope_kv_write", {qkv, q_norm or empty, k_norm or empty, cos_sin, slots, k_pages, v_pages}, {h_q, norm_eps})
#include "ops/contents.h"
#include "ops/cpu_table.h"
#include "ops/cuda_table.h"

namespace prt {

void check_contents(const RopeKvWrite& a) {
  const int64_t n_page = a.k_pages.shape[0];
  for (int64_t t = 0; t < a.slots.shape[0]; ++t) {
    const int64_t slot = a.slots.as<int32_t>()[t];
    check(slot >= 0 && slot < n_page * kPageTokens, "rope_kv_write: slot ", slot, " of row ", t, " is outside the ", n_page, " pages");
  }
}

void rope_kv_write(const Backend& backend, const RopeKvWrite& a) {
  const char* op = "rope_kv_write";
  check_stored(op, "k_pages", a.k_pages, {-1, -1, kPageTokens, -1});
  const int64_t n_page = a.k_pages.shape[0], h_kv = a.k_pages.shape[1], d = a.k_pages.shape[3], n_tok = a.slots.shape[0];
  check(d > 0 && d % 2 == 0 && d <= kMaxHead, op, ": d_head is ", d, ", expected an even number up to ", kMaxHead);
  check(h_kv > 0 && a.h_q > 0 && a.h_q <= 1 << 20 && a.h_q % h_kv == 0, op, ": ", a.h_q, " query heads are not a multiple of ", h_kv,
        " kv heads");
  check_shape(op, "v_pages", a.v_pages, a.k_pages.dtype, {n_page, h_kv, kPageTokens, d});
  check_shape(op, "slots", a.slots, DType::i32, {-1});
  check_shape(op, "qkv", a.qkv, backend.activation(a.k_pages.dtype), {n_tok, (a.h_q + 2 * h_kv) * d});
  check_shape(op, "cos_sin", a.cos_sin, DType::f32, {n_tok, 2, d / 2});
  if (a.q_norm) check_shape(op, "q_norm", a.q_norm, DType::f32, {d});
  if (a.k_norm) check_shape(op, "k_norm", a.k_norm, DType::f32, {d});
  if (backend.cuda) return backend.cuda->rope_kv_write(*backend.stream, a);
  check_contents(a);
  backend.cpu->rope_kv_write(*backend.pool, a);
}

}  // namespace prt
