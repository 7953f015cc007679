// StreamingLLM (arXiv 2309.17453): the first rows, which attention rests on when it has nothing to say, and the last ones.
#pragma once
#include "attention/choice_policy.h"

namespace prt {

class Streaming : public ChoicePolicy {
 public:
  Streaming(const PolicyContext& x, const prt_attention& c) : ChoicePolicy(x, c, {.name = "streaming", .unit = 0}) {}

 private:
  void attend(int64_t layer, const Attention& a, const PolicyRows&) override {
    choose(layer, a, {}, Vote::sum);  // nothing: sinks and window
    attend_rows(layer, a, {});
    count(layer, a, {});
  }
};

}  // namespace prt
