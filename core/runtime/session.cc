#include "runtime/session.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "base/log.h"

namespace prt {

namespace {
int64_t pages_for(int64_t n_token) { return (n_token + kPageTokens - 1) / kPageTokens; }

int64_t page_bytes(const ModelConfig& c) { return 2 * int64_t{c.n_layer} * c.kv_size() * kPageTokens * dtype_size(c.weight_dtype()); }

prt_session_config complete(prt_session_config s, const ModelConfig& model) {
  const auto in_range = [](const char* name, int64_t value, int64_t hi) {
    check(value >= 0 && value <= hi, "session: ", name, " is ", value, ", expected 0 (default) or 1..", hi);
  };
  in_range("max_context", s.max_context, 1 << 24);
  in_range("n_page", s.n_page, 1 << 24);
  in_range("max_batch_tokens", s.max_batch_tokens, 1 << 16);
  in_range("n_threads", s.n_threads, 1024);
  if (s.max_context == 0) s.max_context = model.max_position;
  if (s.n_page == 0) s.n_page = static_cast<int32_t>(pages_for(s.max_context));
  if (s.max_batch_tokens == 0) s.max_batch_tokens = 512;
  if (s.n_threads == 0) s.n_threads = usable_cores();
  return s;
}

}  // namespace

Session::Session(std::shared_ptr<const Model> model, const prt_session_config& config)
    : pool(complete(config, model->config).n_page, complete(config, model->config).max_context),
      model_(std::move(model)),
      config_(complete(config, model_->config)),
      rope_(make_rope_table(model_->config, config_.max_context)),
      threads_(config_.n_threads),
      isa_(isa_at_most(config.cpu_isa)),
      backend_(cpu_backend(threads_, isa_)),
      max_pages_(pages_for(config_.max_context)) {
  const ModelConfig& c = model_->config;
  config_.n_threads = threads_.size();  // the system may have refused some
  config_.cpu_isa = nullptr;            // the caller's string need not outlive this call
  Arena measure;
  const int64_t workspace = layout(measure), page = page_bytes(c), kv = page * config_.n_page, free = host_memory_free();
  if (kv > free - workspace) {
    const int64_t fits = std::max<int64_t>(0, (free - workspace) / page) * kPageTokens;
    fail(PRT_OUT_OF_MEMORY, "a KV cache of ", config_.n_page, " pages (", int64_t{config_.n_page} * kPageTokens, " tokens) needs ",
         kv >> 20, " MiB and the workspace ", workspace >> 20, " MiB; ", free >> 20, " MiB are free, which fits ", fits, " tokens");
  }
  kv_buffer_ = HostBuffer(kv, "the KV cache", false);
  workspace_ = HostBuffer(workspace, "the workspace", false);
  Arena arena(workspace_.data());
  layout(arena);
  Arena pages(kv_buffer_.data());
  for (int32_t i = 0; i < c.n_layer; ++i) {
    kv_.k.push_back(pages.take(c.weight_dtype(), config_.n_page, c.h_kv, kPageTokens, c.d_head));
    kv_.v.push_back(pages.take(c.weight_dtype(), config_.n_page, c.h_kv, kPageTokens, c.d_head));
  }
  if (log_wanted(PRT_LOG_INFO))
    log_write(PRT_LOG_INFO, text("session: ", threads_.size(), " threads, ", isa_name(isa_), ", max_context ", config_.max_context, ", ",
                                 config_.n_page, " KV pages (", kv >> 20, " MiB), workspace ", workspace >> 20, " MiB"));
}

int64_t Session::layout(Arena& arena) {
  const ModelConfig& c = model_->config;
  const int64_t n = config_.max_batch_tokens;
  const int64_t attention = attention_scratch_bytes(config_.n_threads, n, config_.max_context, c.h_q, c.h_kv, c.d_head);
  act_ = Activations::take(arena, c, n, attention);
  tokens_ = arena.take(DType::i32, n);
  cos_sin_ = arena.take(DType::f32, n, 2, c.d_head / 2);
  slots_ = arena.take(DType::i32, n);
  q_begin_ = arena.take(DType::i32, n + 1);
  decode_q_begin_ = arena.take(DType::i32, n + 1);
  kv_len_ = arena.take(DType::i32, n);
  page_table_ = arena.take(DType::i32, n, max_pages_);
  out_x_ = arena.take(DType::f32, kLogitRows, c.d_model);
  out_h_ = arena.take(DType::f32, kLogitRows, c.d_model);
  logits_ = arena.take(DType::f32, kLogitRows, c.n_vocab);
  out_targets_ = arena.take(DType::i32, kLogitRows);
  out_logprobs_ = arena.take(DType::f32, kLogitRows);
  out_tokens_ = arena.take(DType::i32, kLogitRows);
  sample_scratch_ = arena.take(DType::f32, config_.n_threads, sample_scratch_floats(c.n_vocab));
  return arena.used();
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
  if (n == 0) return;
  const Tensor src = make_tensor(const_cast<int32_t*>(growth.copy_from.data()), DType::i32, n);
  const Tensor dst = make_tensor(const_cast<int32_t*>(growth.copy_to.data()), DType::i32, n);
  for (size_t i = 0; i < kv_.k.size(); ++i) page_copy(backend_, {kv_.k[i], kv_.v[i], src, dst});
}

// Puts pieces with several rows first and writes the index tensors of the chunk.
Rows Session::fill_rows(const prt_batch& b, std::vector<Piece>& pieces) {
  std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& x, const Piece& y) { return (x.n > 1) > (y.n > 1); });
  Rows rows;
  int64_t row = 0, entry = 0;
  for (const Piece& p : pieces) {
    const Sequence& s = pool.at(b.seq[p.entry]);
    const bool decode = p.n == 1;
    Rows::Part& part = decode ? rows.decode : rows.prefill;
    int32_t* begin = (decode ? decode_q_begin_ : q_begin_).as<int32_t>() + part.n_entry;
    begin[0] = static_cast<int32_t>(decode ? row - rows.n_prefill_tok : row);
    begin[1] = begin[0] + p.n;
    kv_len_.as<int32_t>()[entry] = static_cast<int32_t>(s.length + p.offset + p.n);
    std::copy_n(s.pages.data(), pages_for(s.length + p.offset + p.n), page_table_.row<int32_t>(entry));
    for (int32_t i = 0; i < p.n; ++i, ++row) {
      const int64_t position = s.length + p.offset + i;
      tokens_.as<int32_t>()[row] = b.tokens[entry_begin_[static_cast<size_t>(p.entry)] + p.offset + i];
      slots_.as<int32_t>()[row] =
          static_cast<int32_t>(s.pages[static_cast<size_t>(position / kPageTokens)] * kPageTokens + position % kPageTokens);
      rope_angles(rope_, position, cos_sin_.row<float>(row));
    }
    if (!decode) rows.n_prefill_tok = row;
    ++part.n_entry;
    ++entry;
  }
  rows.n_tok = row;
  rows.tokens = tokens_.rows(0, row);
  rows.cos_sin = cos_sin_.rows(0, row);
  rows.slots = slots_.rows(0, row);
  rows.prefill.q_begin = q_begin_.rows(0, rows.prefill.n_entry + 1);
  rows.prefill.kv_len = kv_len_.rows(0, rows.prefill.n_entry);
  rows.prefill.page_table = page_table_.rows(0, rows.prefill.n_entry);
  rows.decode.q_begin = decode_q_begin_.rows(0, rows.decode.n_entry + 1);
  rows.decode.kv_len = kv_len_.rows(rows.prefill.n_entry, rows.decode.n_entry);
  rows.decode.page_table = page_table_.rows(rows.prefill.n_entry, rows.decode.n_entry);
  return rows;
}

