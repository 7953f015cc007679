#include "attention/choice_policy.h"

namespace prt {

ChoicePolicy::ChoicePolicy(const PolicyContext& context, const prt_attention& config, const Needs& needs)
    : Policy(context, config), needs_(needs) {
  if (config_.k > 0 || config_.budget > 0) needs_.p = 0;
  if (config_.k > 0) needs_.k = config_.k;
  max_range_ = needs_.unit == 0 ? 2 : top_rows_max_range(max_pages_ * kPageTokens, needs_.unit, needs_.k, config_.budget, needs_.p);
  Arena measure;
  lay_out(measure);
  memory_ = take_memory(measure.used(), "the working memory of an attention policy");
  Arena arena(memory_.data());
  lay_out(arena);
  if (needs_.w > 0) kept_.emplace(backend_, n_layer(), h_kv(), max_range_, needs_.w);
}

void ChoicePolicy::lay_out(Arena& arena) {
  const int64_t n = entries_at_once(), room = needs_.unit == 0 ? 0 : max_pages_ * kPageTokens / needs_.unit;
  ranges_ = arena.take(DType::i32, n, h_kv(), max_range_, 2);
  n_range_ = arena.take(DType::i32, n, h_kv());
  out_ = arena.take(backend_.activation(k_[0].dtype), 1, h_q_ * d_head());
  scores_ = arena.take(DType::f32, n, h_q_, room);
  log_total_ = arena.take(DType::f32, n, h_q_);
  true_mass_ = arena.take(DType::f32, n, h_q_);
  anew_ = arena.take(DType::i32, n);
  kept_states_ = arena.take(DType::i32, n);
  choose_scratch_ = arena.take(DType::f32, top_rows_scratch_bytes(n, h_kv(), room) / 4);
  attend_scratch_ = arena.take(DType::f32, sparse_attention_scratch_bytes(backend_, n, max_pages_, h_q_, h_kv(), d_head()) / 4);
}

ChoicePolicy::Place ChoicePolicy::place(int64_t layer, int64_t n_entry) const {
  if (!kept_) return {ranges_.rows(0, n_entry), n_range_.rows(0, n_entry), {}};
  const KeptChoices::Layer& l = kept_->layer(layer);
  return {l.ranges, l.n_range, l.made};
}

void ChoicePolicy::score(const Attention& a, const Tensor& anew) const {
  const int64_t n = a.kv_len.shape[0];
  score_rows(backend_, {scores(n), log_total(n), a.q, a.k_pages, a.page_table, a.kv_len, anew, a.scale});
}

void ChoicePolicy::choose(int64_t layer, const Attention& a, const Tensor& anew, Vote vote, int64_t pool) const {
  const int64_t n = a.kv_len.shape[0];
  const Place to = place(layer, n);
  top_rows(backend_, {.ranges = to.ranges,
                      .n_range = to.n_range,
                      .made = to.made,
                      .counters = counters_of(layer),
                      .scores = needs_.unit == 0 ? Tensor{} : scores(n),
                      .log_total = needs_.unit == 0 ? Tensor{} : log_total(n),
                      .kv_len = a.kv_len,
                      .state = anew,
                      .h_q = h_q_,
                      .unit = std::max<int64_t>(1, needs_.unit),
                      .k = needs_.k,
                      .fraction = config_.budget,
                      .p = needs_.p,
                      .sinks = config_.sinks,
                      .window = config_.window,
                      .vote = vote,
                      .pool = pool,
                      .scratch = choose_scratch_});
}

void ChoicePolicy::attend_rows(int64_t layer, const Attention& a, const Tensor& state) const {
  const Place from = place(layer, a.kv_len.shape[0]);
  sparse_attention(backend_, {.out = a.out,
                              .q = a.q,
                              .k_pages = a.k_pages,
                              .v_pages = a.v_pages,
                              .page_table = a.page_table,
                              .ranges = from.ranges,
                              .n_range = from.n_range,
                              .tail = {},
                              .closed = {},
                              .value = {},
                              .scale = a.scale,
                              .scratch = attend_scratch_,
                              .state = state});
}

void ChoicePolicy::count(int64_t layer, const Attention& a, const Tensor& state) const {
  const int64_t n = a.kv_len.shape[0];
  const Place from = place(layer, n);
  count_rows(backend_, {.counters = counters_of(layer),
                        .true_mass = config_.measure ? true_mass_.rows(0, n) : Tensor{},
                        .q = a.q,
                        .k_pages = a.k_pages,
                        .page_table = a.page_table,
                        .kv_len = a.kv_len,
                        .ranges = from.ranges,
                        .n_range = from.n_range,
                        .state = state,
                        .made = from.made,
                        .closed = {},
                        .unit = std::max<int64_t>(1, needs_.unit),
                        .sinks = config_.sinks,
                        .window = config_.window,
                        .scale = a.scale,
                        .p = config_.p});
}

void ChoicePolicy::reuse_kept(int64_t layer, const Attention& a, const PolicyRows& rows, int64_t stride, int64_t check,
                              float threshold) const {
  const int64_t n = a.kv_len.shape[0];
  const KeptChoices::Layer& l = kept_->layer(layer);
  reuse(backend_, {anew(n), kept(n), l.ranges, l.n_range, l.made, l.query, a.q, a.kv_len, rows.state, stride, check, threshold});
}

void ChoicePolicy::add_stats(prt_session_stats& s) const {
  Policy::add_stats(s);
  s.index_bytes += memory_.bytes() + (kept_ ? kept_->bytes() : 0);
}

}  // namespace prt
