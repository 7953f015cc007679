// The true scores decide: per kv head the k rows that hold most of the mass of its query heads, or with p per query head the fewest rows
// that reach it. As slow as dense attention: the line that no policy can beat at the same density.
#pragma once
#include "attention/choice_policy.h"

namespace prt {

class Oracle : public ChoicePolicy {
 public:
  Oracle(const PolicyContext& x, const prt_attention& c) : ChoicePolicy(x, c, {.p = c.p}) {}

 private:
  void attend(int64_t layer, const Attention& a, const PolicyRows&) override {
    score(a, {});
    choose(layer, a, {}, Vote::sum);
    attend_rows(layer, a, {});
    count(layer, a, {});
  }
};

}  // namespace prt
