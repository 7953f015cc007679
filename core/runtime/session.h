// A page pool, the working memory of one step, and the step itself.
#pragma once
#include <chrono>
#include <memory>
#include <mutex>
#include <vector>

#include "kv/page_pool.h"
#include "model/forward.h"
#include "runtime/sampler.h"

namespace prt {

struct Model {
  explicit Model(const ModelConfig& c) : config(c), weights(c) {}
  ModelConfig config;
  Weights weights;
  bool finalized = false;
};

class Session {
 public:
  Session(std::shared_ptr<const Model> model, const prt_session_config& config);

  void step(const prt_batch& batch);
  prt_session_stats stats() const;

  PagePool pool;
  std::mutex mutex;  // one call at a time; taken in api.cc

 private:
  static constexpr int64_t kLogitRows = 64;  // rows of logits held at once: 64 x 128K x 4 bytes = 33 MB

  // Where the rows of a chunk come from: n consecutive tokens of batch entry `entry`, starting at its token `offset`.
  struct Piece {
    int32_t entry, offset, n;
  };
  struct Output {
    int64_t row, batch_row;
    int32_t sample_entry;
  };  // sample_entry -1: not sampled

  void check_batch(const prt_batch& batch);
  void copy_pages(const Growth& growth);
  Rows fill_rows(const prt_batch& batch, std::vector<Piece>& pieces);
  void run_outputs(const prt_batch& batch, const std::vector<Output>& outputs, const std::vector<int64_t>& logits_row);
  int64_t layout(Arena& arena);
  bool keep_going();

  std::shared_ptr<const Model> model_;
  prt_session_config config_;
  RopeTable rope_;
  ThreadPool threads_;
  Isa isa_;
  Backend backend_;
  int64_t max_pages_;  // of one sequence
  HostBuffer kv_buffer_, workspace_;
  KvCache kv_;
  Activations act_;
  Tensor tokens_, cos_sin_, slots_, q_begin_, kv_len_, page_table_, decode_q_begin_;
  Tensor out_x_, out_h_, logits_, out_targets_, out_logprobs_, out_tokens_, sample_scratch_;
  // Of the batch in hand; members so that a step allocates nothing once they have grown.
  std::vector<int64_t> seen_;
  std::vector<int64_t> entry_begin_;  // [n_seq + 1]
  std::vector<int64_t> logits_row_;   // [n_tok] where a row's logits go, if they are wanted
  std::vector<Piece> pieces_;
  std::vector<Output> outputs_;
  std::vector<SampleRow> sample_rows_;
  std::vector<int32_t> top_ids_;
  std::vector<float> top_logprobs_;
  Growth growth_;
  std::chrono::steady_clock::time_point last_poll_;
  prt_session_stats counters_ = PRT_SESSION_STATS_INIT;
};

}  // namespace prt
