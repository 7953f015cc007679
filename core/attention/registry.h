// The attention policies there are, their names and options.
#pragma once
#include <string_view>

#include "attention/policy.h"

namespace prt {

struct PolicyInfo {
  int32_t id;            // prt_attention_policy
  const char* name;
  const char* options;   // the fields of prt_attention that it reads, each followed by a space
  const char* defaults;  // where they are not PRT_ATTENTION_INIT's: "name=value,..."
  bool on_cuda;          // whether all of its operations have a CUDA twin
  std::unique_ptr<Policy> (*make)(const PolicyContext&, const prt_attention&);
  int64_t (*page_bytes)(const prt_attention&, int64_t n_layer, int64_t h_kv, int64_t d_head, DType kv);  // kept for each KV page, or null
};

const PolicyInfo& policy_info(int32_t id);
prt_attention parse_attention(std::string_view text);  // "NAME" or "NAME:key=value,..."
// Refuses, by name, values that are out of range, that do not go together, or that the policy does not read.
void check_attention_config(const prt_attention& c);

}  // namespace prt
