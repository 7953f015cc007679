#include "model/config.h"

#include <cmath>

#include "base/abi.h"
#include "ops/ops.h"

namespace prt {

namespace {
void in_range(const char* name, int64_t value, int64_t lo, int64_t hi) {
  check(value >= lo && value <= hi, "config: ", name, " is ", value, ", expected ", lo, "..", hi);
}
void finite_in(const char* name, double value, double lo, double hi) {
  check(std::isfinite(value) && value >= lo && value <= hi, "config: ", name, " is ", value, ", expected ", lo, "..", hi);
}
}  // namespace

ModelConfig read_model_config(const prt_model_config* config) {
  const prt_model_config defaults = PRT_MODEL_CONFIG_INIT;
  ModelConfig c;
  static_cast<prt_model_config&>(c) = read_struct(config, defaults, PRT_SIZE_THROUGH(prt_model_config, rope_truncate), "config");
  float_dtype(c.dtype, "config: dtype");
  in_range("n_layer", c.n_layer, 1, 1024);
  in_range("h_q", c.h_q, 1, 1024);
  in_range("h_kv", c.h_kv, 1, c.h_q);
  check(c.h_q % c.h_kv == 0, "config: h_q ", c.h_q, " is not a multiple of h_kv ", c.h_kv);
  in_range("d_head", c.d_head, 8, kMaxHead);
  check(c.d_head % 2 == 0, "config: d_head is ", c.d_head, ", expected an even number");
  in_range("d_model", c.d_model, 1, 1 << 17);
  in_range("d_ff", c.d_ff, 1, 1 << 20);
  in_range("n_vocab", c.n_vocab, 1, 1 << 24);
  in_range("max_position", c.max_position, 1, 1 << 24);
  finite_in("norm_eps", c.norm_eps, 0, 0.1);
  for (int32_t* flag : {&c.tied_embeddings, &c.qkv_bias, &c.o_bias, &c.mlp_bias, &c.qk_norm, &c.rope_truncate}) *flag = *flag != 0;
  in_range("sliding_window", c.sliding_window, 0, 1 << 24);
  in_range("window_first_layer", c.window_first_layer, 0, 1 << 16);
  in_range("rope_kind", c.rope_kind, PRT_ROPE_DEFAULT, PRT_ROPE_YARN);
  finite_in("rope_theta", c.rope_theta, 1, 1e12);
  finite_in("rope_factor", c.rope_factor, 1, 1e6);
  in_range("rope_original_max_position", c.rope_original_max_position, 0, 1 << 24);
  if (c.rope_original_max_position == 0) c.rope_original_max_position = c.max_position;
  if (c.rope_kind == PRT_ROPE_LLAMA3) {
    finite_in("rope_low_freq_factor", c.rope_low_freq_factor, 1e-6, 1e6);
    finite_in("rope_high_freq_factor", c.rope_high_freq_factor, 1e-6, 1e6);
    check(c.rope_high_freq_factor > c.rope_low_freq_factor, "config: rope_high_freq_factor ", c.rope_high_freq_factor,
          " is not above rope_low_freq_factor ", c.rope_low_freq_factor);
  }
  if (c.rope_kind == PRT_ROPE_YARN) {
    finite_in("rope_beta_fast", c.rope_beta_fast, 1e-6, 1e6);
    finite_in("rope_beta_slow", c.rope_beta_slow, 1e-6, 1e6);
    finite_in("rope_attention_factor", c.rope_attention_factor, 0, 100);
    check(c.rope_theta > 1, "config: rope_theta is ", c.rope_theta, ", expected more than 1 for yarn");
  }
  return c;
}

}  // namespace prt
