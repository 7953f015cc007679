// A sequence's sampling parameters and what they need to remember.
#pragma once
#include <unordered_map>
#include <vector>

#include "ops/ops.h"

namespace prt {

class Sampler {
 public:
  Sampler(int32_t n_vocab, const prt_sampling* sampling);

  void accept(const int32_t* tokens, int64_t n, bool is_prompt);
  void set_bias(const int32_t* ids, const float* values, int32_t n);
  SampleRow row() const;   // for the next draw; points into this object
  void drawn(int32_t token);  // the draw happened
  int32_t n_vocab() const { return n_vocab_; }

 private:
  int32_t n_vocab_;
  prt_sampling params_;
  bool penalties_;
  uint64_t n_drawn_ = 0;
  std::vector<int32_t> bias_ids_;
  std::vector<float> bias_values_;
  std::vector<SeenToken> seen_;                // each token once
  std::unordered_map<int32_t, size_t> where_;  // its place in seen_
};

}  // namespace prt
