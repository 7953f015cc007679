// Every operation of a step alone: graphs of many launches, weights or KV pages rotated so that none is still in the L2 from the last time.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <numeric>

#include "ops/ops.h"
#include "prt_bench/gpu.cuh"

namespace prt_bench {

namespace {

using prt::DType;
using prt::Tensor;

constexpr int64_t kRotatedBytes = 512 << 20;  // several times any L2
constexpr int64_t kMostSets = 512;
constexpr double kGraphSeconds = 2e-3;  // about what one replay takes
constexpr int kReplays = 9;
constexpr int64_t kChunk = 2048;  // rows of a prompt that the library takes at a time, where --chunk does not say

// batch x context of the decode attention, and the lengths of the causal one, that bench/peers measures elsewhere.
constexpr int64_t kDecodeGrid[][2] = {{1, 8192},  {1, 32768},  {1, 65536}, {1, 131072}, {4, 8192},  {4, 32768},
                                      {4, 65536}, {4, 131072}, {8, 8192},  {8, 32768},  {8, 65536}, {32, 2048}};
constexpr int64_t kPrefillLengths[] = {512, 2048, 8192, 32768};
constexpr int64_t kGemm[3] = {8192, 4096, 14336};  // rows, n_in, n_out

class OpTable {
 public:
  OpTable(int32_t device, Report& report)
      : report_(report),
        c_(report.config.config),
        device_(device),
        context_(device),
        stream_(context_.stream()),
        b_(prt::cuda_backend(stream_)) {}

  void run() {
    const Options& o = report_.options;
    for (const int64_t batch : o.batch)
      for (const int64_t depth : o.depth) decode_step(batch, std::max<int64_t>(depth, prt::kPageTokens));
    std::vector<int64_t> chunks;
    for (const int64_t p : o.n_prompt) chunks.push_back(std::min(p, o.chunk ? o.chunk : kChunk));
    std::sort(chunks.begin(), chunks.end());
    chunks.erase(std::unique(chunks.begin(), chunks.end()), chunks.end());
    for (const int64_t n : chunks)
      if (n > 0) prompt_chunk(n);
    group_ = "decode attention, one layer";
    for (const auto& [batch, context] : kDecodeGrid) attention(batch, 1, context, 0);
    group_ = "causal attention, one layer";
    for (const int64_t n : kPrefillLengths) attention(1, n, n, 0);
    group_ = "matrix product";
    linear("linear", kGemm[0], kGemm[1], kGemm[2], {}, 0);
  }

 private:
  struct LinearKind {
    bool norm = false, gated = false, accumulate = false, bias = false, logits = false;
  };

  void decode_step(int64_t batch, int64_t context) {
    group_ = "decode step, batch " + std::to_string(batch) + ", context " + std::to_string(context);
    embedding(batch);
    rope_angles(batch);
    layer(batch, batch, 1, context);
    outputs(batch);
  }

  void prompt_chunk(int64_t n) {
    group_ = "prompt of " + std::to_string(n) + " tokens";
    embedding(n);
    rope_angles(n);
    layer(n, 1, n, n);
    outputs(1);
  }

  void layer(int64_t n_tok, int64_t n_seq, int64_t rows, int64_t context) {
    const int64_t q = int64_t{c_.h_q} * c_.d_head, qkv = q + 2 * int64_t{c_.h_kv} * c_.d_head, d_ff = c_.d_ff;
    linear("linear qkv", n_tok, c_.d_model, qkv, {.norm = true, .bias = c_.qkv_bias != 0}, c_.n_layer);
    rope_kv_write(n_tok, c_.n_layer);
    attention(n_seq, rows, context, c_.n_layer);
    linear("linear o", n_tok, q, c_.d_model, {.accumulate = true}, c_.n_layer);
    linear("linear gate_up", n_tok, c_.d_model, 2 * d_ff, {.norm = true, .gated = true}, c_.n_layer);
    linear("linear down", n_tok, d_ff, c_.d_model, {.accumulate = true}, c_.n_layer);
  }

  void outputs(int64_t n_row) {
    linear("linear lm_head", n_row, c_.d_model, c_.n_vocab, {.norm = true, .logits = true}, 1);
    sample(n_row);
  }

