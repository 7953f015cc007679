#include "prt_bench/end_to_end.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

namespace prt_bench {

namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

void must(prt_status status) {
  if (status != PRT_OK) throw Failure(status == PRT_INVALID_ARGUMENT ? 2 : 1, prt_last_error());
}

template <class T, void (*release)(T*)>
struct Release {
  void operator()(T* handle) const { release(handle); }
};
using Model = std::unique_ptr<prt_model, Release<prt_model, prt_model_release>>;
using Session = std::unique_ptr<prt_session, Release<prt_session, prt_session_release>>;
using Sampler = std::unique_ptr<prt_sampler, Release<prt_sampler, prt_sampler_release>>;

// Numbers without a pattern; the same in every run.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  float uniform() { return static_cast<float>(next() >> 40) * 0x1p-23f - 1.0f; }  // [-1, 1)

 private:
  uint64_t state_;
};

// Matrices of uniform bf16 numbers with variance 1 / n_in, so that inputs of size 1 give outputs of size 1 and nothing overflows, however
// many layers. All matrices with the same n_in are cut from one block: making 8 billion numbers would take longer than the tests.
class Weights {
 public:
  explicit Weights(const std::vector<prt_tensor_info>& tensors) {
    for (const prt_tensor_info& t : tensors)
      if (t.n_dim == 2 && blocks_.find(t.shape[1]) == blocks_.end()) blocks_[t.shape[1]] = make_block(t.shape[1]);
  }

  void load(prt_model* model, const prt_tensor_info& info) const {
    Random random(std::hash<std::string>()(info.name));
    if (info.n_dim == 1) {
      std::vector<float> values(static_cast<size_t>(info.shape[0]));
      const bool norm = std::strstr(info.name, "norm") != nullptr;
      for (float& v : values) v = (norm ? 1.0f : 0.0f) + 0.1f * random.uniform();
      return must(prt_model_load_rows(model, info.name, 0, info.shape[0], values.data(), PRT_F32));
    }
    const int64_t n_in = info.shape[1], rows = std::max<int64_t>(1, kBlock / 2 / n_in);
    for (int64_t begin = 0; begin < info.shape[0]; begin += rows) {
      const int64_t n = std::min(rows, info.shape[0] - begin);
      const int64_t start = random.below(kBlock - n * n_in + 1);  // another place each time, so that rows do not repeat
      must(prt_model_load_rows(model, info.name, begin, n, blocks_.at(n_in).data() + start, PRT_BF16));
    }
  }

 private:
  static constexpr int64_t kBlock = 8 << 20;

  static std::vector<uint16_t> make_block(int64_t n_in) {
    Random random(static_cast<uint64_t>(n_in));
    const float scale = std::sqrt(3.0f / static_cast<float>(n_in));
    std::vector<uint16_t> block(static_cast<size_t>(kBlock));
    for (uint16_t& x : block) {
      const float f = random.uniform() * scale;
      uint32_t bits;
      std::memcpy(&bits, &f, sizeof bits);
      x = static_cast<uint16_t>(bits >> 16);
    }
    return block;
  }

  std::map<int64_t, std::vector<uint16_t>> blocks_;  // by n_in
};

Model load_model(const prt_model_config& config, const Options& o) {
  prt_model* raw = nullptr;
  must(prt_model_create(&config, o.device.c_str(), &raw));
  Model model(raw);
  int32_t count = 0;
  must(prt_model_tensor_count(raw, &count));
  std::vector<prt_tensor_info> tensors(static_cast<size_t>(count), PRT_TENSOR_INFO_INIT);
  for (int32_t i = 0; i < count; ++i) must(prt_model_tensor_get(raw, i, &tensors[static_cast<size_t>(i)]));
  const Weights weights(tensors);
  std::atomic<size_t> next{0};
  std::mutex mutex;
  std::unique_ptr<Failure> failure;
  const auto work = [&] {
    for (size_t i; (i = next++) < tensors.size();) {
      try {
        weights.load(raw, tensors[i]);
      } catch (const Failure& f) {
        const std::lock_guard lock(mutex);
        if (!failure) failure = std::make_unique<Failure>(f);
        return;
      }
    }
  };
  std::vector<std::thread> threads;
  for (unsigned i = 1; i < std::clamp(std::thread::hardware_concurrency(), 1u, 8u); ++i) threads.emplace_back(work);
  work();
  for (std::thread& t : threads) t.join();
  if (failure) throw *failure;
  must(prt_model_finalize(raw));
  return model;
}

