// What a policy remembers of each sequence between steps: per layer a choice of rows, when it was made, and the query it was made for.
#pragma once
#include <unordered_map>
#include <vector>

#include "attention/choice.h"
#include "base/arena.h"

namespace prt {

class KeptChoices {
 public:
  struct Layer {  // n_state grows with the sequences
    Tensor ranges;   // [n_state][h_kv][max_range][2] i32
    Tensor n_range;  // [n_state][h_kv] i32
    Tensor made;     // [n_state] i32: kv_len when the choice was made; 0: there is none
    Tensor query;    // [n_state][w] f32
    Tensor tail;     // [n_state][h_q][n_tail] f32, or missing
  };
  KeptChoices(const Backend& backend, int64_t n_layer, int64_t h_kv, int64_t max_range, int64_t w, int64_t h_q = 0, int64_t n_tail = 0)
      : backend_(backend), n_layer_(n_layer), h_kv_(h_kv), max_range_(max_range), w_(w), h_q_(h_q), n_tail_(n_tail) {}

  int32_t state(int64_t seq);  // its place, a new one without choices if it has none
  const Layer& layer(int64_t i) const { return layers_[static_cast<size_t>(i)]; }
  void forget(int64_t seq);    // its choices; the place stays
  void fork(int64_t from, int64_t to);
  void free(int64_t seq);
  int64_t bytes() const { return memory_.bytes(); }
  int64_t n_state() const { return n_state_; }  // when it has changed, all is in another place

 private:
  std::vector<Layer> lay_out(Arena& arena, int64_t n_state) const;
  void grow();
  void copy_states(const Tensor& from, int64_t i, const Tensor& to, int64_t j, int64_t n) const;

  Backend backend_;
  int64_t n_layer_, h_kv_, max_range_, w_, h_q_, n_tail_;
  int64_t n_state_ = 0;
  Buffer memory_;
  std::vector<Layer> layers_;
  std::unordered_map<int64_t, int32_t> states_;  // by sequence
  std::vector<int32_t> unused_;
};

}  // namespace prt
