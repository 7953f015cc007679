// Rotary frequencies for every kind of scaling.
#pragma once
#include <vector>

#include "model/config.h"

namespace prt {

struct RopeTable {
  std::vector<float> inv_freq;  // [d_head / 2] radians per position
  float attention_factor = 1;   // multiplies cos and sin
};

// max_context only matters to PRT_ROPE_DYNAMIC.
RopeTable make_rope_table(const ModelConfig& config, int64_t max_context);

}  // namespace prt
