// The forward pass: one chunk of rows through all layers, from token ids to the final hidden state, then to logits.
#pragma once
#include "attention/policy.h"
#include "model/rope.h"
#include "model/weights.h"
#include "ops/ops.h"

namespace prt {

// The KV pages of every layer.
struct KvCache {
  std::vector<Tensor> k, v;  // [n_layer] of [n_page][h_kv][64][d_head]
};

// RopeTable where the operations can read it.
struct Rope {
  Tensor inv_freq;  // [d_head / 2] f32
  float attention_factor;
};

// One internal step. Rows of entries with several tokens come first, then the decode rows, one per entry, dense ones first.
struct Rows {
  int64_t n_tok = 0, n_prefill_tok = 0;
  Tensor tokens;      // [n_tok] i32
  Tensor positions;   // [n_tok] i32
  Tensor slots;       // [n_tok] i32
  struct Part {       // the prefill entries, or the decode entries
    int64_t n_entry = 0;
    Tensor q_begin;     // [n_entry + 1] i32, from 0
    Tensor kv_len;      // [n_entry] i32
    Tensor page_table;  // [n_entry][max_pages] i32
  } prefill, decode, sparse;  // sparse: decode entries that the policy attends for, the last rows
  PolicyRows policy;          // of the sparse entries
  // Rows after which a sequence may be decoded sparsely, for Policy::observe: its last dense one.
  struct Last {
    int64_t row, entry;  // entry: of `dense`
  };
  std::vector<Last> last;
  Part dense;         // the entries of prefill, then those of decode; q_begin: 0 and 1
  Tensor last_state;  // [last.size()] i32: Policy::state
};

// Activations of one chunk.
struct Activations {
  Tensor x;        // [n_tok][d_model] f32, the residual stream
  Tensor cos_sin;  // [n_tok][2][d_head / 2] f32
  Tensor qkv;      // [n_tok][qkv_size] act
  Tensor attn;     // [n_tok][q_size] act
  Tensor ff;       // [n_tok][d_ff] act
  Tensor logits;   // [n_logit][n_vocab] f32, in the memory of the three above
  Tensor linear_scratch, attention_scratch;
  static Activations take(Arena& arena, const Backend& backend, const ModelConfig& c, int64_t n_tok, int64_t n_decode, int64_t n_logit,
                          int64_t max_context);
};

// Leaves the residual stream after the last layer in act.x. `keep_going` is asked between layers; false ends the pass with PRT_ABORTED.
void forward(const Backend& backend, const ModelConfig& config, const Weights& weights, const Rope& rope, const KvCache& kv,
             const Rows& rows, Policy* policy, const Activations& act, bool (*keep_going)(void*), void* user);

// logits[i] = lm_head norm(x[i])
void output_logits(const Backend& backend, const ModelConfig& config, const Weights& weights, const Tensor& x, const Activations& act,
                   const Tensor& logits);

}  // namespace prt
