#include "attention/kept_choices.h"

#include <algorithm>
#include <cstring>

#include "cuda/device.h"

namespace prt {

namespace {
template <class F>
void for_tensors(const KeptChoices::Layer& a, const KeptChoices::Layer& b, F&& f) {
  f(a.ranges, b.ranges), f(a.n_range, b.n_range), f(a.made, b.made), f(a.query, b.query), f(a.tail, b.tail);
}
}  // namespace

// States [i, i + n) of a tensor become [j, j + n) of another, or of itself.
void KeptChoices::copy_states(const Tensor& from, int64_t i, const Tensor& to, int64_t j, int64_t n) const {
  if (!from || n == 0) return;
  const Tensor source = from.rows(i, n), target = to.rows(j, n);
  if (backend_.cuda) copy_on_device(*backend_.stream, target.data, source.data, source.bytes());
  else std::memcpy(target.data, source.data, static_cast<size_t>(source.bytes()));
}

std::vector<KeptChoices::Layer> KeptChoices::lay_out(Arena& arena, int64_t n_state) const {
  std::vector<Layer> all;
  for (int64_t i = 0; i < n_layer_; ++i) {
    Layer l;
    l.ranges = arena.take(DType::i32, n_state, h_kv_, max_range_, 2);
    l.n_range = arena.take(DType::i32, n_state, h_kv_);
    l.made = arena.take(DType::i32, n_state);
    l.query = arena.take(DType::f32, n_state, w_);
    if (n_tail_ > 0) l.tail = arena.take(DType::f32, n_state, h_q_, n_tail_);
    all.push_back(l);
  }
  return all;
}

// Twice as many places; on the CPU only what is touched is really taken.
void KeptChoices::grow() {
  const int64_t n = std::max<int64_t>(4, 2 * n_state_);
  Arena measure;
  lay_out(measure, n);
  const char* what = "the choices of an attention policy";
  Buffer memory = backend_.cuda ? device_buffer(backend_.stream->device, measure.used(), what) : host_buffer(measure.used(), what, false);
  Arena arena(memory.data());
  std::vector<Layer> layers = lay_out(arena, n);
  for (size_t i = 0; i < layers_.size(); ++i)
    for_tensors(layers_[i], layers[i], [&](const Tensor& from, const Tensor& to) { copy_states(from, 0, to, 0, n_state_); });
  if (backend_.cuda) synchronize(*backend_.stream);  // what was there is not needed any more
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
  for (const Layer& l : layers_) {
    int32_t* made = l.made.as<int32_t>() + it->second;
    if (backend_.cuda) fill(*backend_.stream, made, 0, sizeof *made);
    else *made = 0;
  }
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
