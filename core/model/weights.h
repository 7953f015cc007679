// The tensors of a model: one table, one allocation, many views.
#pragma once
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda/upload.h"
#include "model/config.h"

namespace prt {

struct LayerWeights {
  Tensor attn_norm, qkv, qkv_bias, q_norm, k_norm, o, o_bias, ffn_norm, gate_up, gate_up_bias, down, down_bias;
};

class Weights {
 public:
  static constexpr int32_t kHost = -1;
  // In host memory, or on a CUDA device.
  explicit Weights(const ModelConfig& config, int32_t device = kHost);

  Tensor embed, norm, lm_head;  // lm_head is embed when tied
  std::vector<LayerWeights> layers;

  struct Entry {  // what the caller loads: a part of a fused matrix is a range of its rows
    std::string name;
    Tensor view;
    int64_t rows_loaded = 0;
  };
  const std::vector<Entry>& entries() const { return entries_; }
  int64_t bytes() const { return buffer_.bytes(); }

  // Converts rows [begin, begin + n) from `data`; pieces of a tensor come in order. Different tensors may load at the same time.
  void load(const std::string& name, int64_t begin, int64_t n, const void* data, DType dtype);
  const Entry& find(const std::string& name) const;
  void load_file(const std::string& name, const std::string& path, int64_t offset, DType dtype);
  std::string missing() const;  // "" when everything is loaded
  void loaded();                // gives back what only loading needs

 private:
  void layout(const ModelConfig& config, Arena& arena);
  void add(const std::string& name, const Tensor& view);
  size_t index_of(const std::string& name) const;

  void write(void* to, int64_t bytes, const Upload::Fill& fill);

  Buffer buffer_;
  std::unique_ptr<Upload> upload_;  // of a CUDA device, while loading
  std::vector<Entry> entries_;
  std::unordered_map<std::string, size_t> index_;
};

}  // namespace prt
