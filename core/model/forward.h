// The forward pass: one chunk of rows through all layers, from token ids to the final hidden state, then to logits.
#pragma once
#include "model/rope.h"
#include "model/weights.h"
#include "ops/ops.h"

namespace prt {

// The KV pages of every layer.
struct KvCache {
  std::vector<Tensor> k, v;  // [n_layer] of [n_page][h_kv][64][d_head]
};

// One internal step. Rows of entries with several tokens come first, then the decode rows, one per entry.
struct Rows {
  int64_t n_tok = 0, n_prefill_tok = 0;
  Tensor tokens;      // [n_tok] i32
  Tensor cos_sin;     // [n_tok][2][d_head / 2] f32
  Tensor slots;       // [n_tok] i32
  struct Part {       // the prefill entries, or the decode entries
    int64_t n_entry = 0;
    Tensor q_begin;     // [n_entry + 1] i32, from 0
    Tensor kv_len;      // [n_entry] i32
    Tensor page_table;  // [n_entry][max_pages] i32
  } prefill, decode;
};

// Activations of one chunk.
struct Activations {
  Tensor x;        // [n_tok][d_model] the residual stream
  Tensor h;        // [n_tok][d_model] normed
  Tensor qkv;      // [n_tok][qkv_size]
  Tensor attn;     // [n_tok][q_size]
  Tensor gate_up;  // [n_tok][2 d_ff]
  Tensor ff;       // [n_tok][d_ff]
  Tensor linear_scratch, attention_scratch;
  static Activations take(Arena& arena, const ModelConfig& c, int64_t n_tok, int64_t attention_bytes);
};

// Leaves the residual stream after the last layer in act.x. `keep_going` is asked between layers; false ends the pass with PRT_ABORTED.
void forward(const Backend& backend, const ModelConfig& config, const Weights& weights, const KvCache& kv, const Rows& rows,
             Activations& act, bool (*keep_going)(void*), void* user);

// logits[i] = lm_head norm(x[i]) for n rows; h is working memory
void output_logits(const Backend& backend, const ModelConfig& config, const Weights& weights, const Tensor& x, const Tensor& h,
                   const Tensor& scratch, const Tensor& logits);

}  // namespace prt
