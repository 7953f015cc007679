// Tactic: clusters of keys, a share of the softmax mass to reach, and attention to the clusters that reach it (arXiv 2502.12216).
//
// tactic_recycled: a layer's choice, and what it says of the clusters left out, serve again while its query is like the one that they were
// made for; tokens that have come since are exact. Then the index is read once for several tokens.
#pragma once

#include "attention/policy.h"

namespace prt {

// The index of one layer.
ClusterIndex take_index(Arena& arena, int64_t n_page, int64_t h_kv, int64_t n_slot, int64_t d_head);
// What the index takes for each KV page, all layers together.
int64_t index_page_bytes(const prt_attention& c, int64_t n_layer, int64_t h_kv, int64_t d_head, DType kv = DType::bf16);

class Tactic : public Policy {
 public:
  Tactic(const PolicyContext& context, const prt_attention& config);

  // Where the values change how keys are clustered, every segment is opened and clustered again when needed. Should the memory for that
  // be gone although it was there a moment ago, the policy is not usable() any more.
  bool configure(const prt_attention& config) override;
  // Clusters just these segments, numbers of pages from first_page() on: those that the sequence had when its rows were exported.
  void restore(int64_t seq, const std::vector<int32_t>& segments);
  const prt_attention& config() const { return config_; }
  bool same_clusters(const prt_attention& c) const;
  int64_t first_page() const { return (config_.sinks + kPageTokens - 1) / kPageTokens; }
  const Tensor& order(int64_t layer) const { return at_.index[static_cast<size_t>(layer)].order; }  // ClusterIndex
  bool usable() const override { return memory_.data() != nullptr; }
  void leave() override { open_all(); }
  void prepare(const int64_t* seq, int64_t n) override;
  void closed_pages(int64_t seq, int32_t out[2]) const override;
  void truncate(int64_t seq, int64_t n_token) override;
  void add_stats(prt_session_stats& stats) const override;

 private:
  static constexpr int64_t kExtendPages = 32;  // segment 0: what is decoded is clustered 2048 rows at a time, as published
  static constexpr int64_t kLeastPages = 4;    // what is left of a prompt is worth a shorter segment from 256 rows on

  // The operations' view of the memory.
  struct Views {
    std::vector<ClusterIndex> index;  // [n_layer]
    Tensor lists;                     // [3][max_pages] i32: page numbers on a GPU
    Tensor anew, kept;                // [entries_at_once] i32: of Reuse
    Tensor ranges, n_range, tail, mass, true_mass, select_scratch, attend_scratch, cluster_scratch;
  };
  // Where choices go: those that are kept for a layer, or working memory for one step.
  struct Place {
    Tensor ranges, n_range, tail, made;
  };
  Place place(int64_t layer, int64_t n_entry) const;
  void attend(int64_t layer, const Attention& a, const PolicyRows& rows) override;
  void choose(int64_t layer, const Attention& a, const PolicyRows& rows, const Tensor& anew) const;
  void choose_or_reuse(int64_t layer, const Attention& a, const PolicyRows& rows) const;
  void keep_choices();
  Views lay_out(Arena& arena, const prt_attention& c) const;
  void check_fits(const prt_attention& c) const;
  void take_memory();

  int64_t segments_at_once(int64_t n_page) const { return backend_.cuda ? std::max<int64_t>(1, 2048 / n_page) : 4; }
  int64_t closed_end(const Sequence& s) const;
  void close(int64_t seq);
  void close_segments(int64_t seq, int64_t page, int64_t n_segment, int64_t n_page);
  void open(const int32_t* src, int64_t n, const int32_t* dst, int64_t m);
  void open_all();
  Tensor list(int64_t i) const { return at_.lists.rows(i, 1); }

  Buffer memory_;
  Views at_;
  std::vector<int32_t> copy_from_, copy_to_, from_, to_;
  double cluster_seconds_ = 0;
  int64_t n_clustered_ = 0;  // rows
};

}  // namespace prt
