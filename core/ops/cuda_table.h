// The CUDA twins. The rest of the library reaches them through this table, which a build without CUDA leaves empty.
//
// Tensors are device memory: a twin reads shapes and pointers on the host, never contents, so that a step can be captured in a graph and
// replayed while lengths, pages and tokens change. Nothing here allocates or synchronises.
#pragma once
#include "attention/choice.h"
#include "cuda/stream.h"

namespace prt {

struct CudaOps {
  void (*embedding)(const CudaStream&, const Embedding&);
  void (*rms_norm)(const CudaStream&, const RmsNorm&);
  void (*linear)(const CudaStream&, const Linear&);
  int64_t (*linear_scratch_bytes)(const CudaStream&, int64_t n_row, int64_t n_in, int64_t n_out, bool norm);
  void (*rope_angles)(const CudaStream&, const RopeAngles&);
  void (*rope_kv_write)(const CudaStream&, const RopeKvWrite&);
  void (*attention_prefill)(const CudaStream&, const Attention&);
  void (*attention_decode)(const CudaStream&, const Attention&);
  int64_t (*attention_scratch_bytes)(const CudaStream&, int64_t n_decode, int64_t h_q, int64_t h_kv, int64_t d_head);
  void (*silu_mul)(const CudaStream&, const SiluMul&);
  void (*target_logprob)(const CudaStream&, const TargetLogprob&);
  void (*sample)(const CudaStream&, const Sample&);
  int64_t (*sample_scratch_bytes)(const CudaStream&, int64_t n_row, int64_t n_vocab);
  void (*page_copy)(const CudaStream&, const PageCopy&);
  void (*cluster)(const CudaStream&, const Cluster&);
  int64_t (*cluster_scratch_bytes)(const CudaStream&, int64_t n_page, int64_t n_slot, int64_t d_head);
  void (*uncluster)(const CudaStream&, const Uncluster&);
  void (*select)(const CudaStream&, const Select&);
  int64_t (*select_scratch_bytes)(const CudaStream&, int64_t n_entry, int64_t h_q, int64_t h_kv, int64_t max_pages, int64_t n_slot);
  void (*sparse_attention)(const CudaStream&, const SparseAttention&);
  int64_t (*sparse_attention_scratch_bytes)(const CudaStream&, int64_t n_entry, int64_t max_pages, int64_t h_q, int64_t h_kv,
                                            int64_t d_head);
  void (*score_rows)(const CudaStream&, const ScoreRows&);
  void (*page_bounds)(const CudaStream&, const PageBounds&);
  void (*score_blocks)(const CudaStream&, const ScoreBlocks&);
  void (*top_rows)(const CudaStream&, const TopRows&);
  void (*reuse)(const CudaStream&, const Reuse&);
  void (*count_rows)(const CudaStream&, const CountRows&);
  void (*rope_shift)(const CudaStream&, const RopeShift&);
};

namespace cuda {
extern const CudaOps ops;
void embedding(const CudaStream&, const Embedding&);
void rms_norm(const CudaStream&, const RmsNorm&);
void linear(const CudaStream&, const Linear&);
int64_t linear_scratch_bytes(const CudaStream&, int64_t n_row, int64_t n_in, int64_t n_out, bool norm);
void rope_angles(const CudaStream&, const RopeAngles&);
void rope_kv_write(const CudaStream&, const RopeKvWrite&);
void attention_prefill(const CudaStream&, const Attention&);
void attention_decode(const CudaStream&, const Attention&);
int64_t attention_scratch_bytes(const CudaStream&, int64_t n_decode, int64_t h_q, int64_t h_kv, int64_t d_head);
void silu_mul(const CudaStream&, const SiluMul&);
void target_logprob(const CudaStream&, const TargetLogprob&);
void sample(const CudaStream&, const Sample&);
int64_t sample_scratch_bytes(const CudaStream&, int64_t n_row, int64_t n_vocab);
void page_copy(const CudaStream&, const PageCopy&);
void cluster(const CudaStream&, const Cluster&);
int64_t cluster_scratch_bytes(const CudaStream&, int64_t n_page, int64_t n_slot, int64_t d_head);
void uncluster(const CudaStream&, const Uncluster&);
void select(const CudaStream&, const Select&);
int64_t select_scratch_bytes(const CudaStream&, int64_t n_entry, int64_t h_q, int64_t h_kv, int64_t max_pages, int64_t n_slot);
void sparse_attention(const CudaStream&, const SparseAttention&);
int64_t sparse_attention_scratch_bytes(const CudaStream&, int64_t n_entry, int64_t max_pages, int64_t h_q, int64_t h_kv, int64_t d_head);
void score_rows(const CudaStream&, const ScoreRows&);
void page_bounds(const CudaStream&, const PageBounds&);
void score_blocks(const CudaStream&, const ScoreBlocks&);
void top_rows(const CudaStream&, const TopRows&);
void reuse(const CudaStream&, const Reuse&);
void count_rows(const CudaStream&, const CountRows&);
void rope_shift(const CudaStream&, const RopeShift&);
}  // namespace cuda

}  // namespace prt
