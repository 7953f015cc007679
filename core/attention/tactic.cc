#include "attention/tactic.h"

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cstring>

#include "cuda/device.h"

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
  check(c.selected >= 0 && c.selected <= 1, "attention: selected is ", c.selected, ", expected 0 (rows are chosen by p) up to 1");
}

namespace {
int64_t pages_of_segment(const prt_attention& c) { return c.segment == 0 ? kMaxSegmentPages : c.segment / kPageTokens; }
int64_t slots_of(const prt_attention& c) { return kPageTokens / c.cluster; }
}  // namespace

ClusterIndex take_index(Arena& arena, int64_t n_page, int64_t h_kv, int64_t n_slot, int64_t d) {
  ClusterIndex x;
  x.centroid = arena.take(DType::f8, n_page, h_kv, n_slot, d);
  x.variance = arena.take(DType::f8, n_page, h_kv, n_slot, d);
  x.value = arena.take(DType::f8, n_page, h_kv, n_slot, d);
  x.range = arena.take(DType::i32, n_page, h_kv, n_slot, 2);
  x.order = arena.take(DType::u16, n_page, h_kv, kPageTokens);
  return x;
}

int64_t index_page_bytes(const prt_attention& c, int64_t n_layer, int64_t h_kv, int64_t d) {
  Arena measure;
  const ClusterIndex x = take_index(measure, 1, h_kv, slots_of(c), d);
  return n_layer * (x.centroid.bytes() + x.variance.bytes() + x.value.bytes() + x.range.bytes() + x.order.bytes());
}

Tactic::Tactic(const Backend& backend, PagePool& pool, const std::vector<Tensor>& k, const std::vector<Tensor>& v, int64_t h_q,
               int64_t max_context, const prt_attention& config)
    : backend_(backend), pool_(pool), k_(k), v_(v), h_q_(h_q), max_pages_((max_context + kPageTokens - 1) / kPageTokens), config_(config) {
  check_attention_config(config);
  check_fits(config);
  take_memory();
}

bool Tactic::same_clusters(const prt_attention& c) const {
  return c.cluster == config_.cluster && c.segment == config_.segment && c.iterations == config_.iterations && c.sinks == config_.sinks &&
         c.window == config_.window && c.seed == config_.seed;
}

void Tactic::configure(const prt_attention& config) {
  check_attention_config(config);
  const bool other_clusters = !same_clusters(config);
  if (other_clusters) {
    check_fits(config);
    open_all();
  }
  config_ = config;
  if (other_clusters) take_memory();
  else clear_counters();
}

Tactic::Views Tactic::lay_out(Arena& arena, const prt_attention& c) const {
  const int64_t n_page = k_[0].shape[0], h_kv = k_[0].shape[1], d = k_[0].shape[3], n_slot = slots_of(c), n = entries_at_once();
  Views v;
  for (size_t i = 0; i < k_.size(); ++i) v.index.push_back(take_index(arena, n_page, h_kv, n_slot, d));
  v.counters = arena.take(DType::i64, static_cast<int64_t>(k_.size()), h_kv, kAttentionCounters);
  v.lists = arena.take(DType::i32, 3, max_pages_);
  v.ranges = arena.take(DType::i32, n, h_kv, select_max_range(max_pages_, n_slot), 2);
  v.n_range = arena.take(DType::i32, n, h_kv);
  v.tail = arena.take(DType::f32, n, h_q_, max_pages_ * n_slot);
  v.mass = arena.take(DType::f32, n, h_q_);
  v.true_mass = arena.take(DType::f32, n, h_q_);
  // Clustering happens between steps.
  Arena step = arena.here(), between = arena.here();
  v.select_scratch = step.take(DType::f32, select_scratch_bytes(backend_, n, h_q_, h_kv, max_pages_, n_slot) / 4);
  v.attend_scratch = step.take(DType::f32, sparse_attention_scratch_bytes(backend_, n, max_pages_, h_q_, h_kv, d) / 4);
  const int64_t longest = std::min(pages_of_segment(c), max_pages_);
  v.cluster_scratch =
      between.take(DType::f32, std::max(cluster_scratch_bytes(backend_, longest, n_slot, d), uncluster_scratch_bytes(longest, d)) / 4);
  arena.skip(std::max(step.used(), between.used()));
  return v;
}