// Logits for the rows that somebody wants, a block at a time: copied out, scored, sampled. Sampled rows come first in `outputs`.
void Session::run_outputs(const prt_batch& b, const std::vector<Output>& outputs, const std::vector<int64_t>& logits_row) {
  const ModelConfig& c = model_->config;
  for (size_t at = 0; at < outputs.size(); at += kLogitRows) {
    const auto n = static_cast<int64_t>(std::min(outputs.size() - at, static_cast<size_t>(kLogitRows)));
    const Output* out = outputs.data() + at;
    for (int64_t i = 0; i < n; ++i) std::copy_n(act_.x.row<float>(out[i].row), c.d_model, out_x_.row<float>(i));
    const Tensor logits = logits_.rows(0, n);
    output_logits(backend_, c, model_->weights, out_x_.rows(0, n), out_h_.rows(0, n), act_.linear_scratch, logits);

    bool any_target = false;
    int64_t n_sample = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (b.logits_mask && b.logits_mask[out[i].batch_row])
        std::copy_n(logits.row<float>(i), c.n_vocab, b.logits + logits_row[static_cast<size_t>(out[i].batch_row)] * c.n_vocab);
      out_targets_.as<int32_t>()[i] = b.targets ? b.targets[out[i].batch_row] : -1;
      any_target |= out_targets_.as<int32_t>()[i] >= 0;
      if (out[i].sample_entry >= 0) n_sample = i + 1;
    }
    if (any_target) {
      target_logprob(backend_, {out_logprobs_.rows(0, n), logits, out_targets_.rows(0, n)});
      for (int64_t i = 0; i < n; ++i)
        if (out_targets_.as<int32_t>()[i] >= 0) b.target_logprobs[out[i].batch_row] = out_logprobs_.as<float>()[i];
    }
    if (n_sample == 0) continue;
    sample_rows_.clear();
    for (int64_t i = 0; i < n_sample; ++i) sample_rows_.push_back(reinterpret_cast<const Sampler*>(b.samplers[out[i].sample_entry])->row());
    top_ids_.resize(static_cast<size_t>(n_sample * b.n_top));
    top_logprobs_.resize(top_ids_.size());
    Sample op{logits.rows(0, n_sample), sample_rows_.data(), out_tokens_.rows(0, n_sample), {}, {}, {}, sample_scratch_};
    if (b.sampled_logprobs) op.logprobs = out_logprobs_.rows(0, n_sample);
    if (b.n_top > 0) {
      op.top_ids = make_tensor(top_ids_.data(), DType::i32, n_sample, b.n_top);
      op.top_logprobs = make_tensor(top_logprobs_.data(), DType::f32, n_sample, b.n_top);
    }
    sample(backend_, op);
    for (int64_t i = 0; i < n_sample; ++i) {
      const int32_t e = out[i].sample_entry;
      b.sampled[e] = out_tokens_.as<int32_t>()[i];
      if (b.sampled_logprobs) b.sampled_logprobs[e] = out_logprobs_.as<float>()[i];
      std::copy_n(top_ids_.data() + i * b.n_top, b.n_top, b.top_ids + int64_t{e} * b.n_top);
      std::copy_n(top_logprobs_.data() + i * b.n_top, b.n_top, b.top_logprobs + int64_t{e} * b.n_top);
    }
  }
}

