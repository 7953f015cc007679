#include "runtime/sampler.h"

#include <cmath>
#include <unordered_set>

#include "base/abi.h"

namespace prt {

namespace {

// Philox 4x32-10 (Salmon et al., SC 2011): the n-th number of a seed is computed, not stored, so a draw depends on nothing but
// (seed, n) and a GPU gets the same one.
float philox_uniform(uint64_t seed, uint64_t n) {
  uint32_t x[4] = {static_cast<uint32_t>(n), static_cast<uint32_t>(n >> 32), 0, 0};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t a = uint64_t{0xD2511F53u} * x[0], b = uint64_t{0xCD9E8D57u} * x[2];
    const uint32_t y[4] = {static_cast<uint32_t>(b >> 32) ^ x[1] ^ k0, static_cast<uint32_t>(b), static_cast<uint32_t>(a >> 32) ^ x[3] ^ k1,
                           static_cast<uint32_t>(a)};
    std::memcpy(x, y, sizeof x);
  }
  return static_cast<float>(x[0] >> 8) * 0x1p-24f;  // [0, 1)
}

void check_range(const char* name, float value, double lo, double hi, bool open_low) {
  check(std::isfinite(value) && value <= hi && (open_low ? value > lo : value >= lo), "sampling: ", name, " is ", value, ", expected ", lo,
        open_low ? " < " : " <= ", name, " <= ", hi);
}

}  // namespace

Sampler::Sampler(int32_t n_vocab, const prt_sampling* sampling) : n_vocab_(n_vocab) {
  check(n_vocab > 0 && n_vocab <= 1 << 24, "n_vocab is ", n_vocab, ", expected 1..", 1 << 24);
  const prt_sampling defaults = PRT_SAMPLING_INIT;
  params_ = read_struct(sampling, defaults, PRT_SIZE_THROUGH(prt_sampling, seed), "sampling");
  check_range("temperature", params_.temperature, 0, 100, false);
  check(params_.top_k >= 0, "sampling: top_k is ", params_.top_k, ", expected 0 (off) or more");
  check_range("top_p", params_.top_p, 0, 1, true);
  check_range("min_p", params_.min_p, 0, 1, false);
  check_range("repetition_penalty", params_.repetition_penalty, 0, 100, true);
  check_range("presence_penalty", params_.presence_penalty, -100, 100, false);
  check_range("frequency_penalty", params_.frequency_penalty, -100, 100, false);
  set_bias(params_.bias_ids, params_.bias_values, params_.n_bias);
  penalties_ = params_.repetition_penalty != 1 || params_.presence_penalty != 0 || params_.frequency_penalty != 0;
}

void Sampler::set_bias(const int32_t* ids, const float* values, int32_t n) {
  check(n >= 0 && n <= n_vocab_, "logit bias: ", n, " entries, expected 0..", n_vocab_);
  check(n == 0 || (ids && values), "logit bias: ids or values is NULL");
  std::unordered_set<int32_t> once;
  for (int32_t i = 0; i < n; ++i) {
    check(ids[i] >= 0 && ids[i] < n_vocab_, "logit bias: token ", ids[i], " is outside the vocabulary of ", n_vocab_);
    check(!std::isnan(values[i]) && values[i] < INFINITY, "logit bias: the value for token ", ids[i], " is ", values[i]);
    check(once.insert(ids[i]).second, "logit bias: token ", ids[i], " is given twice");
  }
  bias_ids_.assign(ids, ids + n);
  bias_values_.assign(values, values + n);
}

void Sampler::accept(const int32_t* tokens, int64_t n, bool is_prompt) {
  check(n == 0 || tokens, "tokens is NULL");
  for (int64_t i = 0; i < n; ++i)
    check(tokens[i] >= 0 && tokens[i] < n_vocab_, "token ", tokens[i], " at ", i, " is outside the vocabulary of ", n_vocab_);
  if (!penalties_) return;
  for (int64_t i = 0; i < n; ++i) {
    const auto [it, fresh] = where_.try_emplace(tokens[i], seen_.size());
    if (fresh) seen_.push_back({tokens[i], 0});
    if (!is_prompt) ++seen_[it->second].n_generated;
  }
}

SampleRow Sampler::row() const {
  return {params_.temperature,
          params_.top_p,
          params_.min_p,
          params_.repetition_penalty,
          params_.presence_penalty,
          params_.frequency_penalty,
          params_.top_k,
          static_cast<int32_t>(seen_.size()),
          static_cast<int32_t>(bias_ids_.size()),
          seen_.data(),
          bias_ids_.data(),
          bias_values_.data(),
          philox_uniform(params_.seed, n_drawn_)};
}

void Sampler::drawn(int32_t token) {
  ++n_drawn_;
  accept(&token, 1, false);
}

}  // namespace prt
