// Recycled Attention (arXiv 2411.05787; revised as RefreshKV): a full step attends to everything and keeps, from its own scores, the k
// rows that weigh most; the steps after it attend to these, the sinks and what has come since.
//
// The published method copies the k rows into a second cache. Here they stay in their pages and the choice is a list of ranges: the same
// rows are attended to and nothing is copied.
#pragma once
#include "attention/choice_policy.h"

namespace prt {

class Recycled : public ChoicePolicy {
 public:
  Recycled(const PolicyContext& context, const prt_attention& config);
  bool observes() const override { return true; }
  // The first choice is the last prompt token's: one row of dense attention with scores, besides the prompt's own.
  void observe(int64_t layer, const Attention& a, const PolicyRows& rows) override;

 private:
  void attend(int64_t layer, const Attention& a, const PolicyRows& rows) override;
  void full_step(int64_t layer, Attention a) const;  // of the entries that anew() names

  int64_t stride_;
  float threshold_;
};

}  // namespace prt
