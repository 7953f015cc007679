// Models by name: the numbers of their config.json. One line each, so that a new one is a line.
#include "prt_bench/options.h"

namespace prt_bench {

namespace {

struct Row {
  const char *name, *about;
  int32_t n_layer, h_q, h_kv, d_head, d_model, d_ff, n_vocab, max_position;
  bool tied, qkv_bias;
  float rope_theta, rope_factor;  // factor > 0: Llama 3.1's rope, made for 8192 tokens
};

constexpr Row kRows[] = {
    // clang-format off
    // name           about                      layers h_q h_kv d_head d_model  d_ff n_vocab  context  tied   qkv_bias  theta    factor
    {"llama3.1-8b",  "Llama 3.1 8B",                 32, 32,  8,   128,   4096, 14336, 128256, 131072, false, false,  500000.0f,  8},
    {"llama3.2-1b",  "Llama 3.2 1B",                 16, 32,  8,    64,   2048,  8192, 128256, 131072, true,  false,  500000.0f, 32},
    {"qwen2.5-7b",   "Qwen 2.5 7B",                  28, 28,  4,   128,   3584, 18944, 152064,  32768, false, true,  1000000.0f,  0},
    {"smollm2-135m", "SmolLM2 135M",                 30,  9,  3,    64,    576,  1536,  49152,   8192, true,  false,  100000.0f,  0},
    {"tiny",         "two small layers, for tests",   2,  4,  2,    32,     64,   160,    512,    512, true,  false,   10000.0f,  0},
    // clang-format on
};

prt_model_config expand(const Row& r) {
  prt_model_config c = PRT_MODEL_CONFIG_INIT;
  c.dtype = PRT_BF16;
  c.n_layer = r.n_layer;
  c.h_q = r.h_q;
  c.h_kv = r.h_kv;
  c.d_head = r.d_head;
  c.d_model = r.d_model;
  c.d_ff = r.d_ff;
  c.n_vocab = r.n_vocab;
  c.max_position = r.max_position;
  c.tied_embeddings = r.tied;
  c.qkv_bias = r.qkv_bias;
  c.rope_theta = r.rope_theta;
  if (r.rope_factor > 0) {
    c.rope_kind = PRT_ROPE_LLAMA3;
    c.rope_factor = r.rope_factor;
    c.rope_original_max_position = 8192;
  }
  return c;
}

}  // namespace

const std::vector<NamedConfig>& named_configs() {
  static const std::vector<NamedConfig> all = [] {
    std::vector<NamedConfig> list;
    for (const Row& r : kRows) list.push_back({r.name, r.about, expand(r)});
    return list;
  }();
  return all;
}

const NamedConfig& find_config(const std::string& name) {
  std::string names;
  for (const NamedConfig& c : named_configs()) {
    if (c.name == name) return c;
    names += (names.empty() ? "" : ", ") + c.name;
  }
  throw Failure(2, "--config is '" + name + "', expected one of " + names);
}

}  // namespace prt_bench
