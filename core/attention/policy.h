// Which rows of the KV cache a decode step attends to. A policy keeps what it has to know per page or per sequence, and takes the place
// of attention_decode for the rows that it wants; prompts are always dense. CONTRIBUTING.md says how to add one.
#pragma once
#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "attention/kept_choices.h"
#include "attention/sparse.h"
#include "base/arena.h"
#include "kv/page_pool.h"

namespace prt {

// What a policy works on. The pages and the pool outlive it.
struct PolicyContext {
  Backend backend;
  PagePool& pool;
  const std::vector<Tensor>&k, &v;  // the pages of every layer
  int64_t h_q, max_context;
  const std::vector<float>& inv_freq;  // [d_head / 2] radians per position, of rope
};

// What a step tells a policy about its rows, beside their page tables.
struct PolicyRows {
  Tensor closed;  // [n_entry][2] i32: Policy::closed_pages
  Tensor state;   // [n_entry] i32: Policy::state
};

class Policy {
 public:
  Policy(const PolicyContext& context, const prt_attention& config);
  virtual ~Policy() = default;
  Policy(const Policy&) = delete;
  Policy& operator=(const Policy&) = delete;

  // Goes on with other values for the same sequences, if it can: what it keeps may be of use. Clears the counters.
  virtual bool configure(const prt_attention&) { return false; }
  virtual bool usable() const { return true; }  // false after a configure() that failed half way
  virtual void leave() {}                       // another policy takes over: rows and pages are to be as if this one had never been
  bool wants(int64_t kv_len) const { return kv_len >= config_.min_context; }  // a decode row that sees so many keys

  // Before a step. These sequences are about to be decoded; may change rows and pages of theirs.
  virtual void prepare(const int64_t*, int64_t) {}
  // First and end of the sequence's pages that the policy keeps in an order of its own: an input of the step, like its page table.
  virtual void closed_pages(int64_t, int32_t out[2]) const { out[0] = out[1] = 0; }
  // The number under which the policy remembers the sequence from step to step, another input. Makes one if there is none.
  int32_t state(int64_t seq) { return kept_ ? kept_->state(seq) : 0; }
  int64_t n_state() const { return kept_ ? kept_->n_state() : 0; }  // recorded steps hold until it changes

  // In a step: the rows that the policy attends for. rows: of all entries.
  void decode(int64_t layer, const Attention& a, const PolicyRows& rows);
  // Whether observe() wants to be called for the last row of a prompt, and for a decoded row that is still dense.
  virtual bool observes() const { return false; }
  virtual void observe(int64_t, const Attention&, const PolicyRows&) {}

  // What happens to sequences.
  virtual void truncate(int64_t seq, int64_t n_token) {  // before the pool does
    if (n_token >= 0 && n_token < pool_.at(seq).length) forget(seq);
  }
  void forget(int64_t seq) {  // what it chose is void: the rows that it saw are gone
    if (kept_) kept_->forget(seq);
  }
  void fork(int64_t from, int64_t to) {
    if (kept_) kept_->fork(from, to);
  }
  void free(int64_t seq) {
    if (kept_) kept_->free(seq);
  }

  AttentionCounters counters(int64_t layer, int64_t kv_head) const;  // -1: all
  virtual void add_stats(prt_session_stats& stats) const { stats.index_bytes = counter_memory_.bytes(); }

 protected:
  virtual void attend(int64_t layer, const Attention& a, const PolicyRows& rows) = 0;  // entries_at_once() of them, or fewer
  int64_t entries_at_once() const { return backend_.cuda ? 16 : 8; }                     // bounds the working memory
  void clear_counters();
  Buffer take_memory(int64_t bytes, const char* what) const;  // where the operations read and write
  int64_t memory_free() const;
  // Numbers for an operation between steps: where they are on the CPU, copied into `room` on a GPU.
  Tensor send(const Tensor& room, const void* numbers, int64_t n) const;
  Tensor counters_of(int64_t layer) const { return make_tensor(counters_.row<int64_t>(layer), DType::i64, h_kv(), kAttentionCounters); }

  int64_t n_layer() const { return static_cast<int64_t>(k_.size()); }
  int64_t n_page() const { return k_[0].shape[0]; }
  int64_t h_kv() const { return k_[0].shape[1]; }
  int64_t d_head() const { return k_[0].shape[3]; }

  Backend backend_;
  PagePool& pool_;
  const std::vector<Tensor>&k_, &v_;
  int64_t h_q_, max_pages_;
  prt_attention config_;
  std::optional<KeptChoices> kept_;  // of a policy that chooses for more than one step

 private:
  Buffer counter_memory_;
  Tensor counters_;  // [n_layer][h_kv][kAttentionCounters] i64
};

}  // namespace prt
