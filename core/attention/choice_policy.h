// What the policies that choose rows by score have in common: working memory, the budget, attention over a choice, and the counters.
#pragma once

#include "attention/choice.h"
#include "attention/policy.h"

namespace prt {

class ChoicePolicy : public Policy {
 public:
  void add_stats(prt_session_stats& stats) const override;

 protected:
  struct Needs {
    int64_t k = 0;     // rows to choose where the configuration says nothing
    float p = 0;       // or the share of the mass
    int64_t unit = 1;  // rows that a score stands for; 0: there are no scores
    int64_t w = 0;     // columns of the kept query; 0: choices are not kept
  };
  ChoicePolicy(const PolicyContext& context, const prt_attention& config, const Needs& needs);

  // Where choices go: those that are kept for a layer, or working memory for one step.
  struct Place {
    Tensor ranges, n_range, made;
  };
  Place place(int64_t layer, int64_t n_entry) const;
  // The operations with what they always get. anew: the states to choose for; missing: a choice for each entry.
  void score(const Attention& a, const Tensor& anew) const;
  void choose(int64_t layer, const Attention& a, const Tensor& anew, Vote vote, int64_t pool = 1) const;
  void attend_rows(int64_t layer, const Attention& a, const Tensor& state) const;
  void count(int64_t layer, const Attention& a, const Tensor& state) const;
  Tensor spare_out() const { return out_; }  // [1][h_q d_head]: for a result that nobody wants
  Tensor scores(int64_t n_entry) const { return scores_.rows(0, n_entry); }
  Tensor log_total(int64_t n_entry) const { return log_total_.rows(0, n_entry); }
  Tensor anew(int64_t n_entry) const { return anew_.rows(0, n_entry); }
  Tensor kept(int64_t n_entry) const { return kept_states_.rows(0, n_entry); }
  void reuse_kept(int64_t layer, const Attention& a, const PolicyRows& rows, int64_t stride, int64_t check, float threshold) const;

 private:
  void lay_out(Arena& arena);

  Needs needs_;
  int64_t max_range_;
  Buffer memory_;
  Tensor ranges_, n_range_, out_, scores_, log_total_, true_mass_, anew_, kept_states_, choose_scratch_, attend_scratch_;
};

}  // namespace prt
