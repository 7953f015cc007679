// prt_op_run("linear", {out, x, weight, bias or empty, norm or empty}, {accumulate, gated, norm_eps})
#include "ops/cpu_table.h"
#include "ops/cuda_table.h"

namespace prt {

namespace {
constexpr int64_t kAlign = 64;  // bytes

int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// bf16 kernels read x as bf16, in blocks of 16 rows with n_in padded to 32; the largest form is whole blocks.
int64_t packed_bytes(int64_t n_row, int64_t n_in) { return aligned((n_row + 15) / 16 * 16 * ((n_in + 31) / 32 * 32) * 2); }

// On the CPU the norm and the gate are passes of their own, through the scratch.
void linear_on_cpu(const Backend& b, const Linear& a) {
  const int64_t n_row = a.x.shape[0], n_in = a.x.shape[1], n_out = a.weight.shape[0];
  char* scratch = a.scratch.as<char>();
  Linear plain = a;
  plain.scratch = make_tensor(scratch, DType::f32, packed_bytes(n_row, n_in) / 4);
  scratch += plain.scratch.bytes();
  if (a.norm) {
    plain.x = make_tensor(scratch, DType::f32, n_row, n_in);
    scratch += aligned(plain.x.bytes());
    b.cpu->rms_norm(*b.pool, {plain.x, a.x, a.norm, a.norm_eps});
  }
  if (a.gated) plain.out = make_tensor(scratch, DType::f32, n_row, n_out);
  b.cpu->linear(*b.pool, plain);
  if (a.gated) b.cpu->silu_mul(*b.pool, {a.out, plain.out});
}
}  // namespace

int64_t linear_scratch_bytes(const Backend& backend, int64_t n_row, int64_t n_in, int64_t n_out, bool norm, bool gated) {
  if (backend.cuda) return backend.cuda->linear_scratch_bytes(*backend.stream, n_row, n_in, n_out, norm);
  return packed_bytes(n_row, n_in) + (norm ? aligned(4 * n_row * n_in) : 0) + (gated ? aligned(4 * n_row * n_out) : 0);
}

void linear(const Backend& backend, const Linear& a) {
  const DType act = backend.activation(a.weight.dtype);
  check_stored("linear", "weight", a.weight, {-1, -1});
  check_shape("linear", "x", a.x, a.norm ? DType::f32 : act, {-1, -1});
  const int64_t n_row = a.x.shape[0], n_in = a.x.shape[1];
  check(n_in > 0, "linear: x has no columns");
  check_stored("linear", "weight", a.weight, {-1, n_in});
  const int64_t n_out = a.weight.shape[0];
  check(!a.gated || (n_out % 2 == 0 && !a.accumulate), "linear: gated takes an even number of weight rows and no accumulate, got ", n_out,
        " rows", a.accumulate ? " and accumulate" : "");
  check_shape("linear", "out", a.out, a.out.dtype == act && !a.accumulate ? act : DType::f32, {n_row, a.gated ? n_out / 2 : n_out});
  if (a.bias) check_shape("linear", "bias", a.bias, DType::f32, {n_out});
  if (a.norm) {
    check_shape("linear", "norm", a.norm, DType::f32, {n_in});
    check(a.norm_eps >= 0 && a.norm_eps < 1, "linear: norm_eps is ", a.norm_eps, ", expected 0 <= norm_eps < 1");
  }
  const int64_t need = linear_scratch_bytes(backend, n_row, n_in, n_out, static_cast<bool>(a.norm), a.gated);
  check(a.scratch.bytes() >= need, "linear: scratch has ", a.scratch.bytes(), " bytes, ", need, " are needed for ", n_row, " rows of ",
        n_in);
  if (n_row == 0) return;
  if (backend.cuda) return backend.cuda->linear(*backend.stream, a);
  linear_on_cpu(backend, a);
}

}  // namespace prt
