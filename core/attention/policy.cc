#include "attention/policy.h"

#include <array>
#include <bit>
#include <cstring>

#include "cuda/device.h"

namespace prt {

Policy::Policy(const PolicyContext& x, const prt_attention& config)
    : backend_(x.backend),
      pool_(x.pool),
      k_(x.k),
      v_(x.v),
      h_q_(x.h_q),
      max_pages_((x.max_context + kPageTokens - 1) / kPageTokens),
      config_(config) {
  Arena measure;
  measure.take(DType::i64, n_layer(), h_kv(), kAttentionCounters);
  counter_memory_ = take_memory(measure.used(), "the counters of an attention policy");
  counters_ = Arena(counter_memory_.data()).take(DType::i64, n_layer(), h_kv(), kAttentionCounters);
  clear_counters();
}

Buffer Policy::take_memory(int64_t bytes, const char* what) const {
  return backend_.cuda ? device_buffer(backend_.stream->device, bytes, what) : host_buffer(bytes, what, false);
}
int64_t Policy::memory_free() const { return backend_.cuda ? device_memory_free(backend_.stream->device) : host_memory_free(); }

Tensor Policy::send(const Tensor& room, const void* numbers, int64_t n) const {
  Tensor t = make_tensor(const_cast<void*>(numbers), room.dtype, n);
  if (!backend_.cuda) return t;
  copy_to_device(*backend_.stream, room.data, numbers, t.bytes());
  t.data = room.data;
  return t;
}

void Policy::decode(int64_t layer, const Attention& a, const PolicyRows& rows) {
  if (layer < config_.dense_layers) return attention_decode(backend_, a);
  const int64_t n = a.kv_len.shape[0];
  for (int64_t e = 0; e < n; e += entries_at_once()) {
    const int64_t m = std::min(entries_at_once(), n - e);
    Attention part = a;
    part.out = a.out.rows(e, m), part.q = a.q.rows(e, m);
    part.q_begin = a.q_begin.rows(0, m + 1);  // entries of one row each: they begin alike wherever the part does
    part.kv_len = a.kv_len.rows(e, m), part.page_table = a.page_table.rows(e, m);
    attend(layer, part, {rows.closed.rows(e, m), rows.state.rows(e, m)});
  }
}

void Policy::clear_counters() {
  if (backend_.cuda) fill(*backend_.stream, counters_.data, 0, counters_.bytes());
  else std::memset(counters_.data, 0, static_cast<size_t>(counters_.bytes()));
}

AttentionCounters Policy::counters(int64_t layer, int64_t kv_head) const {
  check(layer >= -1 && layer < n_layer(), "attention stats: layer is ", layer, ", expected -1 (all) or 0..", n_layer() - 1);
  check(kv_head >= -1 && kv_head < h_kv(), "attention stats: kv_head is ", kv_head, ", expected -1 (all) or 0..", h_kv() - 1);
  const int64_t* all = counters_.as<int64_t>();
  std::vector<int64_t> copy;
  if (backend_.cuda) {
    copy.resize(static_cast<size_t>(counters_.size()));
    copy_to_host(*backend_.stream, copy.data(), all, counters_.bytes());
    synchronize(*backend_.stream);
    all = copy.data();
  }
  std::array<int64_t, kAttentionCounters> sum{};
  for (int64_t l = 0; l < n_layer(); ++l)
    for (int64_t h = 0; h < h_kv(); ++h)
      if ((layer < 0 || l == layer) && (kv_head < 0 || h == kv_head))
        for (int64_t i = 0; i < kAttentionCounters; ++i) sum[static_cast<size_t>(i)] += all[(l * h_kv() + h) * kAttentionCounters + i];
  return std::bit_cast<AttentionCounters>(sum);
}

}  // namespace prt
