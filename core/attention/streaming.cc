#include "attention/streaming.h"

#include <cmath>

namespace prt {

Streaming::Streaming(const PolicyContext& x, const prt_attention& c) : ChoicePolicy(x, c, {.unit = 0}), inv_freq_(x.inv_freq) {
  const int64_t need = (first_page() + 2 * window_pages() + 2) * kPageTokens;
  check(!c.evict || need <= x.max_context, "attention 'streaming': evict with sinks ", c.sinks, " and window ", c.window, " lets ", need,
        " rows gather, max_context is ", x.max_context, ": choose a smaller window or a larger max_context");
  const int64_t left = (first_page() + window_pages()) * kPageTokens;
  check(!c.evict || c.min_context <= left, "attention 'streaming': evict leaves ", left, " rows, min_context is ", c.min_context,
        ": tokens that see fewer would be dense again");
  if (!c.evict) return;
  const auto lay_out = [&](Arena arena) {
    for (Tensor& t : lists_) t = arena.take(DType::i32, max_pages_);
    cos_sin_ = arena.take(DType::f32, d_head());
    return arena.used();
  };
  memory_ = take_memory(lay_out(Arena()), "the lists of attention 'streaming'");
  lay_out(Arena(memory_.data()));
}

void Streaming::prepare(const int64_t* seq, int64_t n) {
  for (int64_t i = 0; config_.evict && i < n; ++i) evict(seq[i]);
}

void Streaming::evict(int64_t seq) {
  const Sequence& s = pool_.at(seq);
  const int64_t gone = s.length / kPageTokens - window_pages() - first_page();  // what is left is the window and less than a page
  if (gone < window_pages() + 1) return;
  pool_.own_tail(seq, first_page() + gone, copy_from_, copy_to_);  // before anything else: it may fail
  const auto n_copy = static_cast<int64_t>(copy_from_.size());
  const Tensor from = send(lists_[0], copy_from_.data(), n_copy), to = send(lists_[1], copy_to_.data(), n_copy);
  for (size_t i = 0; n_copy > 0 && i < k_.size(); ++i) page_copy(backend_, {k_[i], v_[i], from, to});
  pool_.evict(seq, first_page(), gone);
  std::vector<float> turn;
  for (const bool sine : {false, true})
    for (const float f : inv_freq_) {
      const double angle = -static_cast<double>(f) * static_cast<double>(gone * kPageTokens);
      turn.push_back(static_cast<float>(sine ? std::sin(angle) : std::cos(angle)));
    }
  const Tensor pages = send(lists_[2], s.pages.data() + first_page(), static_cast<int64_t>(s.pages.size()) - first_page());
  Tensor cos_sin = send(cos_sin_, turn.data(), static_cast<int64_t>(turn.size()));
  cos_sin = make_tensor(cos_sin.data, DType::f32, 2, inv_freq_.size());
  for (const Tensor& k : k_) rope_shift(backend_, {k, pages, cos_sin});
}

void Streaming::attend(int64_t layer, const Attention& a, const PolicyRows&) {
  choose(layer, a, {}, Vote::sum);  // nothing: sinks and window
  attend_rows(layer, a, {});
  count(layer, a, {});
}

}  // namespace prt
