// Tactic: clusters of keys, a share of the softmax mass to reach, and attention to the clusters that reach it (arXiv 2502.12216).
#pragma once
#include <algorithm>
#include <vector>

#include "attention/policy.h"
#include "attention/sparse.h"
#include "base/arena.h"

namespace prt {

// Refuses values that are out of range, by name.
void check_attention_config(const prt_attention& c);

// The index of one layer.
ClusterIndex take_index(Arena& arena, int64_t n_page, int64_t h_kv, int64_t n_slot, int64_t d_head);
// What the index takes for each KV page, all layers together.
int64_t index_page_bytes(const prt_attention& c, int64_t n_layer, int64_t h_kv, int64_t d_head);

class Tactic : public Policy {
 public:
  // k, v: the pages of every layer. Both they and the pool outlive the policy.
  Tactic(const Backend& backend, PagePool& pool, const std::vector<Tensor>& k, const std::vector<Tensor>& v, int64_t h_q,
         int64_t max_context, const prt_attention& config);

  // Other values for the same sequences. Where these change how keys are clustered, every segment is opened and clustered again when
  // needed. Should the memory for that be gone although it was there a moment ago, the policy is not usable() any more.
  void configure(const prt_attention& config);
  // Clusters just these segments, numbers of pages from first_page() on: those that the sequence had when its rows were exported.
  void restore(int64_t seq, const std::vector<int32_t>& segments);
  const prt_attention& config() const { return config_; }
  bool same_clusters(const prt_attention& c) const;
  int64_t first_page() const { return (config_.sinks + kPageTokens - 1) / kPageTokens; }
  const Tensor& order(int64_t layer) const { return at_.index[static_cast<size_t>(layer)].order; }  // ClusterIndex
  bool usable() const { return memory_.data() != nullptr; }
  bool wants(int64_t kv_len) const override { return kv_len >= config_.min_context; }
  void prepare(const int64_t* seq, int64_t n) override;
  void closed_pages(int64_t seq, int32_t out[2]) const override;
  void decode(int64_t layer, const Attention& a, const Tensor& closed) override;
  void truncate(int64_t seq, int64_t n_token) override;

  AttentionCounters counters(int64_t layer, int64_t kv_head) const;  // -1: all
  int64_t index_bytes() const { return memory_.bytes(); }
  double cluster_seconds() const { return cluster_seconds_; }
  int64_t n_clustered() const { return n_clustered_; }

 private:
  static constexpr int64_t kExtendPages = 32;  // segment 0: what is decoded is clustered 2048 rows at a time, as published
  static constexpr int64_t kLeastPages = 4;    // what is left of a prompt is worth a shorter segment from 256 rows on

  // The operations' view of the memory.
  struct Views {
    std::vector<ClusterIndex> index;  // [n_layer]
    Tensor counters;                  // [n_layer][h_kv][kAttentionCounters] i64
    Tensor lists;                     // [3][max_pages] i32: page numbers on a GPU
    Tensor ranges, n_range, tail, mass, true_mass, select_scratch, attend_scratch, cluster_scratch;
  };
  Views lay_out(Arena& arena, const prt_attention& c) const;
  void check_fits(const prt_attention& c) const;
  void take_memory();
  void clear_counters();

  // Decode rows and segments that are worked on at a time: bounds the working memory.
  int64_t entries_at_once() const { return backend_.cuda ? 16 : 8; }
  int64_t segments_at_once(int64_t n_page) const { return backend_.cuda ? std::max<int64_t>(1, 2048 / n_page) : 4; }
  int64_t closed_end(const Sequence& s) const;
  void close(int64_t seq);
  void close_segments(int64_t seq, int64_t page, int64_t n_segment, int64_t n_page);
  void open(const int32_t* src, int64_t n, const int32_t* dst, int64_t m);
  void open_all();
  Tensor send(int64_t list, const int32_t* pages, int64_t n) const;  // to where the operations read them

  Backend backend_;
  PagePool& pool_;
  const std::vector<Tensor>&k_, &v_;
  int64_t h_q_, max_pages_;
  prt_attention config_;
  Buffer memory_;
  Views at_;
  std::vector<int32_t> copy_from_, copy_to_, from_, to_;
  double cluster_seconds_ = 0;
  int64_t n_clustered_ = 0;  // rows
};

}  // namespace prt
