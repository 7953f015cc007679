#include "ops/linear_cuda.h"

namespace prt::cuda {

namespace {
constexpr int64_t kFewRows = 64;
}

// Enough for any number of rows up to n_row: few rows can need more than many.
int64_t linear_scratch_bytes(const CudaStream& s, int64_t n_row, int64_t n_in, int64_t n_out, bool norm) {
  return std::max({linear_rows_scratch_bytes(s, std::min(n_row, kFewRows), n_in, n_out, false),
                   norm ? linear_gemm_scratch_bytes(n_row, n_in) : 0, linear_any_scratch_bytes(n_row)});
}

void linear(const CudaStream& s, const Linear& a) {
  if (a.x.shape[0] == 0 || a.weight.shape[0] == 0) return;
  if (a.x.shape[0] <= kFewRows && linear_rows_fits(a)) return linear_rows(s, a);
  if (linear_gemm_fits(a)) return linear_gemm(s, a);
  linear_any(s, a);
}

}  // namespace prt::cuda