  // ---- one operation each. `calls` make up a step.

  void embedding(int64_t n) {
    measure("embedding", dims(n, c_.d_model), 6 * static_cast<double>(n * c_.d_model), 0, 1, [&] {
      const Tensor out = empty(DType::f32, n, c_.d_model), table = random(DType::bf16, 1, 0, c_.n_vocab, c_.d_model);
      std::vector<int32_t> ids(static_cast<size_t>(n));
      for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i * 7919 % static_cast<size_t>(c_.n_vocab));
      const Tensor tokens = ints(ids, n);
      return Launches{1, [=, this](int64_t) { prt::embedding(b_, {out, tokens, table}); }};
    });
  }

  void rope_angles(int64_t n) {
    measure("rope_angles", dims(n, c_.d_head), 4 * static_cast<double>(n * c_.d_head), 0, 1, [&] {
      const Tensor out = empty(DType::f32, n, 2, c_.d_head / 2), freq = random(DType::f32, 0.1f, 0.2f, c_.d_head / 2);
      const Tensor positions = ints(counting(n), n);
      return Launches{1, [=, this](int64_t) { prt::rope_angles(b_, {out, positions, freq, 1.0f}); }};
    });
  }

  void linear(const char* name, int64_t n, int64_t n_in, int64_t n_out, LinearKind kind, int64_t calls) {
    const int64_t out_columns = kind.gated ? n_out / 2 : n_out;
    const DType x_type = kind.norm ? DType::f32 : DType::bf16, out_type = kind.accumulate || kind.logits ? DType::f32 : DType::bf16;
    const double bytes = 2.0 * static_cast<double>(n_in * n_out) + static_cast<double>(n * n_in * prt::dtype_size(x_type)) +
                         static_cast<double>(n * out_columns * prt::dtype_size(out_type) * (kind.accumulate ? 2 : 1));
    const std::string shape = dims(n, n_in, n_out);
    measure(name, shape, bytes, 2.0 * static_cast<double>(n) * static_cast<double>(n_in * n_out), calls, [&] {
      const int64_t sets = sets_of(2 * n_in * n_out);
      const Tensor weights = random(DType::bf16, std::sqrt(3.0f / static_cast<float>(n_in)), 0, sets * n_out, n_in);
      prt::Linear a;
      a.x = random(x_type, 1, 0, n, n_in);
      a.out = random(out_type, 1, 0, n, out_columns);
      a.accumulate = kind.accumulate;
      a.gated = kind.gated;
      if (kind.bias) a.bias = random(DType::f32, 1, 0, n_out);
      if (kind.norm) {
        a.norm = random(DType::f32, 0.1f, 1, n_in);
        a.norm_eps = 1e-5f;
      }
      a.scratch = scratch(prt::linear_scratch_bytes(b_, n, n_in, n_out, kind.norm, kind.gated));
      return Launches{sets, [=, this](int64_t i) mutable {
                        a.weight = weights.rows(i % sets * n_out, n_out);
                        prt::linear(b_, a);
                      }};
    });
  }

  void rope_kv_write(int64_t n, int64_t calls) {
    const int64_t q = int64_t{c_.h_q} * c_.d_head, kv = int64_t{c_.h_kv} * c_.d_head;
    measure("rope_kv_write", dims(n, q + 2 * kv), static_cast<double>(n) * (4.0 * static_cast<double>(q + 2 * kv) + 4 * c_.d_head), 0,
            calls, [&] {
              const int64_t n_page = (n + prt::kPageTokens - 1) / prt::kPageTokens;
              prt::RopeKvWrite a;
              a.qkv = random(DType::bf16, 1, 0, n, q + 2 * kv);
              a.norm_eps = 1e-5f;
              a.cos_sin = random(DType::f32, 1, 0, n, 2, c_.d_head / 2);
              a.slots = ints(counting(n), n);
              a.k_pages = random(DType::bf16, 1, 0, n_page, c_.h_kv, prt::kPageTokens, c_.d_head);
              a.v_pages = random(DType::bf16, 1, 0, n_page, c_.h_kv, prt::kPageTokens, c_.d_head);
              a.h_q = c_.h_q;
              return Launches{1, [=, this](int64_t) { prt::rope_kv_write(b_, a); }};
            });
  }

