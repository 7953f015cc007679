// Every operation of a step alone: graphs of many launches, weights or KV pages rotated so that none is still in the L2 from the last time.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <numeric>

#include "attention/choice.h"
#include "attention/tactic.h"
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
// One sequence of so many tokens, for the operations of the policies that are not Tactic.
constexpr int64_t kChoiceContexts[] = {32768, 131072};
// The same for sparse decode attention, and the segments it is measured with: the library's defaults.
constexpr int64_t kSparseBatches[] = {1, 4, 8}, kSparseContexts[] = {8192, 32768, 65536, 131072};
constexpr int64_t kSlots = 4, kSegmentPages = 32, kWindow = 128;
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
    if (!o.selected.empty() && std::string("sparse decode attention").find(o.match) != std::string::npos) {
      const auto before = static_cast<std::ptrdiff_t>(report_.ops.size());
      for (const int64_t batch : kSparseBatches)
        for (const int64_t context : kSparseContexts) sparse(batch, context);
      std::stable_sort(report_.ops.begin() + before, report_.ops.end(), [](const Op& x, const Op& y) { return x.selected < y.selected; });
    }
    group_ = "choosing rows, one layer";
    for (const int64_t context : kChoiceContexts) choosing(context);
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
      std::vector<int32_t> begin, length(static_cast<size_t>(n_seq), static_cast<int32_t>(context));
      for (int64_t s = 0; s <= n_seq; ++s) begin.push_back(static_cast<int32_t>(s * rows));
      prt::Attention a;
      a.out = random(DType::bf16, 1, 0, n_tok, q);
      a.q = random(DType::bf16, 1, 0, n_tok, q + 2 * kv).cols(0, q);
      a.q_begin = ints(begin, n_seq + 1);
      a.kv_len = ints(length, n_seq);
      a.page_table = ints(shuffled(n_page), n_seq, max_pages);
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

  // What Recycled Attention, TokenSelect and Quest choose with: the scores of all rows, alone and out of dense attention, of blocks by
  // their bounds, and the cut of both, at the published numbers of rows.
  void choosing(int64_t context) {
    const int64_t h_q = c_.h_q, q = h_q * c_.d_head, kv = int64_t{c_.h_kv} * c_.d_head;
    const int64_t n_page = (context + prt::kPageTokens - 1) / prt::kPageTokens, n_block = n_page * prt::kPageTokens / prt::kBlockRows;
    const std::string shape = dims(1, context);
    const auto rows = static_cast<double>(context);
    const double k_bytes = 2 * rows * static_cast<double>(kv), score_bytes = 4 * rows * static_cast<double>(h_q);
    const double block_bytes = 2 * k_bytes / prt::kBlockRows, block_score_bytes = score_bytes / prt::kBlockRows;
    const float scale = 1 / std::sqrt(static_cast<float>(c_.d_head));
    const auto paged = [&](int64_t per_page) {  // sets of pages, past the L2
      const int64_t sets = sets_of(n_page * per_page * kv * 2);
      return std::pair{random(DType::bf16, 1, 0, sets * n_page, c_.h_kv, per_page, c_.d_head), sets};
    };
    const auto lengths = [&] { return ints({static_cast<int32_t>(context)}, 1); };
    measure("score_rows", shape, k_bytes + score_bytes, 2 * rows * static_cast<double>(q), 0, [&] {
      const auto [k, sets] = paged(prt::kPageTokens);
      prt::ScoreRows a{};
      a.scores = empty(DType::f32, 1, h_q, n_page * prt::kPageTokens), a.log_total = empty(DType::f32, 1, h_q);
      a.q = random(DType::bf16, 1, 0, 1, q);
      a.page_table = ints(shuffled(n_page), 1, n_page), a.kv_len = lengths();
      a.scale = scale;
      return Launches{sets, [=, this, k = k, sets = sets](int64_t i) mutable {
                        a.k_pages = k.rows(i % sets * n_page, n_page);
                        prt::score_rows(b_, a);
                      }};
    });
    measure("attention_decode with scores", shape, 2 * k_bytes + score_bytes, 4 * rows * static_cast<double>(q), 0, [&] {
      const auto [k, sets] = paged(prt::kPageTokens);
      const Tensor v = random(DType::bf16, 1, 0, k.shape[0], c_.h_kv, prt::kPageTokens, c_.d_head);
      prt::Attention a;
      a.out = random(DType::bf16, 1, 0, 1, q), a.q = random(DType::bf16, 1, 0, 1, q);
      a.q_begin = ints({0, 1}, 2), a.kv_len = lengths(), a.page_table = ints(shuffled(n_page), 1, n_page);
      a.window = 0;
      a.scale = scale;
      a.scratch = scratch(prt::attention_scratch_bytes(b_, 1, context, h_q, c_.h_kv, c_.d_head));
      a.scores = empty(DType::f32, 1, h_q, n_page * prt::kPageTokens), a.log_total = empty(DType::f32, 1, h_q);
      return Launches{sets, [=, this, k = k, sets = sets](int64_t i) mutable {
                        a.k_pages = k.rows(i % sets * n_page, n_page), a.v_pages = v.rows(i % sets * n_page, n_page);
                        prt::attention_decode(b_, a);
                      }};
    });
    measure("score_blocks", shape, block_bytes + block_score_bytes, 4 * rows / prt::kBlockRows * static_cast<double>(q), 0, [&] {
      const auto [low, sets] = paged(prt::kPageTokens / prt::kBlockRows);
      const Tensor high = random(DType::bf16, 1, 0, low.shape[0], c_.h_kv, prt::kPageTokens / prt::kBlockRows, c_.d_head);
      prt::ScoreBlocks a{};
      a.scores = empty(DType::f32, 1, h_q, n_block), a.log_total = empty(DType::f32, 1, h_q);
      a.q = random(DType::bf16, 1, 0, 1, q);
      a.page_table = ints(shuffled(n_page), 1, n_page), a.kv_len = lengths();
      a.scale = scale;
      return Launches{sets, [=, this, low = low, sets = sets](int64_t i) mutable {
                        a.low = low.rows(i % sets * n_page, n_page), a.high = high.rows(i % sets * n_page, n_page);
                        prt::score_blocks(b_, a);
                      }};
    });
    const auto cut = [&](const char* name, int64_t unit, int64_t k, prt::Vote vote) {
      const int64_t room = n_page * prt::kPageTokens / unit, max_range = prt::top_rows_max_range(n_page * prt::kPageTokens, unit, k, 0, 0);
      measure(name, shape, unit == 1 ? score_bytes : block_score_bytes, 0, 0, [&] {
        prt::TopRows a{};
        a.ranges = empty(DType::i32, 1, c_.h_kv, max_range, 2), a.n_range = empty(DType::i32, 1, c_.h_kv);
        a.scores = random(DType::f32, 2, 0, 1, h_q, room), a.log_total = random(DType::f32, 0.1f, 10, 1, h_q);
        a.kv_len = lengths();
        a.h_q = h_q, a.unit = unit, a.k = k, a.sinks = 16, a.window = 128, a.vote = vote, a.pool = 1;
        a.scratch = scratch(prt::top_rows_scratch_bytes(1, c_.h_kv, room));
        return Launches{1, [=, this](int64_t) { prt::top_rows(b_, a); }};
      });
    };
    cut("top_rows, first head's 4096 (recycled)", 1, 4096, prt::Vote::first);
    cut("top_rows, the layer's 2048 (token_select)", 1, 2048, prt::Vote::layer);
    cut("top_rows, 64 blocks (quest)", prt::kBlockRows, 1024, prt::Vote::max);
  }

  // Clustering of n_seq contexts, then selection, attention and both for each share of the clustered rows.
  void sparse(int64_t n_seq, int64_t context) {
    const std::string shape = dims(n_seq, context);
    try {
      sparse_rows(n_seq, context, shape);
    } catch (const prt::Error& error) {
      report_.skipped.push_back({"sparse decode attention: " + shape, error.what()});
    }
    buffers_.clear();
  }

  void sparse_rows(int64_t n_seq, int64_t context, const std::string& shape) {
    const int64_t h_q = c_.h_q, h_kv = c_.h_kv, d = c_.d_head, q_size = h_q * d, kv = h_kv * d;
    const int64_t max_pages = (context + prt::kPageTokens - 1) / prt::kPageTokens, n_page = n_seq * max_pages;
    const int64_t sets = sets_of(n_page * kSlots * kv * 6), all = sets * n_page;  // the index alone is several times any L2
    const int64_t closed_end = std::max<int64_t>(1, (context - kWindow) / prt::kPageTokens), n_closed = closed_end - 1;
    const int64_t whole = n_closed / kSegmentPages, rest = n_closed % kSegmentPages;
    const Tensor k = empty(DType::bf16, all, h_kv, prt::kPageTokens, d), v = random(DType::bf16, 1, 0, all, h_kv, prt::kPageTokens, d);
    if (report_.options.structured) fill_clustered(stream_, k, ++seed_);
    else fill_random(stream_, k, 1, 0, ++seed_);
    prt::Arena measure;
    prt::take_index(measure, all, h_kv, kSlots, d);
    prt::Arena arena(take(measure.used()));
    const prt::ClusterIndex index = prt::take_index(arena, all, h_kv, kSlots, d);
    const auto index_of = [=](int64_t set) {
      const auto part = [=](const Tensor& t) { return t.rows(set * n_page, n_page); };
      return prt::ClusterIndex{part(index.centroid), part(index.variance), part(index.value), part(index.range), part(index.order)};
    };

    // Segments are whole ones, then what is left: as the library closes them after a prompt.
    const std::vector<int32_t> table = shuffled(n_page);
    std::vector<int32_t> whole_pages, rest_pages, closed;
    for (int64_t s = 0; s < n_seq; ++s) {
      const int32_t* first = table.data() + s * max_pages + 1;
      whole_pages.insert(whole_pages.end(), first, first + whole * kSegmentPages);
      rest_pages.insert(rest_pages.end(), first + whole * kSegmentPages, first + n_closed);
      closed.push_back(1);
      closed.push_back(static_cast<int32_t>(closed_end));
    }
    prt::Cluster cluster;
    cluster.iterations = 10;
    cluster.seed = 0;
    cluster.scratch = scratch(prt::cluster_scratch_bytes(b_, kSegmentPages, kSlots, d));
    const Tensor whole_list = ints(whole_pages, n_seq * whole, kSegmentPages), rest_list = ints(rest_pages, n_seq, rest);
    const auto cluster_set = [=, this](int64_t set) {
      prt::Cluster a = cluster;
      a.k_pages = k.rows(set * n_page, n_page);
      a.v_pages = v.rows(set * n_page, n_page);
      a.index = index_of(set);
      a.pages = whole_list;
      if (whole > 0) prt::cluster(b_, a);
      a.pages = rest_list;
      if (rest > 0) prt::cluster(b_, a);
    };
    for (int64_t set = 0; set < sets; ++set) cluster_set(set);

    prt::Select a;
    a.ranges = empty(DType::i32, n_seq, h_kv, prt::select_max_range(max_pages, kSlots), 2);
    a.n_range = empty(DType::i32, n_seq, h_kv);
    a.tail = empty(DType::f32, n_seq, h_q, max_pages * kSlots);
    a.mass = empty(DType::f32, n_seq, h_q);
    a.counters = empty(DType::i64, h_kv, prt::kAttentionCounters);
    prt::fill(stream_, a.counters.data, 0, a.counters.bytes());
    a.q = random(DType::bf16, 1, 0, n_seq, q_size + 2 * kv).cols(0, q_size);
    a.page_table = ints(table, n_seq, max_pages);
    a.kv_len = ints(std::vector<int32_t>(static_cast<size_t>(n_seq), static_cast<int32_t>(context)), n_seq);
    a.closed = ints(closed, n_seq, 2);
    a.scale = 1 / std::sqrt(static_cast<float>(d));
    a.p = a.budget = 1;
    a.estimator = prt::Estimator::moment;
    a.scratch = scratch(prt::select_scratch_bytes(b_, n_seq, h_q, h_kv, max_pages, kSlots));
    prt::SparseAttention attend;
    attend.out = empty(DType::bf16, n_seq, q_size);
    attend.q = a.q;
    attend.page_table = a.page_table;
    attend.ranges = a.ranges;
    attend.n_range = a.n_range;
    attend.tail = a.tail;
    attend.closed = a.closed;
    attend.scale = a.scale;
    attend.scratch = scratch(prt::sparse_attention_scratch_bytes(b_, n_seq, max_pages, h_q, h_kv, d));
    const auto select_set = [=, this, &a](int64_t set) {
      prt::Select s = a;
      s.k_pages = k.rows(set * n_page, n_page);
      s.index = index_of(set);
      prt::select(b_, s);
    };
    const auto attend_set = [=, this](int64_t set) {
      prt::SparseAttention s = attend;
      s.k_pages = k.rows(set * n_page, n_page);
      s.v_pages = v.rows(set * n_page, n_page);
      s.value = index_of(set).value;
      prt::sparse_attention(b_, s);
    };

    const auto elements = static_cast<double>(n_seq * n_closed * kSlots * kv);  // of a tensor of the index
    const auto rows = static_cast<double>(n_seq * n_closed * prt::kPageTokens);
    const double exact = static_cast<double>(n_seq * context) - rows, ends = 4 * static_cast<double>(n_seq * q_size);
    const double ranked = elements * static_cast<double>(prt::dtype_size(index.centroid.dtype) + prt::dtype_size(index.variance.dtype)) +
                          8 * elements / static_cast<double>(d);
    const double means = elements * static_cast<double>(prt::dtype_size(index.value.dtype));
    for (const double share : report_.options.selected) {
      const double chosen = calibrate(a, share, rows * static_cast<double>(h_kv), [&] { select_set(0); });
      char text[96];
      std::snprintf(text, sizeof text, "sparse decode attention, %g %% of the clustered rows%s, one layer", 100 * share,
                    report_.options.structured ? ", keys in clusters" : "");
      group_ = text;
      const double row_bytes = 4 * static_cast<double>(kv) * (chosen * rows + exact);
      const auto add = [&](const char* name, double bytes, const std::function<void(int64_t)>& launch) {
        report_.ops.push_back({.group = group_,
                               .name = name,
                               .shape = shape,
                               .us = time_us({sets, launch}),
                               .bytes = bytes,
                               .selected = share,
                               .selected_rows = chosen});
        if (!report_.options.quiet)
          std::fprintf(stderr, "%s %s, %.3f %%: %.2f us\n", name, shape.c_str(), 100 * chosen, report_.ops.back().us);
      };
      add("select", ranked + ends, [&](int64_t i) { select_set(i % sets); });
      select_set(0);
      add("sparse_attention", row_bytes + means + ends, [&](int64_t i) { attend_set(i % sets); });
      add("select + sparse_attention", ranked + means + row_bytes + ends, [&](int64_t i) {
        select_set(i % sets);
        attend_set(i % sets);
      });
    }
    group_ = "clustering, one layer";
    report_.ops.push_back({.group = group_,
                           .name = "cluster",
                           .shape = shape,
                           .us = time_us({sets, [&](int64_t i) { cluster_set(i % sets); }}),
                           .bytes = 8 * static_cast<double>(kv) * rows + ranked + means});
    if (!report_.options.quiet) std::fprintf(stderr, "cluster %s: %.2f us\n", shape.c_str(), report_.ops.back().us);
  }

  // Each query head chooses the same share of the rows; a few trials find the share whose union over a kv head's query heads is `wanted`.
  // -> the share that it is in fact
  double calibrate(prt::Select& a, double wanted, double n_row, const std::function<void()>& run) {
    std::vector<prt::AttentionCounters> counters(static_cast<size_t>(c_.h_kv));
    double budget = wanted, share = 0, low = 0, high = 1;
    for (int i = 0; i < 16; ++i) {
      a.budget = static_cast<float>(std::min(budget, 1.0));
      prt::fill(stream_, a.counters.data, 0, a.counters.bytes());
      run();
      prt::copy_to_host(stream_, counters.data(), a.counters.data, a.counters.bytes());
      prt::synchronize(stream_);
      int64_t selected = 0;
      for (const prt::AttentionCounters& c : counters) selected += c.n_selected;
      share = static_cast<double>(selected) / n_row;
      if (std::abs(share / wanted - 1) < 0.01) break;
      (share > wanted ? high : low) = budget;
      budget = share > 0 ? budget * wanted / share : budget * 2;
      if (budget <= low || budget >= high) budget = (low + high) / 2;
    }
    return share;
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
  static std::vector<int32_t> shuffled(int64_t n) {  // pages in no order, as a pool that has been in use hands them out
    std::vector<int32_t> x = counting(n);
    uint64_t state = 1;
    for (size_t i = x.size(); i > 1; --i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      std::swap(x[i - 1], x[(state >> 33) % i]);
    }
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
    if (group_.find(report_.options.match) == std::string::npos) return;
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
