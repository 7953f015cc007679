// Quest (arXiv 2406.10774): blocks of 16 rows with the least and the largest of their keys per dimension, which bound what a query can
// score in them; the blocks with the highest bounds, up to a budget of rows. The first two layers stay dense, as in the authors' code.
//
// Query heads that share a kv head vote: a block is worth its largest share of a head's softmax over the bounds. What is after the last
// whole KV page has no bounds yet and is attended to like the window.
#pragma once
#include "attention/choice_policy.h"

namespace prt {

int64_t quest_page_bytes(const prt_attention& c, int64_t n_layer, int64_t h_kv, int64_t d_head, DType kv);

class Quest : public ChoicePolicy {
 public:
  Quest(const PolicyContext& context, const prt_attention& config);
  void leave() override;
  void prepare(const int64_t* seq, int64_t n) override;  // bounds of the pages that have filled up
  void truncate(int64_t seq, int64_t n_token) override;
  void add_stats(prt_session_stats& stats) const override;

 private:
  void attend(int64_t layer, const Attention& a, const PolicyRows&) override;

  Buffer memory_;
  std::vector<Tensor> low_, high_;  // [n_layer] of [n_page][h_kv][4][d_head]
  Tensor list_;                     // [n_page] i32: page numbers on a GPU
  std::vector<int32_t> pages_;
};

}  // namespace prt
