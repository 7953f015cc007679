// A checked copy of prt_model_config.
#pragma once
#include "base/dtype.h"

namespace prt {

struct ModelConfig : prt_model_config {
  DType weight_dtype() const { return static_cast<DType>(dtype); }
  int64_t q_size() const { return int64_t{h_q} * d_head; }
  int64_t kv_size() const { return int64_t{h_kv} * d_head; }
  int64_t qkv_size() const { return q_size() + 2 * kv_size(); }
  int64_t window_of(int64_t layer) const { return layer >= window_first_layer ? sliding_window : 0; }
};

// Copies the caller's structure (which may be older and shorter) and checks every field by name.
ModelConfig read_model_config(const prt_model_config* config);

}  // namespace prt