int64_t pages_for(int64_t n_token) { return (n_token + PRT_PAGE_TOKENS - 1) / PRT_PAGE_TOKENS; }
int64_t pages_of(const Test& t) { return t.batch * pages_for(t.depth + t.n); }
int64_t kv_bytes_per_token(const prt_model_config& c) { return int64_t{4} * c.n_layer * c.h_kv * c.d_head; }  // K and V, bf16

// Whether the policy chooses among clusters; others have no use for `selected`.
bool clusters(const std::string& policy) {
  prt_attention attention = PRT_ATTENTION_INIT;
  must(prt_attention_parse(policy.c_str(), &attention));
  return attention.policy == PRT_ATTENTION_TACTIC || attention.policy == PRT_ATTENTION_TACTIC_RECYCLED;
}

class Runner {
 public:
  Runner(Report& report, prt_model* model) : report_(report), c_(report.config.config), model_(model), random_(2) {
    for (const std::string& policy : report.options.attention) largest_index_ = std::max(largest_index_, index_page_bytes(policy));
  }

  // One session for all tests, with a pool for the largest that fits into the memory that is free.
  void open(std::vector<Test>& tests) {
    int64_t longest = 1;
    for (const Test& t : tests) longest = std::max(longest, t.depth + t.n);
    prt_device_info device = find_device(report_.options.device);
    std::stable_sort(tests.begin(), tests.end(), [](const Test& a, const Test& b) { return pages_of(a) > pages_of(b); });
    while (!tests.empty()) {
      const Test largest = tests.front();
      const int64_t need = pages_of(largest) * (PRT_PAGE_TOKENS * kv_bytes_per_token(c_) + largest_index_);
      std::string why;
      if (need > device.memory_free) {
        why =
            "needs " + std::to_string(need >> 20) + " MiB for the KV cache, " + std::to_string(device.memory_free >> 20) + " MiB are free";
      } else {
        prt_session_config config = PRT_SESSION_CONFIG_INIT;
        config.max_context = static_cast<int32_t>(pages_for(longest) * PRT_PAGE_TOKENS);
        config.n_page = static_cast<int32_t>(pages_of(largest));
        config.max_batch_tokens = static_cast<int32_t>(report_.options.chunk);
        config.n_threads = static_cast<int32_t>(report_.options.threads);
        prt_session* raw = nullptr;
        prt_status status = prt_session_create(model_, &config, &raw);
        session_.reset(raw);
        for (const std::string& policy : report_.options.attention)
          if (status == PRT_OK) status = attend(policy, 0);
        if (status == PRT_OK) return;
        why = prt_last_error();
        if (status != PRT_OUT_OF_MEMORY) throw Failure(status == PRT_INVALID_ARGUMENT ? 2 : 1, why);
      }
      const int64_t pages = pages_of(largest);  // every test as large as this one
      while (!tests.empty() && pages_of(tests.front()) >= pages) {
        report_.skipped.push_back({tests.front().name(), why});
        tests.erase(tests.begin());
      }
    }
  }

  void run(Test& t) {
    fill(t.batch, t.depth, t.n);
    must(attend(t.attention, t.selected));
    if (!t.attention.empty()) choose_rows(t);
    once(t, t.is_prompt ? t.n : std::min<int64_t>(t.n, 8));  // warm-up: memory, clocks, recorded graphs
    for (int64_t r = 0; r < report_.options.repetitions; ++r) t.seconds.push_back(once(t, t.n));
    if (!t.attention.empty()) return sparse_figures(t);
    t.bytes =
        t.is_prompt ? step_bytes(c_, t.n, t.depth, t.batch) : static_cast<double>(t.n) * step_bytes(c_, 1, t.depth + t.n / 2, t.batch);
    t.flops =
        t.is_prompt ? step_flops(c_, t.n, t.depth, t.batch) : static_cast<double>(t.n) * step_flops(c_, 1, t.depth + t.n / 2, t.batch);
  }

