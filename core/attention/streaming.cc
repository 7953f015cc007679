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
}

void Streaming::prepare(const int64_t* seq, int64_t n) {
  for (int64_t i = 0; config_.evict && i < n; ++i) evict(seq[i]);
}

void Streaming::evict(int64_t seq) {
  const Sequence& s = pool_.at(seq);
  const int64_t gone = s.length / kPageTokens - window_pages() - first_page();  // what is left is the window and less than a page
  if (gone < window_pages() + 1) return;
  pool_.own_tail(seq, first_page() + gone, copy_from_, copy_to_);  // before anything else: it may fail
  const auto list = [](const int32_t* pages, size_t n) { return make_tensor(const_cast<int32_t*>(pages), DType::i32, n); };
  for (size_t i = 0; !copy_from_.empty() && i < k_.size(); ++i)
    page_copy(backend_, {k_[i], v_[i], list(copy_from_.data(), copy_from_.size()), list(copy_to_.data(), copy_to_.size())});
  pool_.evict(seq, first_page(), gone);
  std::vector<float> turn;
  for (const bool sine : {false, true})
    for (const float f : inv_freq_) {
      const double angle = -static_cast<double>(f) * static_cast<double>(gone * kPageTokens);
      turn.push_back(static_cast<float>(sine ? std::sin(angle) : std::cos(angle)));
    }
  const Tensor pages = list(s.pages.data() + first_page(), s.pages.size() - static_cast<size_t>(first_page()));
  for (const Tensor& k : k_) rope_shift(backend_, {k, pages, make_tensor(turn.data(), DType::f32, 2, inv_freq_.size())});
}

void Streaming::attend(int64_t layer, const Attention& a, const PolicyRows&) {
  choose(layer, a, {}, Vote::sum);  // nothing: sinks and window
  attend_rows(layer, a, {});
  count(layer, a, {});
}

}  // namespace prt
