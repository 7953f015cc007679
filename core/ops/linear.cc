// prt_op_run("linear", {out, x, weight, bias or empty}, {accumulate})
#include "ops/cpu_table.h"

namespace prt {

// bf16 kernels read x as bf16, in blocks of 16 rows with n_in padded to 32; the largest form is whole blocks.
int64_t linear_scratch_bytes(int64_t n_row, int64_t n_in) { return (n_row + 15) / 16 * 16 * ((n_in + 31) / 32 * 32) * 2; }

void linear(const Backend& backend, const Linear& a) {
  check_shape("linear", "x", a.x, DType::f32, {-1, -1});
  const int64_t n_row = a.x.shape[0], n_in = a.x.shape[1];
  check(n_in > 0, "linear: x has no columns");
  check_stored("linear", "weight", a.weight, {-1, n_in});
  check_shape("linear", "out", a.out, DType::f32, {n_row, a.weight.shape[0]});
  if (a.bias) check_shape("linear", "bias", a.bias, DType::f32, {a.weight.shape[0]});
  check(a.scratch.bytes() >= linear_scratch_bytes(n_row, n_in), "linear: scratch has ", a.scratch.bytes(), " bytes, ",
        linear_scratch_bytes(n_row, n_in), " are needed for ", n_row, " rows of ", n_in);
  if (n_row == 0) return;
  backend.cpu->linear(*backend.pool, a);
}

}  // namespace prt
