#include "attention/quest.h"

#include "cuda/stream.h"

namespace prt {

int64_t quest_page_bytes(const prt_attention&, int64_t n_layer, int64_t h_kv, int64_t d_head, DType kv) {
  return 2 * n_layer * h_kv * (kPageTokens / kBlockRows) * d_head * dtype_size(kv);
}

Quest::Quest(const PolicyContext& x, const prt_attention& c) : ChoicePolicy(x, c, {.k = 1024, .unit = kBlockRows}) {
  const int64_t bytes = n_page() * quest_page_bytes(c, n_layer(), h_kv(), d_head(), k_[0].dtype), free = memory_free();
  if (bytes > free)
    fail(PRT_OUT_OF_MEMORY, "attention 'quest' needs ", bytes >> 20, " MiB for the bounds of ", n_page(), " KV pages; ", free >> 20,
         " MiB are free", backend_.cuda ? text(" on cuda:", backend_.stream->device) : "");
  memory_ = take_memory(bytes + n_layer() * 2 * Arena::kAlign + n_page() * 4 + Arena::kAlign, "the bounds of attention 'quest'");
  Arena arena(memory_.data());
  list_ = arena.take(DType::i32, n_page());
  for (const Tensor& k : k_) {
    low_.push_back(arena.take(k.dtype, n_page(), h_kv(), kPageTokens / kBlockRows, d_head()));
    high_.push_back(arena.take(k.dtype, n_page(), h_kv(), kPageTokens / kBlockRows, d_head()));
  }
}

// A page whose bounds are known is marked in the pool as a segment of one page: the mark goes when the page does.
void Quest::prepare(const int64_t* seq, int64_t n) {
  pages_.clear();
  for (int64_t i = 0; i < n; ++i) {
    const Sequence& s = pool_.at(seq[i]);
    for (int64_t p = s.length / kPageTokens; p-- > 0;) {
      const int32_t page = s.pages[static_cast<size_t>(p)];
      if (pool_.segment(page) > 0) break;  // and so have those before it
      pool_.set_segment(page, 1);
      pages_.push_back(page);
    }
  }
  if (pages_.empty()) return;
  const Tensor list = send(list_, pages_.data(), static_cast<int64_t>(pages_.size()));
  for (size_t i = 0; i < k_.size(); ++i) page_bounds(backend_, {low_[i], high_[i], k_[i], list});
}

// The page that the cut goes through may be written again. Others that hold it lose the mark only: its bounds stay as they are.
void Quest::truncate(int64_t seq, int64_t n_token) {
  const Sequence& s = pool_.at(seq);
  if (n_token < 0 || n_token >= s.length || n_token % kPageTokens == 0) return;
  pool_.set_segment(s.pages[static_cast<size_t>(n_token / kPageTokens)], 0);
}

void Quest::leave() {
  for (const int64_t seq : pool_.ids())
    for (const int32_t page : pool_.at(seq).pages) pool_.set_segment(page, 0);
}

void Quest::attend(int64_t layer, const Attention& a, const PolicyRows&) {
  const int64_t n = a.kv_len.shape[0];
  const auto i = static_cast<size_t>(layer);
  score_blocks(backend_, {scores(n), log_total(n), a.q, low_[i], high_[i], a.page_table, a.kv_len, a.scale});
  choose(layer, a, {}, Vote::max);
  attend_rows(layer, a, {});
  count(layer, a, {});
}

void Quest::add_stats(prt_session_stats& s) const {
  ChoicePolicy::add_stats(s);
  s.index_bytes += memory_.bytes();
}

}  // namespace prt
