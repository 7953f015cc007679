#include "model/forward.h"

#include <cmath>

namespace prt {

Activations Activations::take(Arena& arena, const ModelConfig& c, int64_t n, int64_t attention_bytes) {
  Activations a;
  a.x = arena.take(DType::f32, n, c.d_model);
  a.h = arena.take(DType::f32, n, c.d_model);
  a.qkv = arena.take(DType::f32, n, c.qkv_size());
  a.attn = arena.take(DType::f32, n, c.q_size());
  a.gate_up = arena.take(DType::f32, n, 2 * int64_t{c.d_ff});
  a.ff = arena.take(DType::f32, n, c.d_ff);
  const int64_t widest = std::max({int64_t{c.d_model}, int64_t{c.d_ff}, c.q_size()});
  a.linear_scratch = arena.take(DType::f32, linear_scratch_bytes(n, widest) / 4);
  a.attention_scratch = arena.take(DType::f32, attention_bytes / 4);
  return a;
}

void forward(const Backend& b, const ModelConfig& c, const Weights& w, const KvCache& kv, const Rows& rows, Activations& act,
             bool (*keep_going)(void*), void* user) {
  const int64_t n = rows.n_tok;
  const Tensor x = act.x.rows(0, n), h = act.h.rows(0, n), qkv = act.qkv.rows(0, n), attn = act.attn.rows(0, n);
  const Tensor gate_up = act.gate_up.rows(0, n), ff = act.ff.rows(0, n);
  const Tensor q = qkv.cols(0, c.q_size());
  const float scale = 1.0f / std::sqrt(static_cast<float>(c.d_head));

  embedding(b, {x, rows.tokens, w.embed});
  for (int32_t i = 0; i < c.n_layer; ++i) {
    if (!keep_going(user)) fail(PRT_ABORTED, "the step was stopped by the abort callback in layer ", i, " of ", c.n_layer);
    const LayerWeights& l = w.layers[static_cast<size_t>(i)];
    const Tensor &k_pages = kv.k[static_cast<size_t>(i)], &v_pages = kv.v[static_cast<size_t>(i)];

    rms_norm(b, {h, x, l.attn_norm, c.norm_eps});
    linear(b, {qkv, h, l.qkv, l.qkv_bias, false, act.linear_scratch});
    rope_kv_write(b, {qkv, l.q_norm, l.k_norm, c.norm_eps, rows.cos_sin, rows.slots, k_pages, v_pages, c.h_q});
    const auto attention_over = [&](const Rows::Part& part, int64_t begin, int64_t n_row) {
      return Attention{attn.rows(begin, n_row),
                       q.rows(begin, n_row),
                       k_pages,
                       v_pages,
                       part.q_begin,
                       part.kv_len,
                       part.page_table,
                       c.window_of(i),
                       scale,
                       act.attention_scratch};
    };
    if (rows.prefill.n_entry > 0) attention_prefill(b, attention_over(rows.prefill, 0, rows.n_prefill_tok));
    if (rows.decode.n_entry > 0) attention_decode(b, attention_over(rows.decode, rows.n_prefill_tok, n - rows.n_prefill_tok));
    linear(b, {x, attn, l.o, l.o_bias, true, act.linear_scratch});

    rms_norm(b, {h, x, l.ffn_norm, c.norm_eps});
    linear(b, {gate_up, h, l.gate_up, l.gate_up_bias, false, act.linear_scratch});
    silu_mul(b, {ff, gate_up});
    linear(b, {x, ff, l.down, l.down_bias, true, act.linear_scratch});
  }
}

void output_logits(const Backend& b, const ModelConfig& c, const Weights& w, const Tensor& x, const Tensor& h, const Tensor& scratch,
                   const Tensor& logits) {
  rms_norm(b, {h, x, w.norm, c.norm_eps});
  linear(b, {logits, h, w.lm_head, {}, false, scratch});
}

}  // namespace prt