  void close() {
    prt_session_stats stats = PRT_SESSION_STATS_INIT;
    must(prt_session_get_stats(session_.get(), &stats));
    report_.kv_bytes = stats.kv_bytes;
    report_.workspace_bytes = stats.workspace_bytes;
    report_.index_bytes = stats.index_bytes;
  }

  static prt_device_info find_device(const std::string& id) {
    int32_t n = 0;
    must(prt_device_count(&n));
    for (int32_t i = 0; i < n; ++i) {
      prt_device_info info = PRT_DEVICE_INFO_INIT;
      must(prt_device_get(i, &info));
      if (id == info.id) return info;
    }
    throw Failure(2, "--device is '" + id + "', which is not there");
  }

 private:
  prt_status attend(const std::string& policy, double selected) {
    prt_attention attention = PRT_ATTENTION_INIT;
    if (!policy.empty()) must(prt_attention_parse(policy.c_str(), &attention));
    attention.selected = static_cast<float>(selected);
    return prt_session_set_attention(session_.get(), &attention);
  }

  int64_t index_page_bytes(const std::string& policy) const {
    prt_attention attention = PRT_ATTENTION_INIT;
    int64_t bytes = 0;
    must(prt_attention_parse(policy.c_str(), &attention));
    must(prt_attention_page_bytes(model_, &attention, &bytes));
    return bytes;
  }

  // The library takes a share for each query head; how many rows their kv head then reads depends on how much they agree. A few short runs
  // find the share that makes it the one asked for. The first of them also clusters what is there.
  void choose_rows(Test& t) {
    double share = t.selected;
    for (int i = 0; i < 8; ++i) {
      once(t, 3);
      read_counters(t);
      if (t.selected == 0 || t.selected_rows == 0 || std::abs(t.selected_rows / t.selected - 1) < 0.02) return;
      share = std::min(1.0, share * t.selected / t.selected_rows);
      must(attend(t.attention, share));
    }
  }

  void read_counters(Test& t) {
    prt_attention_stats s = PRT_ATTENTION_STATS_INIT;
    must(prt_session_get_attention_stats(session_.get(), -1, -1, &s));
    const auto clustered = static_cast<double>(s.n_context - s.n_exact);
    t.selected_rows = clustered > 0 ? static_cast<double>(s.n_selected) / clustered : 0;
    t.read_rows = s.n_context > 0 ? static_cast<double>(s.n_selected + s.n_exact) / static_cast<double>(s.n_context) : 1;
  }

  void sparse_figures(Test& t) {
    read_counters(t);
    prt_session_stats stats = PRT_SESSION_STATS_INIT;
    must(prt_session_get_stats(session_.get(), &stats));
    for (size_t s = 0; s < static_cast<size_t>(t.batch); ++s) t.prompt_seconds += prompt_seconds_[s];
    if (clusters(t.attention) && stats.n_clustered_token > 0)
      t.cluster_seconds = stats.cluster_seconds / static_cast<double>(stats.n_clustered_token) * static_cast<double>(t.batch) *
                          static_cast<double>(t.depth);
    const double context = static_cast<double>(t.batch) * static_cast<double>(t.depth + t.n / 2);
    const double index = static_cast<double>(index_page_bytes(t.attention)) / PRT_PAGE_TOKENS;
    t.bytes = static_cast<double>(t.n) *
              (step_bytes(c_, 0, 0, t.batch) + context * (t.read_rows * static_cast<double>(kv_bytes_per_token(c_)) + index));
    t.flops =
        static_cast<double>(t.n) * step_flops(c_, 1, static_cast<int64_t>(t.read_rows * static_cast<double>(t.depth + t.n / 2)), t.batch);
  }

  void step(std::vector<int32_t>& tokens, const std::vector<int32_t>& n_token, const std::vector<prt_sampler*>& samplers) {
    prt_batch batch = PRT_BATCH_INIT;
    batch.n_seq = static_cast<int32_t>(n_token.size());
    batch.seq = sequences_.data();
    batch.n_token = n_token.data();
    batch.tokens = tokens.data();
    sampled_.resize(n_token.size());
    if (!samplers.empty()) {
      batch.samplers = samplers.data();
      batch.sampled = sampled_.data();
    }
    must(prt_session_step(session_.get(), &batch));
  }

