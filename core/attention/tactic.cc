#include "attention/tactic.h"

#include <chrono>

#include "cuda/device.h"

namespace prt {

namespace {
// Of the clustered rows, the most that a query head takes. A head that wants more attends almost evenly, and there the mean values of the
// rest serve as well as its rows: docs/adr/0013 has the table. Who asks for more than 0.9 of the mass means it: with p, the limit goes
// to 1.
float budget_of(const prt_attention& c) {
  if (c.p == 1) return 1;
  return c.budget > 0 ? c.budget : std::min(1.0f, 0.018f / std::min(1 - c.p, 0.1f));
}

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

int64_t index_page_bytes(const prt_attention& c, int64_t n_layer, int64_t h_kv, int64_t d, DType) {
  Arena measure;
  const ClusterIndex x = take_index(measure, 1, h_kv, slots_of(c), d);
  return n_layer * (x.centroid.bytes() + x.variance.bytes() + x.value.bytes() + x.range.bytes() + x.order.bytes());
}

Tactic::Tactic(const PolicyContext& context, const prt_attention& config) : Policy(context, config) {
  check_fits(config);
  take_memory();
  keep_choices();
}

// The query is compared as a whole: its mean over heads misses heads that turn one against the other.
void Tactic::keep_choices() {
  kept_.reset();
  if (config_.policy != PRT_ATTENTION_TACTIC_RECYCLED) return;
  const int64_t n_slot = slots_of(config_);
  kept_.emplace(backend_, n_layer(), h_kv(), select_max_range(max_pages_, n_slot), h_q_ * d_head(), h_q_, max_pages_ * n_slot);
}

bool Tactic::same_clusters(const prt_attention& c) const {
  return c.cluster == config_.cluster && c.segment == config_.segment && c.iterations == config_.iterations && c.sinks == config_.sinks &&
         c.window == config_.window && c.seed == config_.seed;
}

bool Tactic::configure(const prt_attention& config) {
  if (config.policy != PRT_ATTENTION_TACTIC && config.policy != PRT_ATTENTION_TACTIC_RECYCLED) return false;
  const bool other_clusters = !same_clusters(config);
  if (other_clusters) {
    check_fits(config);
    open_all();
  }
  config_ = config;
  if (other_clusters) take_memory();
  keep_choices();
  clear_counters();
  return true;
}

Tactic::Views Tactic::lay_out(Arena& arena, const prt_attention& c) const {
  const int64_t n_page = k_[0].shape[0], h_kv = k_[0].shape[1], d = k_[0].shape[3], n_slot = slots_of(c), n = entries_at_once();
  Views v;
  for (size_t i = 0; i < k_.size(); ++i) v.index.push_back(take_index(arena, n_page, h_kv, n_slot, d));
  v.lists = arena.take(DType::i32, 3, max_pages_);
  v.anew = arena.take(DType::i32, n);
  v.kept = arena.take(DType::i32, n);
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
  memory_ = Policy::take_memory(measure.used(), what);
  Arena arena(memory_.data());
  at_ = lay_out(arena, config_);
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
  const Tensor from = send(list(0), copy_from_.data(), n_copy), to = send(list(1), copy_to_.data(), n_copy);
  const Tensor all = send(list(2), pages, n_segment * n_page), segments = make_tensor(all.data, DType::i32, n_segment, n_page);
  for (size_t i = 0; i < k_.size(); ++i) {
    if (n_copy > 0) page_copy(backend_, {k_[i], v_[i], from, to});
    cluster(backend_, {k_[i], v_[i], segments, at_.index[i], config_.iterations, config_.seed, at_.cluster_scratch});
  }
  forget(seq);  // its tail has a place for each cluster
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
  const Tensor from = send(list(0), src, n), to = send(list(1), dst, m);
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
  Policy::truncate(seq, n_token);
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

Tactic::Place Tactic::place(int64_t layer, int64_t n_entry) const {
  if (!kept_) return {at_.ranges.rows(0, n_entry), at_.n_range.rows(0, n_entry), config_.tail ? at_.tail.rows(0, n_entry) : Tensor{}, {}};
  const KeptChoices::Layer& l = kept_->layer(layer);
  return {l.ranges, l.n_range, config_.tail ? l.tail : Tensor{}, l.made};
}

// anew: the states to choose for; missing: a choice for each entry.
void Tactic::choose(int64_t layer, const Attention& a, const PolicyRows& rows, const Tensor& anew) const {
  const int64_t m = a.kv_len.shape[0];
  const Place to = place(layer, m);
  select(backend_, {.ranges = to.ranges,
                    .n_range = to.n_range,
                    .tail = to.tail,
                    .mass = at_.mass.rows(0, m),
                    .true_mass = config_.measure ? at_.true_mass.rows(0, m) : Tensor{},
                    .counters = counters_of(layer),
                    .q = a.q,
                    .k_pages = a.k_pages,
                    .page_table = a.page_table,
                    .kv_len = a.kv_len,
                    .closed = rows.closed,
                    .index = at_.index[static_cast<size_t>(layer)],
                    .scale = a.scale,
                    .p = config_.selected > 0 ? 1 : config_.p,
                    .budget = config_.selected > 0 ? config_.selected : budget_of(config_),
                    .estimator = static_cast<Estimator>(config_.estimator),
                    .scratch = at_.select_scratch,
                    .state = anew,
                    .made = to.made});
}

void Tactic::attend(int64_t layer, const Attention& a, const PolicyRows& rows) {
  if (kept_) choose_or_reuse(layer, a, rows);
  else choose(layer, a, rows, {});
  const Place from = place(layer, a.kv_len.shape[0]);
  sparse_attention(backend_, {.out = a.out,
                              .q = a.q,
                              .k_pages = a.k_pages,
                              .v_pages = a.v_pages,
                              .page_table = a.page_table,
                              .ranges = from.ranges,
                              .n_range = from.n_range,
                              .tail = from.tail,
                              .closed = rows.closed,
                              .value = at_.index[static_cast<size_t>(layer)].value,
                              .scale = a.scale,
                              .scratch = at_.attend_scratch,
                              .state = kept_ ? rows.state : Tensor{}});
}

void Tactic::choose_or_reuse(int64_t layer, const Attention& a, const PolicyRows& rows) const {
  const int64_t m = a.kv_len.shape[0];
  const KeptChoices::Layer& l = kept_->layer(layer);
  const Tensor anew = at_.anew.rows(0, m), kept = at_.kept.rows(0, m);
  const float threshold = config_.threshold > 0 ? config_.threshold : 0.9f;
  reuse(backend_, {anew, kept, l.ranges, l.n_range, l.made, l.query, a.q, a.kv_len, rows.state, config_.stride, std::max(1, config_.check),
                   threshold});
  count_rows(backend_, {.counters = counters_of(layer),
                        .true_mass = config_.measure ? at_.true_mass.rows(0, m) : Tensor{},
                        .q = a.q,
                        .k_pages = a.k_pages,
                        .page_table = a.page_table,
                        .kv_len = a.kv_len,
                        .ranges = l.ranges,
                        .n_range = l.n_range,
                        .state = kept,
                        .made = l.made,
                        .closed = rows.closed,
                        .unit = 1,
                        .sinks = config_.sinks,
                        .window = config_.window,
                        .scale = a.scale,
                        .p = config_.p});
  choose(layer, a, rows, anew);
}

void Tactic::add_stats(prt_session_stats& s) const {
  Policy::add_stats(s);
  s.index_bytes += memory_.bytes() + (kept_ ? kept_->bytes() : 0);
  s.n_clustered_token = n_clustered_;
  s.cluster_seconds = cluster_seconds_;
}

}  // namespace prt