void Tactic::check_fits(const prt_attention& c) const {
  Arena measure;
  lay_out(measure, c);
  const int64_t n_page = k_[0].shape[0],
                index = n_page * index_page_bytes(c, static_cast<int64_t>(k_.size()), k_[0].shape[1], k_[0].shape[3]);
  const int64_t work = measure.used() - index, kv = 2 * static_cast<int64_t>(k_.size()) * k_[0].bytes();
  // On a GPU what an earlier configuration holds will be given back; on the CPU only what was touched is really taken.
  const int64_t free = backend_.cuda ? device_memory_free(backend_.stream->device) + memory_.bytes() : host_memory_free();
  if (measure.used() <= free) return;
  const int64_t fits =
      std::max<int64_t>(0, free + kv - work - (int64_t{16} << 20)) / ((kv + index) / n_page);  // a GPU rounds allocations up
  fail(PRT_OUT_OF_MEMORY, "attention 'tactic' needs ", index >> 20, " MiB for the index of ", n_page, " KV pages and ", work >> 20,
       " MiB to work in; ", free >> 20, " MiB are free", backend_.cuda ? text(" on cuda:", backend_.stream->device) : "",
       ": a session with an n_page of ", fits, " or less has room for it");
}

void Tactic::take_memory() {
  Arena measure;
  lay_out(measure, config_);
  const char* what = "the index of attention 'tactic'";
  memory_ = Buffer();  // first, so that both need not fit
  memory_ = backend_.cuda ? device_buffer(backend_.stream->device, measure.used(), what) : host_buffer(measure.used(), what, false);
  Arena arena(memory_.data());
  at_ = lay_out(arena, config_);
  clear_counters();
}

void Tactic::clear_counters() {
  if (backend_.cuda) fill(*backend_.stream, at_.counters.data, 0, at_.counters.bytes());
  else std::memset(at_.counters.data, 0, static_cast<size_t>(at_.counters.bytes()));
}

Tensor Tactic::send(int64_t list, const int32_t* pages, int64_t n) const {
  if (!backend_.cuda) return make_tensor(const_cast<int32_t*>(pages), DType::i32, n);
  int32_t* to = at_.lists.row<int32_t>(list);
  copy_to_device(*backend_.stream, to, pages, n * 4);
  return make_tensor(to, DType::i32, n);
}

int64_t Tactic::closed_end(const Sequence& s) const {
  auto page = static_cast<size_t>(first_page());
  while (page < s.pages.size() && pool_.segment(s.pages[page]) > 0) page += static_cast<size_t>(pool_.segment(s.pages[page]));
  return static_cast<int64_t>(page);
}

