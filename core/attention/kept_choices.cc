#include "attention/kept_choices.h"

#include <algorithm>
#include <cstring>

namespace prt {

namespace {
// Copies the first `n` of t's states, or one of them to another.
void copy_states(const Tensor& from, int64_t i, const Tensor& to, int64_t j, int64_t n) {
  if (from)
    std::memcpy(to.row<char>(0) + j * to.row_stride * dtype_size(to.dtype), from.rows(i, n).data,
                static_cast<size_t>(from.rows(i, n).bytes()));
}
template <class F>
void for_tensors(const KeptChoices::Layer& a, const KeptChoices::Layer& b, F&& f) {
  f(a.ranges, b.ranges), f(a.n_range, b.n_range), f(a.made, b.made), f(a.query, b.query), f(a.tail, b.tail);
}
}  // namespace

std::vector<KeptChoices::Layer> KeptChoices::lay_out(Arena& arena, int64_t n_state) const {
  std::vector<Layer> all;
  for (int64_t i = 0; i < n_layer_; ++i) {
    Layer l;
    l.ranges = arena.take(DType::i32, n_state, h_kv_, max_range_, 2);
    l.n_range = arena.take(DType::i32, n_state, h_kv_);
    l.made = arena.take(DType::i32, n_state);
    l.query = arena.take(DType::f32, n_state, w_);
    if (n_tail_ > 0) l.tail = arena.take(DType::f32, n_state, n_tail_);
    all.push_back(l);
  }
  return all;
}

// Twice as many places, zero-filled; on the CPU only what is touched is really taken.
void KeptChoices::grow() {
  const int64_t n = std::max<int64_t>(4, 2 * n_state_);
  Arena measure;
  lay_out(measure, n);
  Buffer memory = host_buffer(measure.used(), "the choices of an attention policy", false);
  Arena arena(memory.data());
  std::vector<Layer> layers = lay_out(arena, n);
  for (size_t i = 0; i < layers_.size(); ++i)
    for_tensors(layers_[i], layers[i], [&](const Tensor& from, const Tensor& to) { copy_states(from, 0, to, 0, n_state_); });
  memory_ = std::move(memory);
  layers_ = std::move(layers);
  for (int64_t i = n; i-- > n_state_;) unused_.push_back(static_cast<int32_t>(i));
  n_state_ = n;
}

int32_t KeptChoices::state(int64_t seq) {
  const auto it = states_.find(seq);
  if (it != states_.end()) return it->second;
  if (unused_.empty()) grow();
  const int32_t place = unused_.back();
  unused_.pop_back();
  states_[seq] = place;
  forget(seq);
  return place;
}

void KeptChoices::forget(int64_t seq) {
  const auto it = states_.find(seq);
  if (it == states_.end()) return;
  for (const Layer& l : layers_) l.made.as<int32_t>()[it->second] = 0;
}

void KeptChoices::fork(int64_t from, int64_t to) {
  if (states_.find(from) == states_.end()) return;
  const int32_t target = state(to), source = state(from);
  for (const Layer& l : layers_) for_tensors(l, l, [&](const Tensor& x, const Tensor& y) { copy_states(x, source, y, target, 1); });
}

void KeptChoices::free(int64_t seq) {
  const auto it = states_.find(seq);
  if (it == states_.end()) return;
  unused_.push_back(it->second);
  states_.erase(it);
}

}  // namespace prt
