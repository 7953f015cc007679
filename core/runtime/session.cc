#include "runtime/session.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "base/log.h"
#include "ops/cuda_table.h"

namespace prt {

namespace {
// Waits for what was queued, whatever became of it.
void settle(const CudaStream& s) {
  try {
    synchronize(s);
  } catch (const Error&) {  // the error that brought us here is the one to report
  }
}

int64_t page_bytes(const ModelConfig& c) { return 2 * int64_t{c.n_layer} * c.kv_size() * kPageTokens * dtype_size(c.weight_dtype()); }

prt_session_config complete(prt_session_config s, const Model& m) {
  const ModelConfig& model = m.config;
  const auto in_range = [](const char* name, int64_t value, int64_t hi) {
    check(value >= 0 && value <= hi, "session: ", name, " is ", value, ", expected 0 (default) or 1..", hi);
  };
  in_range("max_context", s.max_context, 1 << 24);
  in_range("n_page", s.n_page, 1 << 24);
  in_range("max_batch_tokens", s.max_batch_tokens, 1 << 16);
  in_range("n_threads", s.n_threads, 1024);
  if (s.max_context == 0) s.max_context = model.max_position;
  if (s.n_page == 0) s.n_page = static_cast<int32_t>(pages_for(s.max_context));
  // On a GPU 1024 rows fill every product of an 8B model (docs/kernels/linear_gemm_cuda.md) with half the working memory of 2048.
  if (s.max_batch_tokens == 0) s.max_batch_tokens = m.device == Weights::kHost ? 512 : 1024;
  if (m.device != Weights::kHost) s.n_threads = 1;
  if (s.n_threads == 0) s.n_threads = usable_cores();
  return s;
}

}  // namespace

Session::Session(std::shared_ptr<const Model> model, const prt_session_config& config)
    : pool(complete(config, *model).n_page, complete(config, *model).max_context),
      model_(std::move(model)),
      config_(complete(config, *model_)),
      rope_table_(make_rope_table(model_->config, config_.max_context)),
      threads_(config_.n_threads),
      isa_(isa_at_most(config.cpu_isa)),
      cuda_(model_->device == Weights::kHost ? nullptr : std::make_unique<CudaContext>(model_->device)),
      backend_(cuda_ ? cuda_backend(cuda_->stream()) : cpu_backend(threads_, isa_)),
      max_pages_(pages_for(config_.max_context)) {
  config_.n_threads = threads_.size();  // the system may have refused some
  config_.cpu_isa = nullptr;            // the caller's string need not outlive this call
  const auto scope = device_scope();
  take_memory();
  if (log_wanted(PRT_LOG_INFO))
    log_write(PRT_LOG_INFO,
              text("session: ", on_cuda() ? text("cuda:", model_->device) : text(threads_.size(), " threads, ", isa_name(isa_)),
                   ", max_context ", config_.max_context, ", ", config_.n_page, " KV pages (", kv_buffer_.bytes() >> 20,
                   " MiB), workspace ", workspace_.bytes() >> 20, " MiB"));
}

int64_t Session::max_entries() const {
  const int64_t n = config_.max_batch_tokens;
  return on_cuda() ? std::min(n, kCudaEntries) : n;
}

// Room for the penalties and biases of one row at least: (SeenToken + id + value) for every token there is.
int64_t Session::list_bytes() const { return on_cuda() ? std::max<int64_t>(int64_t{1} << 20, 16 * int64_t{model_->config.n_vocab}) : 0; }

void Session::Inputs::lay_out(Arena arena, int64_t n_tok, int64_t n_entry, int64_t max_pages, int64_t list_bytes) {
  out_rows = arena.take(DType::i32, kLogitRows);
  out_targets = arena.take(DType::i32, kLogitRows);
  sample_rows = arena.take(DType::i32, kLogitRows, sizeof(SampleRow) / 4);
  tokens = arena.take(DType::i32, n_tok);
  positions = arena.take(DType::i32, n_tok);
  slots = arena.take(DType::i32, n_tok);
  q_begin = arena.take(DType::i32, n_entry + 1);
  decode_q_begin = arena.take(DType::i32, n_entry + 1);
  kv_len = arena.take(DType::i32, n_entry);
  closed = arena.take(DType::i32, n_entry, 2);
  state = arena.take(DType::i32, n_entry);
  head_bytes = arena.used();
  page_table = arena.take(DType::i32, n_entry, max_pages);
  lists = arena.take(DType::i32, list_bytes / 4);
  bytes = arena.used();
}

void Session::Results::lay_out(Arena arena) {
  tokens = arena.take(DType::i32, kLogitRows);
  logprobs = arena.take(DType::f32, kLogitRows);
  target_logprobs = arena.take(DType::f32, kLogitRows);
  bytes = arena.used();
}

// The operations' working memory: sizes first (arena without a base), then views.
int64_t Session::layout(Arena& arena) {
  const ModelConfig& c = model_->config;
  const int64_t n = config_.max_batch_tokens;
  act_ = Activations::take(arena, backend_, c, n, max_entries(), kLogitRows, config_.max_context);
  rope_ = {arena.take(DType::f32, c.d_head / 2), rope_table_.attention_factor};
  out_x_ = arena.take(DType::f32, kLogitRows, c.d_model);
  sample_scratch_ = arena.take(DType::f32, sample_scratch_bytes(backend_, kLogitRows, c.n_vocab) / 4);
  seen_by_ops_.lay_out(arena.here(), n, max_entries(), max_pages_, list_bytes());
  arena.take(DType::i32, seen_by_ops_.bytes / 4);
  written_by_ops_.lay_out(arena.here());
  arena.take(DType::i32, written_by_ops_.bytes / 4);
  return arena.used();
}

void Session::take_memory() {
  const ModelConfig& c = model_->config;
  Arena measure;
  const int64_t workspace = layout(measure), page = page_bytes(c), kv = page * config_.n_page;
  const int64_t free = on_cuda() ? device_memory_free(model_->device) : host_memory_free();
  if (kv > free - workspace) {
    const int64_t fits = std::max<int64_t>(0, (free - workspace) / page) * kPageTokens;
    fail(PRT_OUT_OF_MEMORY, "a KV cache of ", config_.n_page, " pages (", int64_t{config_.n_page} * kPageTokens, " tokens) needs ",
         kv >> 20, " MiB and the workspace ", workspace >> 20, " MiB; ", free >> 20, " MiB are free",
         on_cuda() ? text(" on cuda:", model_->device) : "", ", which fits ", fits, " tokens");
  }
  if (on_cuda()) {
    kv_buffer_ = device_buffer(model_->device, kv, "the KV cache");
    workspace_ = device_buffer(model_->device, workspace, "the workspace");
  } else {
    kv_buffer_ = host_buffer(kv, "the KV cache", false);
    workspace_ = host_buffer(workspace, "the workspace", false);
  }
  Arena arena(workspace_.data());
  layout(arena);
  Arena pages(kv_buffer_.data());
  for (int32_t i = 0; i < c.n_layer; ++i) {
    kv_.k.push_back(pages.take(c.weight_dtype(), config_.n_page, c.h_kv, kPageTokens, c.d_head));
    kv_.v.push_back(pages.take(c.weight_dtype(), config_.n_page, c.h_kv, kPageTokens, c.d_head));
  }
  in_ = seen_by_ops_;
  out_ = written_by_ops_;
  const auto half_bytes = static_cast<int64_t>(rope_table_.inv_freq.size() * sizeof(float));
  if (!on_cuda()) {
    std::memcpy(rope_.inv_freq.data, rope_table_.inv_freq.data(), static_cast<size_t>(half_bytes));
    return;
  }
  pinned_ = pinned_buffer(model_->device, 2 * in_.bytes + out_.bytes, "the inputs of a step");
  for (int i = 0; i < 2; ++i)
    slots_[i].lay_out(Arena(pinned_.data() + i * in_.bytes), config_.max_batch_tokens, max_entries(), max_pages_, list_bytes());
  out_.lay_out(Arena(pinned_.data() + 2 * in_.bytes));
  in_ = slots_[0];
  copy_to_device(cuda_->stream(), rope_.inv_freq.data, rope_table_.inv_freq.data(), half_bytes);
  synchronize(cuda_->stream());
}

void Session::check_batch(const prt_batch& b) {
  const int32_t n_vocab = model_->config.n_vocab;
  check(b.n_seq > 0 && b.n_seq <= 1 << 20, "batch: n_seq is ", b.n_seq, ", expected 1 or more");
  check(b.seq && b.n_token && b.tokens, "batch: seq, n_token or tokens is NULL");
  check(!b.logits_mask == !b.logits, "batch: logits_mask and logits go together, one of them is NULL");
  check(!b.targets == !b.target_logprobs, "batch: targets and target_logprobs go together, one of them is NULL");
  check(!b.samplers || b.sampled, "batch: samplers are given, sampled is NULL");
  check(b.n_top >= 0 && b.n_top <= n_vocab, "batch: n_top is ", b.n_top, ", expected 0..", n_vocab);
  check(b.n_top == 0 || (b.top_ids && b.top_logprobs), "batch: n_top is ", b.n_top, ", top_ids or top_logprobs is NULL");
  int64_t n_tok = 0;
  for (int32_t s = 0; s < b.n_seq; ++s) {
    check(b.n_token[s] >= 1 && b.n_token[s] <= config_.max_context, "batch: n_token of entry ", s, " is ", b.n_token[s], ", expected 1..",
          config_.max_context, " (max_context)");
    if (b.samplers && b.samplers[s]) {
      const auto* sampler = reinterpret_cast<const Sampler*>(b.samplers[s]);
      check(sampler->n_vocab() == n_vocab, "batch: the sampler of entry ", s, " was made for a vocabulary of ", sampler->n_vocab(),
            ", the model has ", n_vocab);
    }
    for (int32_t i = 0; i < b.n_token[s]; ++i) {
      const int32_t id = b.tokens[n_tok + i];
      check(id >= 0 && id < n_vocab, "batch: token ", id, " at ", i, " of entry ", s, " is outside the vocabulary of ", n_vocab);
      const int32_t target = b.targets ? b.targets[n_tok + i] : -1;
      check(target >= -1 && target < n_vocab, "batch: target ", target, " at ", i, " of entry ", s, " is outside the vocabulary of ",
            n_vocab);
    }
    n_tok += b.n_token[s];
  }
  for (const bool samplers : {false, true}) {
    if (samplers && !b.samplers) continue;
    seen_.clear();
    for (int32_t s = 0; s < b.n_seq; ++s) {
      const int64_t key = samplers ? static_cast<int64_t>(reinterpret_cast<intptr_t>(b.samplers[s])) : b.seq[s];
      if (!samplers || key) seen_.push_back(key);
    }
    std::sort(seen_.begin(), seen_.end());
    const auto twice = std::adjacent_find(seen_.begin(), seen_.end());
    if (twice == seen_.end()) continue;
    if (samplers) fail(PRT_INVALID_ARGUMENT, "batch: two entries use the same sampler");
    fail(PRT_INVALID_ARGUMENT, "batch: sequence ", *twice, " appears twice");
  }
}

void Session::copy_pages(const Growth& growth) {
  const auto n = static_cast<int64_t>(growth.copy_from.size());
  const int64_t most = on_cuda() ? kLogitRows : n;
  for (int64_t at = 0; at < n; at += most) {
    const int64_t m = std::min(most, n - at);
    Tensor src = make_tensor(const_cast<int32_t*>(growth.copy_from.data()) + at, DType::i32, m);
    Tensor dst = make_tensor(const_cast<int32_t*>(growth.copy_to.data()) + at, DType::i32, m);
    if (on_cuda()) {  // through the output rows' place, which is not in use yet
      copy_to_device(cuda_->stream(), seen_by_ops_.out_rows.data, src.data, src.bytes());
      copy_to_device(cuda_->stream(), seen_by_ops_.out_targets.data, dst.data, dst.bytes());
      src = seen_by_ops_.out_rows.rows(0, m);
      dst = seen_by_ops_.out_targets.rows(0, m);
    }
    for (size_t i = 0; i < kv_.k.size(); ++i) page_copy(backend_, {kv_.k[i], kv_.v[i], src, dst});
  }
}

// Takes the next pieces of the batch, from token `offset` of `entry` on, up to one chunk.
void Session::cut_chunk(const prt_batch& b, int32_t& entry, int32_t& offset) {
  pieces_.clear();
  for (int64_t room = config_.max_batch_tokens; room > 0 && entry < b.n_seq && static_cast<int64_t>(pieces_.size()) < max_entries();) {
    const auto n = static_cast<int32_t>(std::min<int64_t>(room, b.n_token[entry] - offset));
    pieces_.push_back({entry, offset, n, sparse_row(b, entry)});
    room -= n;
    offset += n;
    if (offset == b.n_token[entry]) {
      ++entry;
      offset = 0;
    }
  }
  const auto rank = [](const Piece& p) { return p.sparse ? 2 : p.n > 1 ? 0 : 1; };
  std::stable_sort(pieces_.begin(), pieces_.end(), [&](const Piece& x, const Piece& y) { return rank(x) < rank(y); });
}

// Whether the entry is one decoded token that the policy attends for. The last token of a prompt that was cut is not.
bool Session::sparse_row(const prt_batch& b, int32_t entry) const {
  return policy_ && b.n_token[entry] == 1 && policy_->wants(pool.at(b.seq[entry]).length + 1);
}

// Whether the piece ends with a dense row after which the sequence may be decoded sparsely, and the policy wants to see it.
bool Session::observed(const prt_batch& b, const Piece& p) const {
  if (!policy_ || !policy_->observes() || p.sparse || p.offset + p.n != b.n_token[p.entry]) return false;
  return policy_->wants(pool.at(b.seq[p.entry]).length + b.n_token[p.entry] + 1);
}

void Session::prepare_policy(const prt_batch& b) {
  if (!policy_) return;
  sparse_.clear();
  for (int32_t s = 0; s < b.n_seq; ++s)
    if (sparse_row(b, s)) sparse_.push_back(b.seq[s]);
  policy_->prepare(sparse_.data(), static_cast<int64_t>(sparse_.size()));
}

// Writes the index tensors of the chunk: pieces with several rows come first.
Rows Session::fill_rows(const prt_batch& b) {
  if (on_cuda()) {
    slot_ ^= 1;
    sent_[slot_].wait();
    in_ = slots_[slot_];
  }
  Rows rows;
  in_.decode_q_begin.as<int32_t>()[0] = 0, in_.decode_q_begin.as<int32_t>()[1] = 1;  // Rows::dense wants them without decode rows, too
  int64_t row = 0, entry = 0;
  for (const Piece& p : pieces_) {
    const Sequence& s = pool.at(b.seq[p.entry]);
    const bool decode = p.n == 1;
    Rows::Part& part = p.sparse ? rows.sparse : decode ? rows.decode : rows.prefill;
    int32_t* begin = (decode ? in_.decode_q_begin : in_.q_begin).as<int32_t>() + part.n_entry + (p.sparse ? rows.decode.n_entry : 0);
    begin[0] = static_cast<int32_t>(decode ? row - rows.n_prefill_tok : row);
    begin[1] = begin[0] + p.n;
    if (p.sparse) {
      policy_->closed_pages(b.seq[p.entry], in_.closed.row<int32_t>(part.n_entry));
      in_.state.as<int32_t>()[part.n_entry] = policy_->state(b.seq[p.entry]);
    }
    in_.kv_len.as<int32_t>()[entry] = static_cast<int32_t>(s.length + p.offset + p.n);
    std::copy_n(s.pages.data(), pages_for(s.length + p.offset + p.n), in_.page_table.row<int32_t>(entry));
    for (int32_t i = 0; i < p.n; ++i, ++row) {
      const int64_t position = s.length + p.offset + i;
      in_.tokens.as<int32_t>()[row] = b.tokens[entry_begin_[static_cast<size_t>(p.entry)] + p.offset + i];
      in_.positions.as<int32_t>()[row] = static_cast<int32_t>(position);
      in_.slots.as<int32_t>()[row] =
          static_cast<int32_t>(s.pages[static_cast<size_t>(position / kPageTokens)] * kPageTokens + position % kPageTokens);
    }
    if (!decode) rows.n_prefill_tok = row;
    if (observed(b, p)) rows.last.push_back({row - 1, entry});
    ++part.n_entry;
    ++entry;
  }
  for (size_t i = 0; i < rows.last.size(); ++i)
    in_.state.as<int32_t>()[rows.sparse.n_entry + static_cast<int64_t>(i)] =
        policy_->state(b.seq[pieces_[static_cast<size_t>(rows.last[i].entry)].entry]);
  const Inputs& in = seen_by_ops_;
  rows.n_tok = row;
  rows.tokens = in.tokens.rows(0, row);
  rows.positions = in.positions.rows(0, row);
  rows.slots = in.slots.rows(0, row);
  rows.prefill.q_begin = in.q_begin.rows(0, rows.prefill.n_entry + 1);
  rows.prefill.kv_len = in.kv_len.rows(0, rows.prefill.n_entry);
  rows.prefill.page_table = in.page_table.rows(0, rows.prefill.n_entry);
  rows.decode.q_begin = in.decode_q_begin.rows(0, rows.decode.n_entry + 1);
  rows.decode.kv_len = in.kv_len.rows(rows.prefill.n_entry, rows.decode.n_entry);
  rows.decode.page_table = in.page_table.rows(rows.prefill.n_entry, rows.decode.n_entry);
  // Entries of one row each: the same list of beginnings serves both kinds.
  const int64_t dense = rows.prefill.n_entry + rows.decode.n_entry;
  rows.sparse.q_begin = in.decode_q_begin.rows(0, rows.sparse.n_entry + 1);
  rows.sparse.kv_len = in.kv_len.rows(dense, rows.sparse.n_entry);
  rows.sparse.page_table = in.page_table.rows(dense, rows.sparse.n_entry);
  rows.policy = {in.closed.rows(0, rows.sparse.n_entry), in.state.rows(0, rows.sparse.n_entry)};
  rows.dense = {dense, in.decode_q_begin.rows(0, 2), in.kv_len.rows(0, dense), in.page_table.rows(0, dense)};
  rows.last_state = in.state.rows(rows.sparse.n_entry, static_cast<int64_t>(rows.last.size()));
  return rows;
}

// The rows of the chunk that somebody wants something of; those to be sampled first.
void Session::find_outputs(const prt_batch& b) {
  outputs_.clear();
  int64_t row = 0;
  for (const Piece& p : pieces_)
    for (int32_t i = 0; i < p.n; ++i, ++row) {
      const int64_t batch_row = entry_begin_[static_cast<size_t>(p.entry)] + p.offset + i;
      const bool last = p.offset + i == b.n_token[p.entry] - 1;
      const int32_t sampled = last && b.samplers && b.samplers[p.entry] ? p.entry : -1;
      if (sampled >= 0 || (b.logits_mask && b.logits_mask[batch_row]) || (b.targets && b.targets[batch_row] >= 0))
        outputs_.push_back({row, batch_row, sampled});
    }
  std::stable_sort(outputs_.begin(), outputs_.end(),
                   [](const Output& x, const Output& y) { return (x.sample_entry >= 0) > (y.sample_entry >= 0); });
}

// Writes and sends what the operations need to know of the block of outputs that begins at `at`.
void Session::stage_outputs(const prt_batch& b, size_t at) {
  const auto n = static_cast<int64_t>(std::min(outputs_.size() - at, static_cast<size_t>(kLogitRows)));
  const Output* out = outputs_.data() + at;
  n_sample_ = 0;
  for (int64_t i = 0; i < n; ++i) {
    in_.out_rows.as<int32_t>()[i] = static_cast<int32_t>(out[i].row);
    in_.out_targets.as<int32_t>()[i] = b.targets ? b.targets[out[i].batch_row] : -1;
    if (out[i].sample_entry >= 0) n_sample_ = i + 1;
  }
  samplers_end_ = fill_samplers(b, out, 0, n_sample_);
  send_outputs();
}

// Writes the samplers' parameters of rows [begin, end) and, for a GPU, the lists they point to, as far as these fit. -> first row left out
int64_t Session::fill_samplers(const prt_batch& b, const Output* out, int64_t begin, int64_t end) {
  auto* rows = reinterpret_cast<SampleRow*>(in_.sample_rows.data);
  lists_used_ = 0;
  for (int64_t i = begin; i < end; ++i) {
    SampleRow row = reinterpret_cast<const Sampler*>(b.samplers[out[i].sample_entry])->row();
    if (on_cuda()) {
      const int64_t need = row.n_seen * static_cast<int64_t>(sizeof(SeenToken)) + row.n_bias * int64_t{8};
      if (lists_used_ + need > in_.lists.bytes()) return i;
      const auto put = [&](const auto*& list, int64_t n) {
        const int64_t bytes = n * static_cast<int64_t>(sizeof *list);
        if (n > 0) std::memcpy(in_.lists.as<char>() + lists_used_, list, static_cast<size_t>(bytes));
        list = reinterpret_cast<std::decay_t<decltype(list)>>(seen_by_ops_.lists.as<char>() + lists_used_);
        lists_used_ += bytes;
      };
      put(row.seen, row.n_seen);
      put(row.bias_ids, row.n_bias);
      put(row.bias_values, row.n_bias);
    }
    rows[i] = row;
  }
  return end;
}

// Everything that the chunk needs goes over before its first launch: one copy, a second for the page table, none in between.
void Session::send_inputs(const Rows& rows) {
  if (!on_cuda()) return;
  const CudaStream& s = cuda_->stream();
  copy_to_device(s, seen_by_ops_.tokens.data, in_.tokens.data, in_.head_bytes - (in_.tokens.as<char>() - in_.out_rows.as<char>()));
  int64_t used = 1;
  const int64_t n_entry = rows.prefill.n_entry + rows.decode.n_entry + rows.sparse.n_entry;
  for (int64_t e = 0; e < n_entry; ++e) used = std::max(used, pages_for(in_.kv_len.as<int32_t>()[e]));
  copy_rows_to_device(s, seen_by_ops_.page_table.data, in_.page_table.data, used * 4, max_pages_ * 4, n_entry);
}

void Session::send_outputs() {
  if (!on_cuda()) return;
  const CudaStream& s = cuda_->stream();
  copy_to_device(s, seen_by_ops_.out_rows.data, in_.out_rows.data, in_.tokens.as<char>() - in_.out_rows.as<char>());
  if (lists_used_ > 0) copy_to_device(s, seen_by_ops_.lists.data, in_.lists.data, lists_used_);
}

// A decode step is several hundred launches of a few microseconds each: recorded once per number of rows and replayed. The recording holds
// for any lengths, pages and tokens, which the operations read from device memory; those with sparse rows also hold the policy's values.
void Session::run_forward(const Rows& rows) {
  const auto launch = [&](bool (*keep_going)(void*)) {
    forward(backend_, model_->config, model_->weights, rope_, kv_, rows, policy_, act_, keep_going, this);
  };
  const auto ask = [](void* self) { return static_cast<Session*>(self)->keep_going(); };
  // Rows that the policy observes come once in a sequence's life, and anywhere in the batch.
  if (!on_cuda() || rows.n_prefill_tok > 0 || rows.n_tok > kGraphRows || !rows.last.empty()) return launch(ask);
  if (policy_ && policy_->n_state() != n_state_) {  // what it keeps of the sequences has moved
    drop_policy_graphs();
    n_state_ = policy_->n_state();
  }
  if (!keep_going()) fail(PRT_ABORTED, "the step was stopped by the abort callback");
  const std::pair key{rows.decode.n_entry, rows.sparse.n_entry};
  if (graphs_.size() >= kGraphs && graphs_.find(key) == graphs_.end()) {  // batches that are partly sparse come in many sizes
    synchronize(cuda_->stream());
    graphs_.clear();
  }
  Graph& g = graphs_[key];
  if (g.n_use++ == 0) return launch(ask);  // loads the kernels, which cannot be done while recording
  if (!g.recorded) {
    CudaGraph::begin(cuda_->stream());
    try {
      launch([](void*) { return true; });
    } catch (...) {
      CudaGraph::cancel(cuda_->stream());
      throw;
    }
    g.graph.end(cuda_->stream());
    g.recorded = true;
  }
  g.graph.replay(cuda_->stream());
}

void Session::drop_policy_graphs() {
  std::erase_if(graphs_, [](const auto& g) { return g.first.second > 0; });
}

void Session::take_top(int64_t n_top) {
  const int64_t n = kLogitRows * n_top;
  if (static_cast<int64_t>(top_ids_host_.size()) < n) {
    top_ids_host_.resize(static_cast<size_t>(n));
    top_logprobs_host_.resize(static_cast<size_t>(n));
    if (on_cuda()) top_buffer_ = device_buffer(model_->device, 8 * n, "the most likely tokens");
  }
  char* base = on_cuda() ? top_buffer_.data() : nullptr;
  top_ids_ = make_tensor(base ? base : static_cast<void*>(top_ids_host_.data()), DType::i32, kLogitRows, n_top);
  top_logprobs_ = make_tensor(base ? base + 4 * n : static_cast<void*>(top_logprobs_host_.data()), DType::f32, kLogitRows, n_top);
}

// Logits for the outputs of the chunk, a block at a time: copied out, scored, sampled. The first block's inputs have been sent.
void Session::run_outputs(const prt_batch& b) {
  const ModelConfig& c = model_->config;
  for (size_t at = 0; at < outputs_.size(); at += kLogitRows) {
    const auto n = static_cast<int64_t>(std::min(outputs_.size() - at, static_cast<size_t>(kLogitRows)));
    const Output* out = outputs_.data() + at;
    if (at > 0) stage_outputs(b, at);
    const int64_t n_sample = n_sample_;
    bool any_target = false, in_order = true;
    for (int64_t i = 0; i < n; ++i) {
      any_target |= b.targets && b.targets[out[i].batch_row] >= 0;
      in_order &= out[i].row == out[0].row + i;
    }
    const Inputs& in = seen_by_ops_;
    Tensor x = act_.x.rows(out[0].row, n);
    if (!in_order) {
      x = out_x_.rows(0, n);
      embedding(backend_, {x, in.out_rows.rows(0, n), act_.x});
    }
    const Tensor logits = act_.logits.rows(0, n);
    output_logits(backend_, c, model_->weights, x, act_, logits);
    for (int64_t i = 0; i < n; ++i) {
      if (!b.logits_mask || !b.logits_mask[out[i].batch_row]) continue;
      float* to = b.logits + logits_row_[static_cast<size_t>(out[i].batch_row)] * c.n_vocab;
      if (on_cuda()) copy_to_host(cuda_->stream(), to, logits.row<float>(i), 4 * int64_t{c.n_vocab});
      else std::copy_n(logits.row<float>(i), c.n_vocab, to);
    }
    const Results& result = written_by_ops_;
    if (any_target) target_logprob(backend_, {result.target_logprobs.rows(0, n), logits, in.out_targets.rows(0, n)});
    if (b.n_top > 0 && n_sample > 0) take_top(b.n_top);
    for (int64_t i = 0; i < n_sample; i = samplers_end_) {
      if (i > 0) {  // the lists of these rows did not fit beside those before
        synchronize(cuda_->stream());
        samplers_end_ = fill_samplers(b, out, i, n_sample);
        send_outputs();
      }
      const int64_t m = samplers_end_ - i;
      Sample op{logits.rows(i, m), reinterpret_cast<const SampleRow*>(in.sample_rows.data) + i, result.tokens.rows(i, m), {}, {}, {},
                sample_scratch_};
      if (b.sampled_logprobs) op.logprobs = result.logprobs.rows(i, m);
      if (b.n_top > 0) {
        op.top_ids = top_ids_.rows(i, m);
        op.top_logprobs = top_logprobs_.rows(i, m);
      }
      sample(backend_, op);
    }
    if (on_cuda()) {
      const CudaStream& s = cuda_->stream();
      copy_to_host(s, out_.tokens.data, result.tokens.data, result.bytes);
      if (b.n_top > 0 && n_sample > 0) {
        copy_to_host(s, top_ids_host_.data(), top_ids_.data, 4 * n_sample * b.n_top);
        copy_to_host(s, top_logprobs_host_.data(), top_logprobs_.data, 4 * n_sample * b.n_top);
      }
      synchronize(s);
    }
    for (int64_t i = 0; i < n; ++i)
      if (b.targets && b.targets[out[i].batch_row] >= 0) b.target_logprobs[out[i].batch_row] = out_.target_logprobs.as<float>()[i];
    for (int64_t i = 0; i < n_sample; ++i) {
      const int32_t e = out[i].sample_entry;
      b.sampled[e] = out_.tokens.as<int32_t>()[i];
      if (b.sampled_logprobs) b.sampled_logprobs[e] = out_.logprobs.as<float>()[i];
      std::copy_n(top_ids_host_.data() + i * b.n_top, b.n_top, b.top_ids + int64_t{e} * b.n_top);
      std::copy_n(top_logprobs_host_.data() + i * b.n_top, b.n_top, b.top_logprobs + int64_t{e} * b.n_top);
    }
  }
}

void Session::run_chunks(const prt_batch& b, int64_t n_tok) {
  copy_pages(growth_);
  int64_t done = 0;
  for (int32_t entry = 0, offset = 0; entry < b.n_seq;) {
    cut_chunk(b, entry, offset);
    find_outputs(b);
    const Rows rows = fill_rows(b);
    if (!outputs_.empty()) stage_outputs(b, 0);
    send_inputs(rows);
    if (on_cuda()) sent_[slot_].record(cuda_->stream());
    run_forward(rows);
    run_outputs(b);
    done += rows.n_tok;
    if (config_.progress) config_.progress(config_.user, done, n_tok);
  }
  if (on_cuda()) synchronize(cuda_->stream());
}

// The callback may be slow (a Python function, 2 us and a lock), a layer may be fast: ask 50 times a second.
bool Session::keep_going() {
  if (!config_.abort) return true;
  const auto now = std::chrono::steady_clock::now();
  if (now - last_poll_ < std::chrono::milliseconds(20)) return true;
  last_poll_ = now;
  return config_.abort(config_.user) == 0;
}

std::optional<DeviceScope> Session::device_scope() const {
  if (!on_cuda()) return std::nullopt;
  return std::optional<DeviceScope>(std::in_place, model_->device);
}

void Session::step(const prt_batch& b) {
  const auto start = std::chrono::steady_clock::now();
  const auto scope = device_scope();
  check_batch(b);
  entry_begin_.assign(1, 0);
  bool is_prefill = false;
  for (int32_t s = 0; s < b.n_seq; ++s) {
    entry_begin_.push_back(entry_begin_.back() + b.n_token[s]);
    is_prefill |= b.n_token[s] > 1;
    if (b.sampled) b.sampled[s] = -1;
  }
  const int64_t n_tok = entry_begin_.back();
  logits_row_.assign(b.logits_mask ? static_cast<size_t>(n_tok) : 0, 0);
  for (size_t i = 1; i < logits_row_.size(); ++i) logits_row_[i] = logits_row_[i - 1] + (b.logits_mask[i - 1] ? 1 : 0);

  prepare_policy(b);
  pool.grow(b.n_seq, b.seq, b.n_token, growth_);
  try {
    run_chunks(b, n_tok);
  } catch (...) {
    if (on_cuda()) settle(cuda_->stream());  // nothing may be written to the caller's arrays once we have returned
    pool.rollback(growth_);
    for (int32_t i = 0; policy_ && i < b.n_seq; ++i)  // what it has seen of a prompt will not have been
      if (b.n_token[i] > 1) policy_->forget(b.seq[i]);
    throw;
  }
  pool.commit(growth_);
  for (int32_t s = 0; s < b.n_seq; ++s)
    if (b.samplers && b.samplers[s]) reinterpret_cast<Sampler*>(b.samplers[s])->drawn(b.sampled[s]);

  ++counters_.n_step;
  for (int32_t s = 0; s < b.n_seq; ++s) (b.n_token[s] > 1 ? counters_.n_prefill_token : counters_.n_decode_token) += b.n_token[s];
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  (is_prefill ? counters_.prefill_seconds : counters_.decode_seconds) += seconds;
}

void Session::set_attention(const prt_attention& attention) {
  check_attention_config(attention);
  const ModelConfig& c = model_->config;
  if (attention.policy == PRT_ATTENTION_FULL) {
    policy_ = nullptr;
    return;
  }
  const PolicyInfo& info = policy_info(attention.policy);
  if (c.sliding_window > 0)
    fail(PRT_UNSUPPORTED, "attention '", info.name, "' cannot be combined with the model's sliding window of ", c.sliding_window,
         ": use attention 'full'");
  if (on_cuda() && !info.on_cuda)
    fail(PRT_UNSUPPORTED, "attention '", info.name, "' runs on the CPU only, the model is on cuda:", model_->device,
         ": use attention 'tactic' or 'full', or device 'cpu'");
  check(attention.dense_layers <= c.n_layer, "attention: dense_layers is ", attention.dense_layers, ", the model has ", c.n_layer,
        " layers");
  const auto scope = device_scope();
  drop_policy_graphs();
  try {
    if (!last_policy_ || !last_policy_->configure(attention)) {
      std::unique_ptr<Policy> made = info.make({backend_, pool, kv_.k, kv_.v, c.h_q, config_.max_context, rope_table_.inv_freq}, attention);
      if (last_policy_) last_policy_->leave();
      last_policy_ = std::move(made);
    }
  } catch (...) {
    if (last_policy_ && !last_policy_->usable()) {  // all rows are back in their order: dense attention is what is left
      policy_ = tactic_ = nullptr;
      last_policy_.reset();
    }
    throw;
  }
  policy_ = last_policy_.get();
  tactic_ = dynamic_cast<Tactic*>(policy_);
}

int64_t Session::fork(int64_t seq) {
  const auto scope = device_scope();
  const int64_t made = pool.fork(seq);
  if (last_policy_) last_policy_->fork(seq, made);
  return made;
}

void Session::truncate(int64_t seq, int64_t n_token) {
  const auto scope = device_scope();
  if (last_policy_) last_policy_->truncate(seq, n_token);
  pool.truncate(seq, n_token);
}

void Session::free(int64_t seq) {
  pool.free(seq);
  if (last_policy_) last_policy_->free(seq);
}

AttentionCounters Session::attention_counters(int64_t layer, int64_t kv_head) const {
  const auto scope = device_scope();
  return last_policy_ ? last_policy_->counters(layer, kv_head) : AttentionCounters{};
}

prt_session_stats Session::stats() const {
  prt_session_stats s = counters_;
  s.n_page = pool.n_page();
  s.n_page_free = pool.n_free();
  s.n_page_peak = pool.n_peak();
  s.n_sequence = pool.n_sequence();
  s.n_threads = threads_.size();
  s.max_context = config_.max_context;
  s.max_batch_tokens = config_.max_batch_tokens;
  s.kv_bytes = kv_buffer_.bytes();
  s.page_bytes = page_bytes(model_->config);
  s.workspace_bytes = workspace_.bytes();
  s.n_page_copy = pool.n_copy();
  if (last_policy_) last_policy_->add_stats(s);
  return s;
}

}  // namespace prt