  std::vector<int32_t> draw(int64_t n) {
    std::vector<int32_t> tokens(static_cast<size_t>(n));
    for (int32_t& t : tokens) t = static_cast<int32_t>(random_.below(c_.n_vocab));
    return tokens;
  }

  // The first `batch` sequences get exactly `depth` tokens, and room for n more. What is there already is kept.
  void fill(int64_t batch, int64_t depth, int64_t n) {
    prt_session_stats stats = PRT_SESSION_STATS_INIT;
    const auto pages_after = [&] {
      int64_t pages = batch * pages_for(depth + n), length = 0;
      for (size_t s = static_cast<size_t>(batch); s < sequences_.size(); ++s) {
        must(prt_sequence_length(session_.get(), sequences_[s], &length));
        pages += pages_for(length);
      }
      return pages;
    };
    must(prt_session_get_stats(session_.get(), &stats));
    while (static_cast<int64_t>(sequences_.size()) > batch && pages_after() > stats.n_page) {
      must(prt_sequence_free(session_.get(), sequences_.back()));
      sequences_.pop_back();
      prompt_seconds_.pop_back();
    }
    for (int64_t s = 0; s < batch; ++s) {
      if (s == static_cast<int64_t>(sequences_.size())) {
        must(prt_sequence_create(session_.get(), &sequences_.emplace_back()));
        prompt_seconds_.push_back(0);
      }
      int64_t length = 0;
      must(prt_sequence_length(session_.get(), sequences_[static_cast<size_t>(s)], &length));
      if (length > depth) must(prt_sequence_truncate(session_.get(), sequences_[static_cast<size_t>(s)], depth));
      if (length >= depth) continue;
      std::vector<int32_t> tokens = draw(depth - length);
      prt_batch one = PRT_BATCH_INIT;
      const auto n = static_cast<int32_t>(tokens.size());
      one.n_seq = 1;
      one.seq = &sequences_[static_cast<size_t>(s)];
      one.n_token = &n;
      one.tokens = tokens.data();
      const Clock::time_point start = Clock::now();
      must(prt_session_step(session_.get(), &one));
      prompt_seconds_[static_cast<size_t>(s)] += seconds_since(start);
    }
  }

  // Seconds for one prompt of n tokens in every sequence, or n steps of one token; the sequences are as before afterwards. Every step ends
  // with a greedy token per sequence, which is what the next decode step takes in.
  double once(const Test& t, int64_t n) {
    const auto batch = static_cast<size_t>(t.batch);
    while (samplers_.size() < batch) {
      prt_sampling greedy = PRT_SAMPLING_INIT;
      greedy.temperature = 0;
      prt_sampler* sampler = nullptr;
      must(prt_sampler_create(c_.n_vocab, &greedy, &sampler));
      samplers_.emplace_back(sampler);
    }
    std::vector<prt_sampler*> samplers;
    for (size_t s = 0; s < batch; ++s) samplers.push_back(samplers_[s].get());
    const int64_t n_step = t.is_prompt ? 1 : n, per_step = t.is_prompt ? n : 1;
    std::vector<int32_t> tokens = draw(t.batch * per_step);
    const std::vector<int32_t> n_token(batch, static_cast<int32_t>(per_step));
    const Clock::time_point start = Clock::now();
    for (int64_t i = 0; i < n_step; ++i) {
      step(tokens, n_token, samplers);
      if (!t.is_prompt) tokens = sampled_;
    }
    const double seconds = seconds_since(start);
    for (size_t s = 0; s < batch; ++s) must(prt_sequence_truncate(session_.get(), sequences_[s], t.depth));
    return seconds;
  }

  Report& report_;
  const prt_model_config& c_;
  prt_model* model_;
  Session session_;
  int64_t largest_index_ = 0;  // of the policies, for a page
  std::vector<int64_t> sequences_;
  std::vector<double> prompt_seconds_;  // what each took to fill
  std::vector<Sampler> samplers_;
  std::vector<int32_t> sampled_;
  Random random_;
};