void Tactic::prepare(const int64_t* seq, int64_t n) {
  const auto start = std::chrono::steady_clock::now();
  const int64_t before = n_clustered_;
  for (int64_t i = 0; i < n; ++i) close(seq[i]);
  if (n_clustered_ == before) return;
  if (backend_.cuda) synchronize(*backend_.stream);  // a wait of microseconds every 2048 tokens, so that the time below is the truth
  cluster_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Whole segments as far as there are rows outside the window, and after a prompt also what is left of it.
void Tactic::close(int64_t seq) {
  for (;;) {
    const Sequence& s = pool_.at(seq);
    const int64_t page = closed_end(s), ready = (s.length - config_.window) / kPageTokens - page;
    const int64_t whole = config_.segment == 0 && !s.prompt_ended ? kExtendPages : pages_of_segment(config_);
    if (s.length < config_.window || ready <= 0) break;
    const bool rest = s.prompt_ended && ready < whole;
    if (rest ? ready < kLeastPages : ready < whole) break;
    const int64_t n_page = rest ? ready : whole, most = std::min(ready / n_page, segments_at_once(n_page));
    copy_from_.clear();
    copy_to_.clear();
    int64_t n_segment = 0;
    while (n_segment < most && pool_.own(seq, page + n_segment * n_page, n_page, from_, to_)) {
      copy_from_.insert(copy_from_.end(), from_.begin(), from_.end());
      copy_to_.insert(copy_to_.end(), to_.begin(), to_.end());
      ++n_segment;
    }
    if (n_segment == 0) break;  // no free pages: these rows stay exact
    close_segments(seq, page, n_segment, n_page);
  }
  pool_.close_prompt(seq);
}

void Tactic::close_segments(int64_t seq, int64_t page, int64_t n_segment, int64_t n_page) {
  const auto n_copy = static_cast<int64_t>(copy_from_.size());
  const int32_t* pages = pool_.at(seq).pages.data() + page;
  const Tensor from = send(0, copy_from_.data(), n_copy), to = send(1, copy_to_.data(), n_copy);
  const Tensor list = send(2, pages, n_segment * n_page), segments = make_tensor(list.data, DType::i32, n_segment, n_page);
  for (size_t i = 0; i < k_.size(); ++i) {
    if (n_copy > 0) page_copy(backend_, {k_[i], v_[i], from, to});
    cluster(backend_, {k_[i], v_[i], segments, at_.index[i], config_.iterations, config_.seed, at_.cluster_scratch});
  }
  for (int64_t s = 0; s < n_segment; ++s) pool_.set_segment(pages[s * n_page], static_cast<int32_t>(n_page));
  n_clustered_ += n_segment * n_page * kPageTokens;
}

void Tactic::restore(int64_t seq, const std::vector<int32_t>& segments) {
  const auto start = std::chrono::steady_clock::now();
  copy_from_.clear();
  copy_to_.clear();
  int64_t page = first_page();
  for (size_t i = 0; i < segments.size();) {
    const int64_t n = segments[i], most = segments_at_once(n);
    check(n <= pages_of_segment(config_), "import: a segment of ", n, " pages, expected ", pages_of_segment(config_), " or fewer");
    int64_t alike = 1;
    while (alike < most && i + static_cast<size_t>(alike) < segments.size() && segments[i + static_cast<size_t>(alike)] == n) ++alike;
    close_segments(seq, page, alike, n);
    page += alike * n;
    i += static_cast<size_t>(alike);
  }
  if (backend_.cuda) synchronize(*backend_.stream);
  cluster_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Pages src of a closed segment, as they were before, go to dst.
void Tactic::open(const int32_t* src, int64_t n, const int32_t* dst, int64_t m) {
  const Tensor from = send(0, src, n), to = send(1, dst, m);
  for (size_t i = 0; i < k_.size(); ++i) uncluster(backend_, {k_[i], v_[i], at_.index[i].order, from, to, at_.cluster_scratch});
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

void Tactic::closed_pages(int64_t seq, int32_t out[2]) const {
  const int64_t end = closed_end(pool_.at(seq));
  out[0] = static_cast<int32_t>(end == first_page() ? 0 : first_page());  // none: there may be fewer pages than that
  out[1] = static_cast<int32_t>(end == first_page() ? 0 : end);
}

void Tactic::decode(int64_t layer, const Attention& a, const Tensor& closed) {
  if (layer < config_.dense_layers) return attention_decode(backend_, a);
  const int64_t n = a.kv_len.shape[0];
  const ClusterIndex& index = at_.index[static_cast<size_t>(layer)];
  const Tensor &k = k_[static_cast<size_t>(layer)], &v = v_[static_cast<size_t>(layer)];
  for (int64_t e = 0; e < n; e += entries_at_once()) {
    const int64_t m = std::min(entries_at_once(), n - e);
    const Select s{.ranges = at_.ranges.rows(0, m),
                   .n_range = at_.n_range.rows(0, m),
                   .tail = config_.tail ? at_.tail.rows(0, m) : Tensor{},
                   .mass = at_.mass.rows(0, m),
                   .true_mass = config_.measure ? at_.true_mass.rows(0, m) : Tensor{},
                   .counters = make_tensor(at_.counters.row<int64_t>(layer), DType::i64, k.shape[1], kAttentionCounters),
                   .q = a.q.rows(e, m),
                   .k_pages = k,
                   .page_table = a.page_table.rows(e, m),
                   .kv_len = a.kv_len.rows(e, m),
                   .closed = closed.rows(e, m),
                   .index = index,
                   .scale = a.scale,
                   .p = config_.p,
                   .fraction = config_.selected,
                   .estimator = static_cast<Estimator>(config_.estimator),
                   .scratch = at_.select_scratch};
    select(backend_, s);
    sparse_attention(backend_, {.out = a.out.rows(e, m),
                                .q = s.q,
                                .k_pages = k,
                                .v_pages = v,
                                .page_table = s.page_table,
                                .ranges = s.ranges,
                                .n_range = s.n_range,
                                .tail = s.tail,
                                .closed = s.closed,
                                .value = index.value,
                                .scale = a.scale,
                                .scratch = at_.attend_scratch});
  }
}

AttentionCounters Tactic::counters(int64_t layer, int64_t kv_head) const {
  const auto n_layer = static_cast<int64_t>(k_.size()), h_kv = k_[0].shape[1];
  check(layer >= -1 && layer < n_layer, "attention stats: layer is ", layer, ", expected -1 (all) or 0..", n_layer - 1);
  check(kv_head >= -1 && kv_head < h_kv, "attention stats: kv_head is ", kv_head, ", expected -1 (all) or 0..", h_kv - 1);
  const int64_t* all = at_.counters.as<int64_t>();
  std::vector<int64_t> copy;
  if (backend_.cuda) {
    copy.resize(static_cast<size_t>(at_.counters.size()));
    copy_to_host(*backend_.stream, copy.data(), all, at_.counters.bytes());
    synchronize(*backend_.stream);
    all = copy.data();
  }
  std::array<int64_t, kAttentionCounters> sum{};
  for (int64_t l = 0; l < n_layer; ++l)
    for (int64_t h = 0; h < h_kv; ++h)
      if ((layer < 0 || l == layer) && (kv_head < 0 || h == kv_head))
        for (int64_t i = 0; i < kAttentionCounters; ++i) sum[static_cast<size_t>(i)] += all[(l * h_kv + h) * kAttentionCounters + i];
  return std::bit_cast<AttentionCounters>(sum);
}

}  // namespace prt