// The callback may be slow (a Python function, 2 us and a lock), a layer may be fast: ask 50 times a second.
bool Session::keep_going() {
  if (!config_.abort) return true;
  const auto now = std::chrono::steady_clock::now();
  if (now - last_poll_ < std::chrono::milliseconds(20)) return true;
  last_poll_ = now;
  return config_.abort(config_.user) == 0;
}

void Session::step(const prt_batch& b) {
  const auto start = std::chrono::steady_clock::now();
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

  pool.grow(b.n_seq, b.seq, b.n_token, growth_);
  try {
    copy_pages(growth_);
    int64_t done = 0;
    for (int32_t entry = 0, offset = 0; entry < b.n_seq;) {
      pieces_.clear();
      for (int64_t room = config_.max_batch_tokens; room > 0 && entry < b.n_seq;) {
        const auto n = static_cast<int32_t>(std::min<int64_t>(room, b.n_token[entry] - offset));
        pieces_.push_back({entry, offset, n});
        room -= n;
        offset += n;
        if (offset == b.n_token[entry]) {
          ++entry;
          offset = 0;
        }
      }
      const Rows rows = fill_rows(b, pieces_);
      forward(
          backend_, model_->config, model_->weights, kv_, rows, act_, [](void* self) { return static_cast<Session*>(self)->keep_going(); },
          this);
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
      run_outputs(b, outputs_, logits_row_);
      done += rows.n_tok;
      if (config_.progress) config_.progress(config_.user, done, n_tok);
    }
  } catch (...) {
    pool.rollback(growth_);
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
  return s;
}

}  // namespace prt
