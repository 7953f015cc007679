// Compiled once per instruction set (PRT_ISA).
#include "ops/cpu_table.h"

namespace prt::PRT_ISA {
const CpuOps cpu_ops = {embedding,      rms_norm, linear,  rope_kv_write, attention_prefill, attention_decode, silu_mul,
                        target_logprob, sample,   cluster, select,        sparse_attention,  score_rows,       page_bounds,
                        score_blocks,   top_rows, reuse,   count_rows,    rope_shift};
}  // namespace prt::PRT_ISA
