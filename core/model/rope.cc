#include "model/rope.h"

#include <algorithm>
#include <cmath>

namespace prt {

namespace {

// Llama 3.1: long wavelengths are stretched by factor, short ones kept, those between interpolated.
double llama3(const ModelConfig& c, double freq) {
  const double wavelength = 2 * M_PI / freq, original = c.rope_original_max_position;
  const double low = original / c.rope_low_freq_factor, high = original / c.rope_high_freq_factor;
  if (wavelength > low) return freq / c.rope_factor;
  if (wavelength < high) return freq;
  const double smooth = (original / wavelength - c.rope_low_freq_factor) / (c.rope_high_freq_factor - c.rope_low_freq_factor);
  return (1 - smooth) * freq / c.rope_factor + smooth * freq;
}

// YaRN (Peng et al., arXiv 2309.00071, section 3.2): dimensions that turn more than beta_fast times within the original context
// keep their frequency, those below beta_slow are stretched, with a linear ramp between.
struct YarnRamp {
  double low, high;
  explicit YarnRamp(const ModelConfig& c) {
    const auto dimension = [&](double rotations) {
      return c.d_head * std::log(c.rope_original_max_position / (rotations * 2 * M_PI)) / (2 * std::log(static_cast<double>(c.rope_theta)));
    };
    low = dimension(c.rope_beta_fast);
    high = dimension(c.rope_beta_slow);
    if (c.rope_truncate) {
      low = std::floor(low);
      high = std::ceil(high);
    }
    low = std::max(low, 0.0);
    high = std::min(high, c.d_head - 1.0);
    if (low == high) high += 0.001;
  }
  double stretched(double i) const { return std::clamp((i - low) / (high - low), 0.0, 1.0); }
};

}  // namespace

RopeTable make_rope_table(const ModelConfig& c, int64_t max_context) {
  const int64_t half = c.d_head / 2, d = c.d_head;
  double theta = c.rope_theta;
  if (c.rope_kind == PRT_ROPE_DYNAMIC && max_context > c.rope_original_max_position && d > 2)
    theta *= std::pow(c.rope_factor * max_context / c.rope_original_max_position - (c.rope_factor - 1), d / (d - 2.0));
  RopeTable table;
  const YarnRamp ramp(c);
  for (int64_t i = 0; i < half; ++i) {
    double freq = 1.0 / std::pow(theta, 2.0 * i / d);
    if (c.rope_kind == PRT_ROPE_LINEAR) freq /= c.rope_factor;
    if (c.rope_kind == PRT_ROPE_LLAMA3) freq = llama3(c, freq);
    if (c.rope_kind == PRT_ROPE_YARN) {
      const double s = ramp.stretched(static_cast<double>(i));
      freq = freq / c.rope_factor * s + freq * (1 - s);
    }
    table.inv_freq.push_back(static_cast<float>(freq));
  }
  if (c.rope_kind == PRT_ROPE_YARN)
    table.attention_factor = c.rope_attention_factor > 0 ? c.rope_attention_factor
                             : c.rope_factor <= 1        ? 1.0f
                                                         : static_cast<float>(0.1 * std::log(c.rope_factor) + 1.0);
  return table;
}

}  // namespace prt
