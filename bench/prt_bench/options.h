// What the user asked for. llama-bench's words, and comma lists as there.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "pyruntime.h"

namespace prt_bench {

// One sentence for the user; the program ends with `code`: 2 for what was asked for, 1 for what went wrong.
struct Failure : std::runtime_error {
  Failure(int code_, const std::string& text) : std::runtime_error(text), code(code_) {}
  int code;
};

struct Options {
  std::string config = "llama3.1-8b", device, output = "md", out_file, commit, match;
  std::vector<int64_t> n_prompt = {512}, n_gen = {128}, depth = {0}, batch = {1};
  int64_t repetitions = 5;
  int64_t chunk = 0;    // rows of an internal step of the library; 0: its own choice
  int64_t threads = 0;  // CPU threads; 0: the library's choice
  std::vector<std::string> attention;  // policies to decode with beside dense attention, in the words of prt_attention_parse
  std::vector<double> selected;        // shares of the clustered rows that tactic reads; none: as many as it takes to reach p
  bool structured = false;  // operations: keys in clusters instead of noise
  bool end_to_end = true, ops = false, ceilings = true, quiet = false;
  bool help = false, version = false, list_configs = false;
};

Options parse_options(int argc, char** argv);
std::string usage();

// A model by name: real shapes, random weights.
struct NamedConfig {
  std::string name, about;
  prt_model_config config;
};
const std::vector<NamedConfig>& named_configs();
const NamedConfig& find_config(const std::string& name);

}  // namespace prt_bench
