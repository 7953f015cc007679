// What attention_prefill and attention_decode share on a GPU.
#pragma once
#include "cuda/stream.h"
#include "ops/ops.h"

namespace prt::cuda {

// The plain kernel behind both: every dtype, d_head and group, written to read like the formula. Models in f32 run on it, and shapes that
// the tensor-core kernels leave out.
void attention_any(const CudaStream&, const Attention&);

}  // namespace prt::cuda
