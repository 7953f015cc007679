// prt_op_run("sample", {logits, tokens, uniforms}, {temperature, top_k, top_p, min_p})
// and, the same for all rows, {..., logprobs, top_ids, top_logprobs, seen, bias_ids, bias_values or empty} with the three penalties
#include "ops/contents.h"
#include "ops/cpu_table.h"
#include "ops/cuda_table.h"

namespace prt {

int64_t sample_scratch_bytes(const Backend& backend, int64_t n_row, int64_t n_vocab) {
  if (backend.cuda) return backend.cuda->sample_scratch_bytes(*backend.stream, n_row, n_vocab);
  return 4 * backend.pool->size() * sample_scratch_floats(n_vocab);
}

void check_contents(const Sample& a) {
  for (int64_t r = 0; r < a.logits.shape[0]; ++r) {
    const SampleRow& s = a.rows[r];
    check(s.temperature >= 0 && s.temperature <= 1e6f, "sample: temperature is ", s.temperature, ", expected 0 (greedy) or more");
    check(s.top_p > 0 && s.top_p <= 1, "sample: top_p is ", s.top_p, ", expected 0 < top_p <= 1");
    check(s.min_p >= 0 && s.min_p <= 1, "sample: min_p is ", s.min_p, ", expected 0 <= min_p <= 1");
  }
}

void sample(const Backend& backend, const Sample& a) {
  check_shape("sample", "logits", a.logits, DType::f32, {-1, -1});
  const int64_t n_row = a.logits.shape[0], n_vocab = a.logits.shape[1];
  check(n_vocab > 0, "sample: logits has no columns");
  check_shape("sample", "tokens", a.tokens, DType::i32, {n_row});
  if (a.logprobs) check_shape("sample", "logprobs", a.logprobs, DType::f32, {n_row});
  if (a.top_ids) {
    check_shape("sample", "top_ids", a.top_ids, DType::i32, {n_row, -1});
    check(a.top_ids.shape[1] <= n_vocab, "sample: n_top is ", a.top_ids.shape[1], ", more than the vocabulary of ", n_vocab);
    check_shape("sample", "top_logprobs", a.top_logprobs, DType::f32, {n_row, a.top_ids.shape[1]});
  }
  const int64_t need = sample_scratch_bytes(backend, n_row, n_vocab);
  check(a.scratch.bytes() >= need, "sample: scratch has ", a.scratch.bytes(), " bytes, ", need, " are needed");
  if (backend.cuda) return backend.cuda->sample(*backend.stream, a);
  check_contents(a);
  backend.cpu->sample(*backend.pool, a);
}

}  // namespace prt