  // `rows` new tokens in each of n_seq sequences of `context` tokens, the new ones included. One row: the decode operation.
  void attention(int64_t n_seq, int64_t rows, int64_t context, int64_t calls) {
    const bool decode = rows == 1;
    const int64_t n_tok = n_seq * rows, q = int64_t{c_.h_q} * c_.d_head, kv = int64_t{c_.h_kv} * c_.d_head;
    const double pairs = static_cast<double>(n_seq) * (static_cast<double>(rows) * static_cast<double>(context - rows) +
                                                       static_cast<double>(rows) * static_cast<double>(rows + 1) / 2);
    const std::string shape = decode ? dims(n_seq, context) : dims(n_tok);
    const double bytes = 4.0 * static_cast<double>(n_seq * context * kv) + 4.0 * static_cast<double>(n_tok * q);
    measure(decode ? "attention_decode" : "attention_prefill", shape, bytes, 4.0 * static_cast<double>(q) * pairs, calls, [&] {
      const int64_t max_pages = (context + prt::kPageTokens - 1) / prt::kPageTokens, n_page = n_seq * max_pages;
      const int64_t sets = sets_of(n_page * prt::kPageTokens * kv * 4);
      const Tensor k = random(DType::bf16, 1, 0, sets * n_page, c_.h_kv, prt::kPageTokens, c_.d_head);
      const Tensor v = random(DType::bf16, 1, 0, sets * n_page, c_.h_kv, prt::kPageTokens, c_.d_head);
      std::vector<int32_t> begin, length(static_cast<size_t>(n_seq), static_cast<int32_t>(context)), table = counting(n_page);
      for (int64_t s = 0; s <= n_seq; ++s) begin.push_back(static_cast<int32_t>(s * rows));
      uint64_t state = 1;  // pages in no order, as a pool that has been in use hands them out
      for (size_t i = table.size(); i > 1; --i) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        std::swap(table[i - 1], table[(state >> 33) % i]);
      }
      prt::Attention a;
      a.out = random(DType::bf16, 1, 0, n_tok, q);
      a.q = random(DType::bf16, 1, 0, n_tok, q + 2 * kv).cols(0, q);
      a.q_begin = ints(begin, n_seq + 1);
      a.kv_len = ints(length, n_seq);
      a.page_table = ints(table, n_seq, max_pages);
      a.window = 0;
      a.scale = 1 / std::sqrt(static_cast<float>(c_.d_head));
      a.scratch = scratch(prt::attention_scratch_bytes(b_, decode ? n_seq : 0, context, c_.h_q, c_.h_kv, c_.d_head));
      return Launches{sets, [=, this](int64_t i) mutable {
                        a.k_pages = k.rows(i % sets * n_page, n_page);
                        a.v_pages = v.rows(i % sets * n_page, n_page);
                        if (decode) prt::attention_decode(b_, a);
                        else prt::attention_prefill(b_, a);
                      }};
    });
  }

  void sample(int64_t n) {  // greedy
    measure("sample", dims(n, c_.n_vocab), 4.0 * static_cast<double>(n * c_.n_vocab), 0, 1, [&] {
      prt::SampleRow greedy{};
      greedy.top_p = greedy.repetition_penalty = 1;
      const std::vector<prt::SampleRow> rows(static_cast<size_t>(n), greedy);
      prt::Sample a;
      a.logits = random(DType::f32, 5, 0, n, c_.n_vocab);
      a.rows = reinterpret_cast<const prt::SampleRow*>(upload(rows.data(), n * static_cast<int64_t>(sizeof(prt::SampleRow))));
      a.tokens = ints(std::vector<int32_t>(static_cast<size_t>(n)), n);
      a.scratch = scratch(prt::sample_scratch_bytes(b_, n, c_.n_vocab));
      return Launches{1, [=, this](int64_t) { prt::sample(b_, a); }};
    });
  }

  // ---- device memory, kept until the operation is done

