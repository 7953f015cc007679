#include "attention/tactic.h"

#include <algorithm>
#include <chrono>

namespace prt {

void check_attention_config(const prt_attention& c) {
  check(c.policy == PRT_ATTENTION_FULL || c.policy == PRT_ATTENTION_TACTIC, "attention: policy is ", c.policy,
        ", expected 0 (full) or 1 (tactic)");
  check(c.p > 0 && c.p <= 1, "attention: p is ", c.p, ", expected above 0 and up to 1");
  check(c.cluster >= 4 && c.cluster <= 64 && (c.cluster & (c.cluster - 1)) == 0, "attention: cluster is ", c.cluster,
        ", expected 4, 8, 16, 32 or 64");
  const int64_t most = kMaxSegmentPages * kPageTokens;
  check(c.segment == 0 || (c.segment >= 256 && c.segment <= most && c.segment % kPageTokens == 0), "attention: segment is ", c.segment,
        ", expected 0 (everything there is when decoding begins) or a multiple of ", kPageTokens, " from 256 to ", most);
  const auto in_range = [](const char* name, int64_t value, int64_t lo, int64_t hi) {
    check(value >= lo && value <= hi, "attention: ", name, " is ", value, ", expected ", lo, "..", hi);
  };
  in_range("iterations", c.iterations, 1, 1000);
  in_range("estimator", c.estimator, PRT_ESTIMATOR_FIT, PRT_ESTIMATOR_MOMENT);
  in_range("tail", c.tail, 0, 1);
  in_range("sinks", c.sinks, 0, 1 << 16);
  in_range("window", c.window, 0, 1 << 16);
  in_range("min_context", c.min_context, 1, 1 << 24);
  in_range("dense_layers", c.dense_layers, 0, 1 << 16);
  in_range("measure", c.measure, 0, 1);
}

Tactic::Tactic(const Backend& backend, PagePool& pool, const std::vector<Tensor>& k, const std::vector<Tensor>& v, int64_t h_q,
               int64_t max_context, const prt_attention& config)
    : backend_(backend), pool_(pool), k_(k), v_(v), h_q_(h_q), max_pages_((max_context + kPageTokens - 1) / kPageTokens), config_(config) {
  if (backend.cuda) no_gpu_form();
  check_attention_config(config);
  take_memory();
}

bool Tactic::same_clusters(const prt_attention& c) const {
  return c.cluster == config_.cluster && c.segment == config_.segment && c.iterations == config_.iterations && c.sinks == config_.sinks &&
         c.window == config_.window && c.seed == config_.seed;
}

void Tactic::configure(const prt_attention& config) {
  check_attention_config(config);
  counters_.assign(counters_.size(), {});
  if (same_clusters(config)) {
    config_ = config;
    return;
  }
  open_all();
  config_ = config;
  take_memory();
}

int64_t Tactic::segment_pages() const { return config_.segment == 0 ? kMaxSegmentPages : config_.segment / kPageTokens; }

int64_t Tactic::layout(Arena& arena) {
  const int64_t h_kv = k_[0].shape[1], d = k_[0].shape[3], n_slot = kPageTokens / config_.cluster;
  ranges_ = arena.take(DType::i32, kEntries, h_kv, select_max_range(max_pages_, n_slot), 2);
  n_range_ = arena.take(DType::i32, kEntries, h_kv);
  tail_ = arena.take(DType::f32, kEntries, h_q_, d + 2);
  mass_ = arena.take(DType::f32, kEntries, h_q_);
  true_mass_ = arena.take(DType::f32, kEntries, h_q_);
  // Clustering happens between steps.
  Arena step = arena.here(), between = arena.here();
  select_scratch_ = step.take(DType::f32, select_scratch_bytes(kEntries, h_q_, max_pages_, n_slot) / 4);
  attend_scratch_ = step.take(DType::f32, sparse_attention_scratch_bytes(backend_, kEntries, max_pages_, h_q_, h_kv, d) / 4);
  const int64_t n = std::min(segment_pages(), max_pages_);
  cluster_scratch_ = between.take(DType::f32, std::max(cluster_scratch_bytes(backend_, n, n_slot, d), uncluster_scratch_bytes(n, d)) / 4);
  arena.skip(std::max(step.used(), between.used()));
  return arena.used();
}

void Tactic::take_memory() {
  const int64_t n_page = k_[0].shape[0], h_kv = k_[0].shape[1], d = k_[0].shape[3], n_slot = kPageTokens / config_.cluster;
  const auto lay_out = [&](Arena& arena) {
    index_.clear();
    for (size_t i = 0; i < k_.size(); ++i) {
      ClusterIndex x;
      x.centroid = arena.take(DType::bf16, n_page, h_kv, n_slot, d);
      x.variance = arena.take(DType::bf16, n_page, h_kv, n_slot, d);
      x.value = arena.take(DType::bf16, n_page, h_kv, n_slot, d);
      x.range = arena.take(DType::i32, n_page, h_kv, n_slot, 2);
      x.order = arena.take(DType::u16, n_page, h_kv, kPageTokens);
      index_.push_back(x);
    }
    return arena.used();
  };
  Arena measure;
  const int64_t bytes = lay_out(measure), workspace = layout(measure) - bytes;
  if (bytes + workspace > host_memory_free())
    fail(PRT_OUT_OF_MEMORY, "attention 'tactic' needs ", bytes >> 20, " MiB for its index and ", workspace >> 20, " MiB to work in; ",
         host_memory_free() >> 20, " MiB are free");
  index_buffer_ = host_buffer(bytes, "the index of attention 'tactic'", false);
  workspace_ = host_buffer(workspace, "the workspace of attention 'tactic'", false);
  Arena index(index_buffer_.data()), work(workspace_.data());
  lay_out(index);
  layout(work);
  counters_.assign(k_.size() * static_cast<size_t>(h_kv), {});
}

int64_t Tactic::closed_end(const Sequence& s) const {
  auto page = static_cast<size_t>(first_page());
  while (page < s.pages.size() && pool_.segment(s.pages[page]) > 0) page += static_cast<size_t>(pool_.segment(s.pages[page]));
  return static_cast<int64_t>(page);
}

void Tactic::prepare(const int64_t* seq, int64_t n) {
  const auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < n; ++i) close(seq[i]);
  cluster_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Whole segments as far as there are rows outside the window, and after a prompt also what is left of it.
void Tactic::close(int64_t seq) {
  for (;;) {
    const Sequence& s = pool_.at(seq);
    const int64_t page = closed_end(s), ready = (s.length - config_.window) / kPageTokens - page;
    const int64_t whole = config_.segment == 0 && !s.prompt_ended ? kExtendPages : segment_pages();
    if (s.length < config_.window || ready <= 0) break;
    const bool rest = s.prompt_ended && ready < whole;
    if (rest ? ready < kLeastPages : ready < whole) break;
    const int64_t n_page = rest ? ready : whole, n_segment = std::min(ready / n_page, kSegmentsAtOnce);
    if (!pool_.own(seq, page, n_segment * n_page, copy_from_, copy_to_)) break;  // no free pages: these rows stay exact
    close_segments(seq, page, n_segment, n_page);
  }
  pool_.close_prompt(seq);
}

void Tactic::close_segments(int64_t seq, int64_t page, int64_t n_segment, int64_t n_page) {
  const auto n_copy = static_cast<int64_t>(copy_from_.size());
  int32_t* pages = const_cast<int32_t*>(pool_.at(seq).pages.data()) + page;
  for (size_t i = 0; i < k_.size(); ++i) {
    if (n_copy > 0)
      page_copy(backend_,
                {k_[i], v_[i], make_tensor(copy_from_.data(), DType::i32, n_copy), make_tensor(copy_to_.data(), DType::i32, n_copy)});
    cluster(backend_, {k_[i], v_[i], make_tensor(pages, DType::i32, n_segment, n_page), index_[i], config_.iterations, config_.seed,
                       cluster_scratch_});
  }
  for (int64_t s = 0; s < n_segment; ++s) pool_.set_segment(pages[s * n_page], static_cast<int32_t>(n_page));
  n_clustered_ += n_segment * n_page * kPageTokens;
}

void Tactic::open(const int32_t* src, int64_t n, const int32_t* dst, int64_t m) {
  for (size_t i = 0; i < k_.size(); ++i)
    uncluster(backend_, {k_[i], v_[i], index_[i].order, make_tensor(const_cast<int32_t*>(src), DType::i32, n),
                         make_tensor(const_cast<int32_t*>(dst), DType::i32, m), cluster_scratch_});
}

void Tactic::open_all() {
  for (const int64_t seq : pool_.ids()) {
    const Sequence& s = pool_.at(seq);
    for (auto page = static_cast<size_t>(first_page()); page < s.pages.size(); ++page) {
      const int32_t n = pool_.segment(s.pages[page]);  // 0 also if another sequence that shares it came first
      if (n == 0) continue;
      open(s.pages.data() + page, n, s.pages.data() + page, n);
      pool_.set_segment(s.pages[page], 0);
    }
    pool_.end_prompt(seq);
  }
}

// A segment that ends up cut gets its old order back: in place if nobody else holds it, else in pages of its own.
void Tactic::truncate(int64_t seq, int64_t n_token) {
  const Sequence& s = pool_.at(seq);
  if (n_token < 0 || n_token > s.length) return;  // the pool says so
  for (int64_t page = first_page(), end = closed_end(s); page < end;) {
    const int64_t n = pool_.segment(s.pages[static_cast<size_t>(page)]), next = page + n;
    if (page * kPageTokens < n_token && n_token < next * kPageTokens) {
      const int64_t keep = (n_token + kPageTokens - 1) / kPageTokens - page;
      const std::vector<int32_t> src(s.pages.begin() + page, s.pages.begin() + next);
      if (pool_.shared(src[0])) {
        const std::vector<int32_t> dst = pool_.reserve(keep);  // fails if there are too few
        open(src.data(), n, dst.data(), keep);
        pool_.swap_tail(seq, page, dst, n_token);
      } else {
        open(src.data(), n, src.data(), n);
        pool_.set_segment(src[0], 0);
      }
      pool_.end_prompt(seq);
      return;
    }
    page = next;
  }
}

void Tactic::begin(const int64_t* seq, int64_t n) {
  closed_.clear();
  for (int64_t i = 0; i < n; ++i) {
    const int64_t end = closed_end(pool_.at(seq[i])), first = std::min(first_page(), end);
    closed_.push_back(static_cast<int32_t>(first));
    closed_.push_back(static_cast<int32_t>(end));
    if (end == first_page()) closed_.end()[-2] = closed_.back() = 0;  // none: there may be fewer pages than that
  }
}

void Tactic::decode(int64_t layer, const Attention& a) {
  if (layer < config_.dense_layers) return attention_decode(backend_, a);
  const int64_t n = a.kv_len.shape[0];
  const auto i = static_cast<size_t>(layer);
  for (int64_t e = 0; e < n; e += kEntries) {
    const int64_t m = std::min(kEntries, n - e);
    const Tensor tail = config_.tail ? tail_.rows(0, m) : Tensor{}, true_mass = config_.measure ? true_mass_.rows(0, m) : Tensor{};
    const Select s{ranges_.rows(0, m),
                   n_range_.rows(0, m),
                   tail,
                   mass_.rows(0, m),
                   true_mass,
                   a.q.rows(e, m),
                   k_[i],
                   a.page_table.rows(e, m),
                   a.kv_len.rows(e, m),
                   make_tensor(closed_.data() + 2 * e, DType::i32, m, 2),
                   index_[i],
                   a.scale,
                   config_.p,
                   static_cast<Estimator>(config_.estimator),
                   select_scratch_};
    select(backend_, s);
    sparse_attention(backend_, {a.out.rows(e, m), s.q, k_[i], v_[i], s.page_table, s.ranges, s.n_range, tail, a.scale, attend_scratch_});
    count(layer, s, m);
  }
}

void Tactic::count(int64_t layer, const Select& s, int64_t n_entry) {
  const int64_t h_kv = k_[0].shape[1], group = h_q_ / h_kv;
  for (int64_t e = 0; e < n_entry; ++e)
    for (int64_t h = 0; h < h_kv; ++h) {
      AttentionCounters& c = counters_[static_cast<size_t>(layer * h_kv + h)];
      const int32_t *range = s.ranges.row<int32_t>(e) + h * s.ranges.shape[2] * 2, *closed = s.closed.row<int32_t>(e);
      int64_t rows = 0;
      for (int64_t i = 0; i < s.n_range.row<int32_t>(e)[h]; ++i) rows += range[2 * i + 1];
      const int64_t context = s.kv_len.as<int32_t>()[e], exact = context - (closed[1] - closed[0]) * kPageTokens;
      ++c.n_step;
      c.n_context += context;
      c.n_exact += exact;
      c.n_selected += rows - exact;
      for (int64_t g = h * group; g < (h + 1) * group; ++g) {
        ++c.n_mass;
        c.mass += static_cast<double>(s.mass.row<float>(e)[g]);
        if (!s.true_mass) continue;
        const float share = s.true_mass.row<float>(e)[g];
        ++c.n_true;
        c.true_mass += static_cast<double>(share);
        c.n_reached += share >= config_.p;
        ++c.histogram[std::clamp(static_cast<int>(share * PRT_MASS_BINS), 0, PRT_MASS_BINS - 1)];
      }
    }
}

AttentionCounters Tactic::counters(int64_t layer, int64_t kv_head) const {
  const auto n_layer = static_cast<int64_t>(k_.size()), h_kv = k_[0].shape[1];
  check(layer >= -1 && layer < n_layer, "attention stats: layer is ", layer, ", expected -1 (all) or 0..", n_layer - 1);
  check(kv_head >= -1 && kv_head < h_kv, "attention stats: kv_head is ", kv_head, ", expected -1 (all) or 0..", h_kv - 1);
  AttentionCounters all;
  for (int64_t l = 0; l < n_layer; ++l)
    for (int64_t h = 0; h < h_kv; ++h) {
      if ((layer >= 0 && l != layer) || (kv_head >= 0 && h != kv_head)) continue;
      const AttentionCounters& c = counters_[static_cast<size_t>(l * h_kv + h)];
      all.n_step += c.n_step, all.n_context += c.n_context, all.n_selected += c.n_selected, all.n_exact += c.n_exact;
      all.n_mass += c.n_mass, all.mass += c.mass, all.n_true += c.n_true, all.true_mass += c.true_mass, all.n_reached += c.n_reached;
      for (int b = 0; b < PRT_MASS_BINS; ++b) all.histogram[b] += c.histogram[b];
    }
  return all;
}

}  // namespace prt
