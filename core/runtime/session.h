// A page pool, the working memory of one step, and the step itself.
#pragma once
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "attention/registry.h"
#include "attention/tactic.h"
#include "cuda/device.h"
#include "kv/page_pool.h"
#include "model/forward.h"
#include "runtime/sampler.h"

namespace prt {

struct Model {
  // device: Weights::kHost, or the index of a CUDA device
  Model(const ModelConfig& c, int32_t device_index) : config(c), device(device_index), weights(c, device_index) {}
  ModelConfig config;
  int32_t device;
  Weights weights;
  bool finalized = false;
};

class Session {
 public:
  Session(std::shared_ptr<const Model> model, const prt_session_config& config);

  void step(const prt_batch& batch);
  void set_attention(const prt_attention& attention);
  int64_t fork(int64_t seq);
  void truncate(int64_t seq, int64_t n_token);
  void free(int64_t seq);
  // See prt_sequence_export. `write` and `read` end either by an exception.
  void export_sequence(int64_t seq, const std::function<void(const void*, int64_t)>& write);
  int64_t import_sequence(const std::function<void(void*, int64_t)>& read);
  AttentionCounters attention_counters(int64_t layer, int64_t kv_head) const;
  prt_session_stats stats() const;

  PagePool pool;
  std::mutex mutex;  // one call at a time; taken in api.cc

 private:
  static constexpr int64_t kLogitRows = 64;      // rows of logits held at once: 64 x 128K x 4 bytes = 33 MB
  static constexpr int64_t kCudaEntries = 256;   // most entries of a chunk on a GPU: a row of the page table is max_context / 16 bytes
  static constexpr int64_t kGraphRows = 64;      // decode steps of up to this many sequences are replayed as CUDA graphs
  static constexpr size_t kGraphs = 2 * kGraphRows;  // and no more of them are kept

  // Where the rows of a chunk come from: n consecutive tokens of batch entry `entry`, starting at its token `offset`.
  struct Piece {
    int32_t entry, offset, n;
    bool sparse;
  };
  struct Output {
    int64_t row, batch_row;
    int32_t sample_entry;
  };  // sample_entry -1: not sampled

  // What the host tells the operations about a chunk. The CPU reads it where the host writes it; a GPU has a copy of the same layout.
  struct Inputs {
    Tensor out_rows, out_targets;  // [kLogitRows] i32: rows of act_.x that logits are wanted of, tokens to score after them
    Tensor sample_rows;            // [kLogitRows] SampleRow, as bytes
    Tensor tokens, positions, slots, q_begin, decode_q_begin, kv_len;
    Tensor closed;                 // [n_entry][2]: of the sparse entries, what the policy says of their pages
    Tensor state;                  // [n_entry]: what it calls them; then, of the entries in Rows::last
    Tensor page_table;             // [n_entry][max_pages]
    Tensor lists;                  // on a GPU: the lists that the sample rows point to
    int64_t head_bytes = 0, bytes = 0;  // before page_table; in all
    void lay_out(Arena arena, int64_t n_tok, int64_t n_entry, int64_t max_pages, int64_t list_bytes);
  };
  // What comes back for a block of rows.
  struct Results {
    Tensor tokens;                    // [kLogitRows] i32
    Tensor logprobs, target_logprobs;  // [kLogitRows] f32
    int64_t bytes = 0;
    void lay_out(Arena arena);
  };
  struct Graph {
    int64_t n_use = 0;
    CudaGraph graph;
    bool recorded = false;
  };

  bool on_cuda() const { return cuda_ != nullptr; }
  std::optional<DeviceScope> device_scope() const;
  int64_t max_entries() const;
  int64_t list_bytes() const;
  int64_t layout(Arena& arena);
  void take_memory();
  void check_batch(const prt_batch& batch);
  void copy_pages(const Growth& growth);
  void cut_chunk(const prt_batch& batch, int32_t& entry, int32_t& offset);
  Rows fill_rows(const prt_batch& batch);
  void find_outputs(const prt_batch& batch);
  void stage_outputs(const prt_batch& batch, size_t at);
  int64_t fill_samplers(const prt_batch& batch, const Output* out, int64_t begin, int64_t end);
  void send_inputs(const Rows& rows);
  void send_outputs();
  bool sparse_row(const prt_batch& batch, int32_t entry) const;
  bool observed(const prt_batch& batch, const Piece& piece) const;
  void prepare_policy(const prt_batch& batch);
  void run_forward(const Rows& rows);
  void run_outputs(const prt_batch& batch);
  void drop_policy_graphs();
  void take_top(int64_t n_top);
  void run_chunks(const prt_batch& batch, int64_t n_tok);
  bool keep_going();
  void move_pages(bool to_host, const Tensor& pool_pages, const int32_t* pages, int64_t n, char* host) const;
  Buffer transfer_buffer(int64_t bytes) const;

  std::shared_ptr<const Model> model_;
  prt_session_config config_;
  RopeTable rope_table_;
  ThreadPool threads_;
  Isa isa_;
  std::unique_ptr<CudaContext> cuda_;  // on a GPU
  Backend backend_;
  int64_t max_pages_;  // of one sequence
  Buffer kv_buffer_, workspace_, pinned_;
  KvCache kv_;
  std::unique_ptr<Policy> last_policy_;  // that was asked for; stays with full attention: it may know the order of the rows
  Tactic* tactic_ = nullptr;             // last_policy_, if it is that one
  Policy* policy_ = nullptr;             // last_policy_, or null: all rows are dense
  Rope rope_;
  Activations act_;
  Tensor out_x_, sample_scratch_;
  Inputs in_, seen_by_ops_;        // the host's view and the operations'; the same memory on the CPU
  Results out_, written_by_ops_;
  Inputs slots_[2];                // on a GPU in_ alternates between two, so that the next chunk is written while one is on its way
  CudaEvent sent_[2];
  int slot_ = 0;
  int64_t lists_used_ = 0;               // bytes
  int64_t n_sample_ = 0, samplers_end_ = 0;  // of the block of outputs in hand: rows to sample; rows whose lists have been sent
  Buffer top_buffer_;
  std::map<std::pair<int64_t, int64_t>, Graph> graphs_;  // by number of dense and of sparse decode rows
  int64_t n_state_ = 0;  // Policy::n_state() that those with sparse rows were recorded for
  // Of the batch in hand; members so that a step allocates nothing once they have grown.
  std::vector<int64_t> seen_;
  std::vector<int64_t> entry_begin_;  // [n_seq + 1]
  std::vector<int64_t> logits_row_;   // [n_tok] where a row's logits go, if they are wanted
  std::vector<Piece> pieces_;
  std::vector<Output> outputs_;
  Tensor top_ids_, top_logprobs_;
  std::vector<int32_t> top_ids_host_;
  std::vector<float> top_logprobs_host_;
  std::vector<int64_t> sparse_;  // sequences whose decode rows the policy attends for
  Growth growth_;
  std::chrono::steady_clock::time_point last_poll_;
  prt_session_stats counters_ = PRT_SESSION_STATS_INIT;
};

}  // namespace prt
