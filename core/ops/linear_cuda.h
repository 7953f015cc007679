// The forms of prt::cuda::linear. Each takes any Linear that its _fits accepts, and does the norm, bias, gate and residual itself.
#pragma once
#include "ops/cuda_table.h"

namespace prt::cuda {

// 1..64 rows: as fast as the weights can be read.
bool linear_rows_fits(const Linear&);
void linear_rows(const CudaStream&, const Linear&);
int64_t linear_rows_scratch_bytes(const CudaStream&, int64_t n_row, int64_t n_in, int64_t n_out, bool gated);

// Many rows of bf16 or f16 on tensor cores: linear_gemm is Hopper's own kernel there and linear_mma elsewhere.
bool linear_gemm_fits(const Linear&);
void linear_gemm(const CudaStream&, const Linear&);
void linear_mma(const CudaStream&, const Linear&, const Tensor& x);  // x: a.x, normed
int64_t linear_gemm_scratch_bytes(int64_t n_row, int64_t n_in);

// Everything: f32, odd sizes, unaligned rows.
void linear_any(const CudaStream&, const Linear&);
int64_t linear_any_scratch_bytes(int64_t n_row);

}  // namespace prt::cuda
