#include "attention/recycled.h"

namespace prt {

// A schedule by similarity has no stride of its own: without one a full step comes when the query asks for it.
Recycled::Recycled(const PolicyContext& x, const prt_attention& c)
    : ChoicePolicy(x, c, {.k = 4096, .w = x.k[0].shape[3]}),
      stride_(c.stride > 0  ? c.stride
              : c.check > 0 ? 0
                            : 50),
      threshold_(c.threshold > 0 ? c.threshold : 0.8f) {}

void Recycled::full_step(int64_t layer, Attention a) const {
  const int64_t n = a.kv_len.shape[0];
  a.scores = scores(n), a.log_total = log_total(n), a.state = anew(n);
  attention_decode(backend_, a);
  choose(layer, a, anew(n), config_.group == PRT_GROUP_MAX ? Vote::max : Vote::first, std::max(1, config_.pool));
}

void Recycled::attend(int64_t layer, const Attention& a, const PolicyRows& rows) {
  const int64_t n = a.kv_len.shape[0];
  reuse_kept(layer, a, rows, stride_, config_.check, threshold_);
  full_step(layer, a);
  attend_rows(layer, a, kept(n));
  count(layer, a, kept(n));
}

void Recycled::observe(int64_t layer, const Attention& a, const PolicyRows& rows) {
  if (layer < config_.dense_layers) return;
  reuse_kept(layer, a, rows, 1, 0, 0);  // a choice never serves for longer than one token: all are made anew
  Attention again = a;  // its result is there already
  again.out = spare_out();
  full_step(layer, again);
}

}  // namespace prt
