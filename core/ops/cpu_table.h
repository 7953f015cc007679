// The *_cpu.cc files are compiled once per instruction set, each time into its own namespace PRT_ISA; this table is how the
// rest of the library reaches one set of them.
// Those files must not define anything that the linker could merge across instruction sets (inline functions of other headers,
// templates of std); tests/test_library.py looks for such symbols.
#pragma once
#include "attention/choice.h"

namespace prt {

struct CpuOps {
  void (*embedding)(ThreadPool&, const Embedding&);
  void (*rms_norm)(ThreadPool&, const RmsNorm&);
  void (*linear)(ThreadPool&, const Linear&);
  void (*rope_kv_write)(ThreadPool&, const RopeKvWrite&);
  void (*attention_prefill)(ThreadPool&, const Attention&);
  void (*attention_decode)(ThreadPool&, const Attention&);
  void (*silu_mul)(ThreadPool&, const SiluMul&);
  void (*target_logprob)(ThreadPool&, const TargetLogprob&);
  void (*sample)(ThreadPool&, const Sample&);
  void (*cluster)(ThreadPool&, const Cluster&);
  void (*select)(ThreadPool&, const Select&);
  void (*sparse_attention)(ThreadPool&, const SparseAttention&);
  void (*score_rows)(ThreadPool&, const ScoreRows&);
  void (*page_bounds)(ThreadPool&, const PageBounds&);
  void (*score_blocks)(ThreadPool&, const ScoreBlocks&);
  void (*top_rows)(ThreadPool&, const TopRows&);
  void (*reuse)(ThreadPool&, const Reuse&);
  void (*count_rows)(ThreadPool&, const CountRows&);
  void (*rope_shift)(ThreadPool&, const RopeShift&);
};

#define PRT_DECLARE_ISA(isa)                                  \
  namespace isa {                                             \
  extern const CpuOps cpu_ops;                                \
  void embedding(ThreadPool&, const Embedding&);              \
  void rms_norm(ThreadPool&, const RmsNorm&);                 \
  void linear(ThreadPool&, const Linear&);                    \
  void rope_kv_write(ThreadPool&, const RopeKvWrite&);        \
  void attention_prefill(ThreadPool&, const Attention&);      \
  void attention_decode(ThreadPool&, const Attention&);       \
  void silu_mul(ThreadPool&, const SiluMul&);                 \
  void target_logprob(ThreadPool&, const TargetLogprob&);     \
  void sample(ThreadPool&, const Sample&);                    \
  void cluster(ThreadPool&, const Cluster&);                  \
  void select(ThreadPool&, const Select&);                    \
  void sparse_attention(ThreadPool&, const SparseAttention&); \
  void score_rows(ThreadPool&, const ScoreRows&);             \
  void page_bounds(ThreadPool&, const PageBounds&);           \
  void score_blocks(ThreadPool&, const ScoreBlocks&);         \
  void top_rows(ThreadPool&, const TopRows&);                 \
  void reuse(ThreadPool&, const Reuse&);                      \
  void count_rows(ThreadPool&, const CountRows&);             \
  void rope_shift(ThreadPool&, const RopeShift&);             \
  }
PRT_DECLARE_ISA(baseline)
PRT_DECLARE_ISA(avx2)
PRT_DECLARE_ISA(avx512)
PRT_DECLARE_ISA(avx512bf16)
PRT_DECLARE_ISA(amx)
#undef PRT_DECLARE_ISA

}  // namespace prt
