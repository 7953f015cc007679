// prt_op_run: single operations by name. Operands arrive as untyped host tensors; the operation's own contract checks them.
#include <string>
#include <vector>

#include "ops/attention.h"
#include "ops/ops.h"

namespace prt {

namespace {

struct Call {
  std::string op;
  std::vector<Tensor> operands;
  std::vector<double> params;

  void expect(size_t n_operand, size_t n_param) const {
    check(operands.size() == n_operand && params.size() == n_param, op, " takes ", n_operand, " operands and ", n_param,
          " parameters, got ", operands.size(), " and ", params.size());
  }
  int64_t dim(size_t operand, int i) const {
    check(operands[operand].n_dim > i, op, ": operand ", operand, " has ", operands[operand].n_dim, " dimensions, expected more than ", i);
    return operands[operand].shape[i];
  }
};

Tensor view(const prt_tensor* t, size_t i) {
  if (!t || !t->data) return {};  // an optional operand that is left out
  check(t->n_dim >= 1 && t->n_dim <= 4, "operand ", i, ": n_dim is ", t->n_dim, ", expected 1..4");
  check(t->dtype >= PRT_F32 && t->dtype <= PRT_I32, "operand ", i, ": dtype is ", t->dtype);
  Tensor v;
  v.data = t->data;
  v.dtype = static_cast<DType>(t->dtype);
  v.n_dim = t->n_dim;
  constexpr int64_t kMost = int64_t{1} << 44;  // elements; keeps every size below an overflow
  int64_t size = 1;
  for (int k = 0; k < t->n_dim; ++k) {
    check(t->shape[k] >= 0 && t->shape[k] <= int64_t{1} << 40, "operand ", i, ": shape[", k, "] is ", t->shape[k]);
    check(t->shape[k] <= kMost / size, "operand ", i, ": shape has more than ", kMost, " elements");
    size *= std::max<int64_t>(1, t->shape[k]);
    v.shape[k] = t->shape[k];
  }
  v.row_stride = v.row_size();
  return v;
}

}  // namespace

void run_op(const Backend& b, const char* op, prt_tensor* const* operands, int32_t n_operand, const double* params, int32_t n_param) {
  check(n_operand >= 0 && n_operand <= 16, "n_operand is ", n_operand, ", expected 0..16");
  check(n_param >= 0 && n_param <= 16, "n_param is ", n_param, ", expected 0..16");
  check(n_operand == 0 || operands, "operands is NULL");
  check(n_param == 0 || params, "params is NULL");
  Call c{op, {}, std::vector<double>(params, params + n_param)};
  for (int32_t i = 0; i < n_operand; ++i) c.operands.push_back(view(operands[i], static_cast<size_t>(i)));
  const auto& t = c.operands;
  std::vector<float> scratch;
  const auto scratch_of = [&](int64_t bytes) {
    scratch.assign(static_cast<size_t>(bytes / 4), bits_to_f32(0x7fc00000u));  // NaN: nothing may be read before it is written
    return make_tensor(scratch.data(), DType::f32, bytes / 4);
  };

  if (c.op == "embedding") {
    c.expect(3, 0);
    embedding(b, {t[0], t[1], t[2]});
  } else if (c.op == "rms_norm") {
    c.expect(3, 1);
    rms_norm(b, {t[0], t[1], t[2], static_cast<float>(c.params[0])});
  } else if (c.op == "linear") {
    c.expect(4, 1);
    linear(b, {t[0], t[1], t[2], t[3], c.params[0] != 0, scratch_of(linear_scratch_bytes(c.dim(1, 0), c.dim(1, 1)))});
  } else if (c.op == "rope_kv_write") {
    c.expect(7, 2);
    rope_kv_write(b, {t[0], t[1], t[2], static_cast<float>(c.params[1]), t[3], t[4], t[5], t[6], static_cast<int64_t>(c.params[0])});
  } else if (c.op == "attention_prefill" || c.op == "attention_decode") {
    c.expect(7, 2);
    Attention a{t[0], t[1], t[2], t[3], t[4], t[5], t[6], static_cast<int64_t>(c.params[0]), static_cast<float>(c.params[1]), {}};
    check_attention(op, a);
    const int64_t d = a.k_pages.shape[3];
    a.scratch = scratch_of(attention_scratch_bytes(b.pool->size(), a.kv_len.shape[0], a.page_table.shape[1] * kPageTokens, a.q.shape[1] / d,
                                                   a.k_pages.shape[1], d));
    c.op == "attention_prefill" ? attention_prefill(b, a) : attention_decode(b, a);
  } else if (c.op == "silu_mul") {
    c.expect(2, 0);
    silu_mul(b, {t[0], t[1]});
  } else if (c.op == "target_logprob") {
    c.expect(3, 0);
    target_logprob(b, {t[0], t[1], t[2]});
  } else if (c.op == "sample") {
    c.expect(3, 4);
    check_shape("sample", "uniforms", t[2], DType::f32, {c.dim(0, 0)});
    std::vector<SampleRow> rows;
    for (int64_t i = 0; i < c.dim(0, 0); ++i)
      rows.push_back({static_cast<float>(c.params[0]), static_cast<float>(c.params[2]), static_cast<float>(c.params[3]), 1, 0, 0,
                      static_cast<int32_t>(c.params[1]), 0, 0, nullptr, nullptr, nullptr, t[2].as<float>()[i]});
    Tensor scratch = scratch_of(4 * b.pool->size() * sample_scratch_floats(c.dim(0, 1)));
    scratch = make_tensor(scratch.data, DType::f32, b.pool->size(), sample_scratch_floats(c.dim(0, 1)));
    sample(b, {t[0], rows.data(), t[1], {}, {}, {}, scratch});
  } else if (c.op == "page_copy") {
    c.expect(4, 0);
    page_copy(b, {t[0], t[1], t[2], t[3]});
  } else {
    fail(PRT_INVALID_ARGUMENT, "operation '", c.op, "' is unknown");
  }
}

}  // namespace prt