// Multiply-adds per token of the matrices in the layers, and of the output matrix.
double layer_weights(const prt_model_config& c) {
  const double q = double{1} * c.h_q * c.d_head, kv = double{1} * c.h_kv * c.d_head;
  return c.n_layer * (c.d_model * (2 * q + 2 * kv) + 3.0 * c.d_model * c.d_ff);
}
double output_weights(const prt_model_config& c) { return double{1} * c.d_model * c.n_vocab; }

}  // namespace

double step_bytes(const prt_model_config& c, int64_t n, int64_t depth, int64_t batch) {
  const double weights = 2 * (layer_weights(c) + output_weights(c));
  return weights + static_cast<double>(batch) * static_cast<double>(depth + n) * static_cast<double>(kv_bytes_per_token(c));
}

double step_flops(const prt_model_config& c, int64_t n, int64_t depth, int64_t batch) {
  const auto rows = static_cast<double>(n), before = static_cast<double>(depth), sequences = static_cast<double>(batch);
  const double pairs = rows * before + rows * (rows + 1) / 2;  // of a query and a key that it sees
  return sequences * (2 * rows * layer_weights(c) + 2 * output_weights(c) + 4.0 * c.n_layer * c.h_q * c.d_head * pairs);
}

void run_end_to_end(Report& report, const std::function<void()>& at_end) {
  const Options& o = report.options;
  std::vector<Test> tests;  // in the order in which they are printed
  for (const int64_t d : o.depth)
    for (const int64_t b : o.batch) {
      for (const int64_t p : o.n_prompt)
        if (p > 0) tests.push_back({.is_prompt = true, .n = p, .depth = d, .batch = b, .seconds = {}});
      for (const int64_t n : o.n_gen)
        if (n > 0) {
          tests.push_back({.is_prompt = false, .n = n, .depth = d, .batch = b, .seconds = {}});
          for (const std::string& policy : o.attention)
            for (const double share : o.selected.empty() || !clusters(policy) ? std::vector<double>{0} : o.selected)
              tests.push_back({.is_prompt = false, .n = n, .depth = d, .batch = b, .attention = policy, .selected = share, .seconds = {}});
        }
    }
  if (tests.empty()) throw Failure(2, "-p 0 with -n 0 leaves nothing to measure");
  // Random weights know no longest context: the model is told whatever the tests need.
  int64_t longest = 0;
  for (const Test& t : tests) longest = std::max(longest, t.depth + t.n);
  prt_model_config& config = report.config.config;
  config.max_position = static_cast<int32_t>(std::max<int64_t>(config.max_position, pages_for(longest) * PRT_PAGE_TOKENS));

  const auto say = [&](const std::string& text) {
    if (!o.quiet) std::fprintf(stderr, "%s\n", text.c_str());
  };
  const Clock::time_point start = Clock::now();
  const Model model = load_model(config, o);
  must(prt_model_weight_bytes(model.get(), &report.weight_bytes));
  report.load_seconds = seconds_since(start);
  char text[96];
  std::snprintf(text, sizeof text, "%.2f GB of random weights made in %.1f s", static_cast<double>(report.weight_bytes) / 1e9,
                report.load_seconds);
  say(text);

  Runner runner(report, model.get());
  std::vector<Test> fitting = tests;
  runner.open(fitting);
  // By depth, so that a deeper test only appends to what a shallower one left.
  std::stable_sort(fitting.begin(), fitting.end(),
                   [](const Test& a, const Test& b) { return a.depth != b.depth ? a.depth < b.depth : a.batch < b.batch; });
  for (Test& t : fitting) {
    runner.run(t);
    std::snprintf(text, sizeof text, "%s: %.1f tok/s", t.name().c_str(), mean(t.tok_s()));
    say(text);
  }
  if (!fitting.empty()) runner.close();
  at_end();
  for (const Test& t : tests)  // back in the order asked for
    for (const Test& done : fitting)
      if (done.name() == t.name()) {
        report.tests.push_back(done);
        break;
      }
}

}  // namespace prt_bench
