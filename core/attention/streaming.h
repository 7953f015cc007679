// StreamingLLM (arXiv 2309.17453): the first rows, which attention rests on when it has nothing to say, and the last ones.
//
// With `evict` the rows between them are given up, and a sequence may go on without end. Positions are those in the cache, as published, so
// they stay below max_context and a key has to turn when rows before it go. It is stored turned: so pages go many at a time, when twice
// the window has gathered, and those that stay are turned back by as many positions. A key is turned once, or twice if the window is no
// multiple of a page, and rounded as often. The sequence's length is then that of its cache.
#pragma once
#include "attention/choice_policy.h"

namespace prt {

class Streaming : public ChoicePolicy {
 public:
  Streaming(const PolicyContext& context, const prt_attention& config);
  void prepare(const int64_t* seq, int64_t n) override;

 private:
  void attend(int64_t layer, const Attention& a, const PolicyRows&) override;
  void evict(int64_t seq);
  int64_t first_page() const { return (config_.sinks + kPageTokens - 1) / kPageTokens; }
  int64_t window_pages() const { return (config_.window + kPageTokens - 1) / kPageTokens; }

  std::vector<float> inv_freq_;
  std::vector<int32_t> copy_from_, copy_to_;
  Buffer memory_;
  Tensor lists_[3], cos_sin_;  // [max_pages] i32, [d_head] f32: what evict() sends to a GPU
};

}  // namespace prt