  char* take(int64_t bytes) {
    return buffers_.emplace_back(prt::device_buffer(device_, std::max<int64_t>(bytes, 16), "an operand")).data();
  }
  template <class... Dims>
  Tensor empty(DType type, Dims... sizes) {
    Tensor t = prt::make_tensor(nullptr, type, sizes...);
    t.data = take(t.bytes());
    return t;
  }
  template <class... Dims>
  Tensor random(DType type, float scale, float offset, Dims... sizes) {
    const Tensor t = empty(type, sizes...);
    fill_random(stream_, t, scale, offset, ++seed_);
    return t;
  }
  char* upload(const void* data, int64_t bytes) {
    char* to = take(bytes);
    prt::copy_to_device(stream_, to, data, bytes);
    prt::synchronize(stream_);
    return to;
  }
  template <class... Dims>
  Tensor ints(const std::vector<int32_t>& values, Dims... sizes) {
    return prt::make_tensor(upload(values.data(), static_cast<int64_t>(values.size() * sizeof(int32_t))), DType::i32, sizes...);
  }
  Tensor scratch(int64_t bytes) { return empty(DType::f32, (bytes + 3) / 4); }

  static std::vector<int32_t> counting(int64_t n) {
    std::vector<int32_t> x(static_cast<size_t>(n));
    std::iota(x.begin(), x.end(), 0);
    return x;
  }
  static int64_t sets_of(int64_t bytes) { return std::clamp((kRotatedBytes + bytes - 1) / bytes, int64_t{1}, kMostSets); }
  template <class... Sizes>
  static std::string dims(Sizes... sizes) {
    std::string s;
    ((s += (s.empty() ? "" : " x ") + std::to_string(sizes)), ...);
    return s;
  }

  // ---- the measurement

  struct Launches {
    int64_t sets;
    std::function<void(int64_t)> launch;  // with the i-th set of large operands
  };

  // `make` takes the memory and gives the launches. The same operation at the same size is measured once.
  template <class Make>
  void measure(const std::string& name, const std::string& shape, double bytes, double flops, int64_t calls, Make&& make) {
    Op op{.group = group_, .name = name, .shape = shape, .us = 0, .bytes = bytes, .flops = flops, .calls = calls};
    const std::string key = name + " " + shape;
    if (const auto known = seen_.find(key); known != seen_.end()) {
      op.us = known->second;
      report_.ops.push_back(op);
      return;
    }
    try {
      const Launches launches = make();
      op.us = seen_[key] = time_us(launches);
      report_.ops.push_back(op);
    } catch (const prt::Error& error) {
      report_.skipped.push_back({group_ + ": " + key, error.what()});
    }
    buffers_.clear();
    if (!report_.options.quiet) std::fprintf(stderr, "%s: %.2f us\n", key.c_str(), op.us);
  }

  double time_us(const Launches& l) {
    int64_t next = 0;
    const auto queue = [&](int64_t n) {
      for (int64_t i = 0; i < n; ++i) l.launch(next++);
    };
    queue(2);
    prt::synchronize(stream_);
    const double once = watch_.time(stream_, [&] { queue(2); }) / 2;
    const int64_t rounds = static_cast<int64_t>(std::ceil(kGraphSeconds / once / static_cast<double>(l.sets)));
    const int64_t n = std::clamp(rounds * l.sets, int64_t{1}, std::max(kMostSets, l.sets));
    prt::CudaGraph graph;
    prt::CudaGraph::begin(stream_);
    try {
      queue(n);
    } catch (...) {
      prt::CudaGraph::cancel(stream_);
      throw;
    }
    graph.end(stream_);
    graph.replay(stream_);
    prt::synchronize(stream_);
    return 1e6 * watch_.median_time(stream_, kReplays, [&] { graph.replay(stream_); }) / static_cast<double>(n);
  }

  Report& report_;
  const prt_model_config& c_;
  int32_t device_;
  prt::CudaContext context_;
  const prt::CudaStream& stream_;
  prt::Backend b_;
  Stopwatch watch_;
  std::string group_;
  std::vector<prt::Buffer> buffers_;
  std::map<std::string, double> seen_;  // "linear o 8 x 4096 x 4096" -> us
  uint64_t seed_ = 0;
};

}  // namespace

void measure_ops(int32_t index, Report& report) {
  const prt::DeviceScope scope(index);
  OpTable(index, report).run();
}

}  // namespace prt_bench
