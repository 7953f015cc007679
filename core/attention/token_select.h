// TokenSelect (arXiv 2411.02886): exact scores of all rows, a softmax per head, and the sum over all heads of the layer decides; every kv
// head attends to the same k rows. A choice serves again while the query's cosine to the one that it was made for is 0.9 or more.
#pragma once
#include "attention/choice_policy.h"

namespace prt {

class TokenSelect : public ChoicePolicy {
 public:
  TokenSelect(const PolicyContext& x, const prt_attention& c)
      : ChoicePolicy(x, c, {.k = 2048, .w = x.h_q * x.k[0].shape[3]}), threshold_(c.threshold > 0 ? c.threshold : 0.9f) {}

 private:
  void attend(int64_t layer, const Attention& a, const PolicyRows& rows) override {
    const Tensor fresh = anew(a.kv_len.shape[0]);
    reuse_kept(layer, a, rows, 0, 1, threshold_);
    score(a, fresh);
    choose(layer, a, fresh, Vote::layer);
    attend_rows(layer, a, rows.state);
    count(layer, a, rows.state);
  }

  float threshold_;
};

}  // namespace prt
