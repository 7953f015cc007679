// Tactic: clusters of keys, a share of the softmax mass to reach, and attention to the clusters that reach it (arXiv 2502.12216).
#pragma once
#include <vector>

#include "attention/policy.h"
#include "attention/sparse.h"
#include "base/arena.h"

namespace prt {

// Refuses values that are out of range, by name.
void check_attention_config(const prt_attention& c);

class Tactic : public Policy {
 public:
  // k, v: the pages of every layer. Both they and the pool outlive the policy.
  Tactic(const Backend& backend, PagePool& pool, const std::vector<Tensor>& k, const std::vector<Tensor>& v, int64_t h_q,
         int64_t max_context, const prt_attention& config);

  // Other values for the same sequences. Where these change how keys are clustered, every segment is opened and clustered again when
  // needed.
  void configure(const prt_attention& config);
  bool wants(int64_t kv_len) const override { return kv_len >= config_.min_context; }
  void prepare(const int64_t* seq, int64_t n) override;
  void begin(const int64_t* seq, int64_t n) override;
  void decode(int64_t layer, const Attention& a) override;
  void truncate(int64_t seq, int64_t n_token) override;

  AttentionCounters counters(int64_t layer, int64_t kv_head) const;  // -1: all
  int64_t index_bytes() const { return index_buffer_.bytes() + workspace_.bytes(); }
  double cluster_seconds() const { return cluster_seconds_; }
  int64_t n_clustered() const { return n_clustered_; }

 private:
  static constexpr int64_t kEntries = 8;        // decode rows at once: bounds the working memory
  static constexpr int64_t kSegmentsAtOnce = 4;
  static constexpr int64_t kExtendPages = 32;   // segment 0: what is decoded is clustered 2048 rows at a time, as published
  static constexpr int64_t kLeastPages = 4;     // what is left of a prompt is worth a shorter segment from 256 rows on

  bool same_clusters(const prt_attention& c) const;
  int64_t layout(Arena& arena);
  void take_memory();
  int64_t first_page() const { return (config_.sinks + kPageTokens - 1) / kPageTokens; }
  int64_t segment_pages() const;
  int64_t closed_end(const Sequence& s) const;
  void close(int64_t seq);
  void close_segments(int64_t seq, int64_t page, int64_t n_segment, int64_t n_page);
  void open(const int32_t* src, int64_t n, const int32_t* dst, int64_t m);
  void open_all();
  void count(int64_t layer, const Select& s, int64_t n_entry);

  Backend backend_;
  PagePool& pool_;
  const std::vector<Tensor>&k_, &v_;
  int64_t h_q_, max_pages_;
  prt_attention config_;
  Buffer index_buffer_, workspace_;
  std::vector<ClusterIndex> index_;  // [n_layer]
  Tensor ranges_, n_range_, tail_, mass_, true_mass_, select_scratch_, attend_scratch_, cluster_scratch_;
  std::vector<int32_t> closed_;      // [n_entry][2] of the chunk in hand
  std::vector<int32_t> copy_from_, copy_to_;
  std::vector<AttentionCounters> counters_;  // [n_layer][h_kv]
  double cluster_seconds_ = 0;
  int64_t n_clustered_ = 0;  // rows
};

}  // namespace prt
