#include "model/forward.h"

#include <cmath>

namespace prt {

Activations Activations::take(Arena& arena, const Backend& b, const ModelConfig& c, int64_t n, int64_t n_decode, int64_t n_logit,
                              int64_t max_context) {
  const DType act = b.activation(c.weight_dtype());
  Activations a;
  a.x = arena.take(DType::f32, n, c.d_model);
  a.cos_sin = arena.take(DType::f32, n, 2, c.d_head / 2);
  // Never in use at the same time: attention's, the feed-forward network's, and the logits after the last layer.
  Arena attention = arena.here(), network = arena.here(), output = arena.here();
  a.qkv = attention.take(act, n, c.qkv_size());
  a.attn = attention.take(act, n, c.q_size());
  a.ff = network.take(act, n, c.d_ff);
  a.logits = output.take(DType::f32, n_logit, c.n_vocab);
  arena.skip(std::max({attention.used(), network.used(), output.used()}));
  struct Product {
    int64_t n_row, n_in, n_out;
    bool norm, gated;
  };
  int64_t linear_bytes = 0;
  for (const Product& p : {Product{n, c.d_model, c.qkv_size(), true, false},              // qkv
                           Product{n, c.q_size(), c.d_model, false, false},               // o
                           Product{n, c.d_model, 2 * int64_t{c.d_ff}, true, true},        // gate and up
                           Product{n, c.d_ff, c.d_model, false, false},                   // down
                           Product{n_logit, c.d_model, c.n_vocab, true, false}})          // lm_head
    linear_bytes = std::max(linear_bytes, linear_scratch_bytes(b, p.n_row, p.n_in, p.n_out, p.norm, p.gated));
  a.linear_scratch = arena.take(DType::f32, linear_bytes / 4);
  a.attention_scratch = arena.take(DType::f32, attention_scratch_bytes(b, n_decode, max_context, c.h_q, c.h_kv, c.d_head) / 4);
  return a;
}

void forward(const Backend& b, const ModelConfig& c, const Weights& w, const Rope& rope, const KvCache& kv, const Rows& rows,
             Policy* policy, const Activations& act, bool (*keep_going)(void*), void* user) {
  const int64_t n = rows.n_tok;
  const Tensor x = act.x.rows(0, n), cos_sin = act.cos_sin.rows(0, n), qkv = act.qkv.rows(0, n), attn = act.attn.rows(0, n);
  const Tensor ff = act.ff.rows(0, n), q = qkv.cols(0, c.q_size());
  const float scale = 1.0f / std::sqrt(static_cast<float>(c.d_head));

  embedding(b, {x, rows.tokens, w.embed});
  rope_angles(b, {cos_sin, rows.positions, rope.inv_freq, rope.attention_factor});
  for (int32_t i = 0; i < c.n_layer; ++i) {
    if (!keep_going(user)) fail(PRT_ABORTED, "the step was stopped by the abort callback in layer ", i, " of ", c.n_layer);
    const LayerWeights& l = w.layers[static_cast<size_t>(i)];
    const Tensor &k_pages = kv.k[static_cast<size_t>(i)], &v_pages = kv.v[static_cast<size_t>(i)];

    linear(b, {.out = qkv,
               .x = x,
               .weight = l.qkv,
               .bias = l.qkv_bias,
               .norm = l.attn_norm,
               .norm_eps = c.norm_eps,
               .scratch = act.linear_scratch});
    rope_kv_write(b, {qkv, l.q_norm, l.k_norm, c.norm_eps, cos_sin, rows.slots, k_pages, v_pages, c.h_q});
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
    if (rows.decode.n_entry > 0) attention_decode(b, attention_over(rows.decode, rows.n_prefill_tok, rows.decode.n_entry));
    if (rows.sparse.n_entry > 0) policy->decode(i, attention_over(rows.sparse, n - rows.sparse.n_entry, rows.sparse.n_entry), rows.policy);
    for (size_t j = 0; j < rows.last.size(); ++j) {
      const auto [row, entry] = rows.last[j];
      Attention a = attention_over(rows.decode, row, 1);
      a.q_begin = rows.dense.q_begin, a.kv_len = rows.dense.kv_len.rows(entry, 1), a.page_table = rows.dense.page_table.rows(entry, 1);
      policy->observe(i, a, {{}, rows.last_state.rows(static_cast<int64_t>(j), 1)});
    }
    linear(b, {.out = x, .x = attn, .weight = l.o, .bias = l.o_bias, .accumulate = true, .scratch = act.linear_scratch});

    linear(b, {.out = ff,
               .x = x,
               .weight = l.gate_up,
               .bias = l.gate_up_bias,
               .gated = true,
               .norm = l.ffn_norm,
               .norm_eps = c.norm_eps,
               .scratch = act.linear_scratch});
    linear(b, {.out = x, .x = ff, .weight = l.down, .bias = l.down_bias, .accumulate = true, .scratch = act.linear_scratch});
  }
}

void output_logits(const Backend& b, const ModelConfig& c, const Weights& w, const Tensor& x, const Activations& act,
                   const Tensor& logits) {
  linear(b, {.out = logits, .x = x, .weight = w.lm_head, .norm = w.norm, .norm_eps = c.norm_eps, .scratch = act.linear_scratch});
}

}  // namespace prt
