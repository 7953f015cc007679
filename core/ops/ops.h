// The dense operations of the forward pass: one argument structure and one function each. The contract (shapes, dtypes, ranges)
// is checked in <op>.cc; <op>_cpu.cc is the CPU twin, written to read like the formula; <op>_cuda.cu the GPU's.
// Weights and KV are bf16, f16 or f32; norm weights and biases are f32. The residual stream and logits are f32. Other activations,
// "act" below, are f32 on the CPU and of the weights' type on a GPU (Backend::activation).
#pragma once
#include "base/backend.h"
#include "base/tensor.h"

namespace prt {

constexpr int64_t kPageTokens = PRT_PAGE_TOKENS;
constexpr int64_t kMaxHead = 256;         // largest d_head
constexpr int64_t kChunkTokens = 512;     // attention merges partial results of this many keys, always in the same order

// out[t] = weight[token[t]]
struct Embedding {
  Tensor out;     // [n_tok][d_model] f32
  Tensor tokens;  // [n_tok] i32
  Tensor weight;  // [n_vocab][d_model]
};
void embedding(const Backend&, const Embedding&);

// out = x / sqrt(mean(x^2) + eps) * weight, over the last dimension
struct RmsNorm {
  Tensor out;     // [n_row][d] act; may be x if that is f32
  Tensor x;       // [n_row][d] f32
  Tensor weight;  // [d] f32
  float eps;
};
void rms_norm(const Backend&, const RmsNorm&);

// out = x weight^T + bias, with its neighbours in the forward pass: the RMS norm before it, and after it the residual connection or the
// gate of the feed-forward network. On the CPU they are passes of their own; on a GPU they cost no pass.
struct Linear {
  Tensor out{};    // [n_row][n_out] act or f32, rows may be strided; gated: [n_row][n_out / 2]; accumulate: f32
  Tensor x{};      // [n_row][n_in] act; with norm: f32. Rows may be strided
  Tensor weight{};   // [n_out][n_in]
  Tensor bias{};   // [n_out] f32, or missing
  bool accumulate = false;  // out += instead of out =
  bool gated = false;       // weight is gate rows, then as many up rows: out = silu(gate) * up. Not with accumulate
  Tensor norm{};   // [n_in] f32, or missing: x is normed first
  float norm_eps = 0;
  Tensor scratch{};  // [linear_scratch_bytes() / 4] f32
};
void linear(const Backend&, const Linear&);
// For n_row rows or fewer.
int64_t linear_scratch_bytes(const Backend&, int64_t n_row, int64_t n_in, int64_t n_out, bool norm, bool gated);

// cos_sin[t] = cos, sin of position[t] * inv_freq, times attention_factor
struct RopeAngles {
  Tensor cos_sin;    // [n_tok][2][d_head / 2] f32
  Tensor positions;  // [n_tok] i32
  Tensor inv_freq;   // [d_head / 2] f32, radians per position
  float attention_factor;
};
void rope_angles(const Backend&, const RopeAngles&);

// q, k: optional RMS norm per head, then rotation by the row's angles; then k and v go to their place in the pages.
struct RopeKvWrite {
  Tensor qkv;             // [n_tok][(h_q + 2 h_kv) d_head] act: q is rotated in place
  Tensor q_norm, k_norm;  // [d_head] f32, or missing
  float norm_eps;
  Tensor cos_sin;         // [n_tok][2][d_head / 2] f32
  Tensor slots;           // [n_tok] i32: page * 64 + row in the page
  Tensor k_pages;         // [n_page][h_kv][64][d_head]
  Tensor v_pages;         // [n_page][h_kv][64][d_head]
  int64_t h_q;
};
void rope_kv_write(const Backend&, const RopeKvWrite&);

// Softmax attention over paged keys. Entry e owns query rows [q_begin[e], q_begin[e+1]); its last row sees all kv_len[e] keys,
// earlier rows one key fewer each (causal). window > 0: only the last `window` of those.
struct Attention {
  Tensor out;         // [n_tok][h_q * d_head] act
  Tensor q;           // [n_tok][h_q * d_head] act, rows may be strided
  Tensor k_pages;     // [n_page][h_kv][64][d_head]
  Tensor v_pages;     // [n_page][h_kv][64][d_head]
  Tensor q_begin;     // [n_entry + 1] i32
  Tensor kv_len;      // [n_entry] i32
  Tensor page_table;  // [n_entry][max_pages] i32
  int64_t window;
  float scale;        // usually 1 / sqrt(d_head)
  Tensor scratch;     // [attention_scratch_bytes() / 4] f32
  // attention_decode only, what the pass over the keys knows anyway:
  Tensor scores{};     // out [n_entry][h_q][room] f32, room >= kv_len, or missing: scale q.k of every row
  Tensor log_total{};  // out [n_entry][h_q] f32, with scores: log sum e^scores
  Tensor state{};      // [n_entry] i32, or missing: an entry with -1 is left alone, its part of out too
};
void attention_prefill(const Backend&, const Attention&);  // any number of rows per entry
void attention_decode(const Backend&, const Attention&);   // one row per entry; splits long contexts over the threads
int64_t attention_scratch_bytes(const Backend&, int64_t n_decode, int64_t max_context, int64_t h_q, int64_t h_kv, int64_t d_head);

// out = silu(gate) * up
struct SiluMul {
  Tensor out;      // [n_tok][d_ff] act
  Tensor gate_up;  // [n_tok][2 d_ff] act: gate, then up
};
void silu_mul(const Backend&, const SiluMul&);

// out[r] = log softmax(logits[r])[target[r]]; rows with target -1 give 0
struct TargetLogprob {
  Tensor out;      // [n_row] f32
  Tensor logits;   // [n_row][n_vocab] f32
  Tensor targets;  // [n_row] i32
};
void target_logprob(const Backend&, const TargetLogprob&);

// One token per row of logits. See prt_sampling in pyruntime.h for the meaning and order of the parameters.
struct SeenToken {
  int32_t id, n_generated;
};  // n_generated 0: only in the prompt
struct SampleRow {
  float temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
  int32_t top_k, n_seen, n_bias;
  const SeenToken* seen;      // [n_seen]
  const int32_t* bias_ids;    // [n_bias]
  const float* bias_values;   // [n_bias]
  float uniform;              // in [0, 1)
};
struct Sample {
  Tensor logits;         // [n_row][n_vocab] f32; unchanged on return
  const SampleRow* rows; // [n_row], in the backend's memory, as are the lists they point to
  Tensor tokens;         // out [n_row] i32
  Tensor logprobs;       // out [n_row] f32, of the unmodified distribution; or missing
  Tensor top_ids;        // out [n_row][n_top] i32, or missing
  Tensor top_logprobs;   // out [n_row][n_top] f32, or missing
  Tensor scratch;        // [sample_scratch_bytes() / 4] f32
};
void sample(const Backend&, const Sample&);
int64_t sample_scratch_bytes(const Backend&, int64_t n_row, int64_t n_vocab);
inline int64_t sample_scratch_floats(int64_t n_vocab) { return 5 * n_vocab; }  // CPU, per thread: candidates 2, weights 1, saved 2

// Copies whole pages, for copy on write: dst[i] = src[i]
struct PageCopy {
  Tensor k_pages, v_pages;  // [n_page][h_kv][64][d_head]
  Tensor src, dst;          // [n] i32
};
void page_copy(const Backend&, const PageCopy&);

// One operation by name on untyped operands: prt_op_run.
void run_op(const Backend&, const char* op, prt_tensor* const* operands, int32_t n_operand, const double* params, int32_t n_param);

}  // namespace prt
