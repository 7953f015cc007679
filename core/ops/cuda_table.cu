#include "ops/cuda_table.h"

namespace prt {

namespace cuda {
const CudaOps ops = {embedding,
                     rms_norm,
                     linear,
                     linear_scratch_bytes,
                     rope_angles,
                     rope_kv_write,
                     attention_prefill,
                     attention_decode,
                     attention_scratch_bytes,
                     silu_mul,
                     target_logprob,
                     sample,
                     sample_scratch_bytes,
                     page_copy,
                     cluster,
                     cluster_scratch_bytes,
                     uncluster,
                     select,
                     select_scratch_bytes,
                     sparse_attention,
                     sparse_attention_scratch_bytes,
                     score_rows,
                     page_bounds,
                     score_blocks,
                     top_rows,
                     reuse,
                     count_rows,
                     rope_shift};
}

Backend cuda_backend(const CudaStream& stream) {
  Backend b;
  b.cuda = &cuda::ops;
  b.stream = &stream;
  return b;
}

}  // namespace prt
