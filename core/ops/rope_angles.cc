// prt_op_run("rope_angles", {cos_sin, positions, inv_freq}, {attention_factor})
#include <cmath>

#include "ops/cuda_table.h"

namespace prt {

void rope_angles(const Backend& backend, const RopeAngles& a) {
  const int64_t n_tok = a.positions.shape[0], half = a.inv_freq.shape[0];
  check_shape("rope_angles", "positions", a.positions, DType::i32, {-1});
  check_shape("rope_angles", "inv_freq", a.inv_freq, DType::f32, {-1});
  check_shape("rope_angles", "cos_sin", a.cos_sin, DType::f32, {n_tok, 2, half});
  if (backend.cuda) return backend.cuda->rope_angles(*backend.stream, a);
  // One pass over a step, not over a layer: this form needs no vector code.
  for (int64_t t = 0; t < n_tok; ++t) {
    float* out = a.cos_sin.row<float>(t);
    for (int64_t i = 0; i < half; ++i) {
      // The angle is rounded to f32 as every framework does: at position 100,000 that rounding is part of the trained model.
      const float angle = static_cast<float>(a.positions.as<int32_t>()[t]) * a.inv_freq.as<float>()[i];
      out[i] = static_cast<float>(std::cos(static_cast<double>(angle))) * a.attention_factor;
      out[half + i] = static_cast<float>(std::sin(static_cast<double>(angle))) * a.attention_factor;
    }
  }
}

}  // namespace prt
