// What was measured, and how it is printed.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "prt_bench/options.h"

namespace prt_bench {

// What the machine does at best; per second.
struct Ceilings {
  double copy_bytes = 0;   // device memory to device memory, bytes read and written
  double read_bytes = 0;   // reading only
  double tensor_flops = 0; // bf16 matrix products out of shared memory and registers, random operands
  int32_t sm_mhz = 0, memory_mhz = 0;  // clocks while the tensor cores were busy
};

struct Machine {
  std::string device, name, features, driver, cuda;
  int64_t memory_total = 0, memory_free = 0;
  int32_t sm_mhz_max = 0, memory_mhz_max = 0, power_limit_watts = 0;
};

// One end-to-end row. bytes and flops are those of one repetition, the fewest that the model allows.
struct Test {
  bool is_prompt = false;
  int64_t n = 0, depth = 0, batch = 1;
  std::string attention = {};  // the policy that decodes; none: dense attention
  double selected = 0;    // the share of the clustered rows that it was asked to read; 0: it chooses by itself
  std::vector<double> seconds;
  double bytes = 0, flops = 0;
  double selected_rows = 0, read_rows = 0;  // of the clustered rows, of all rows: what it did read
  double prompt_seconds = 0, cluster_seconds = 0;  // for the tokens before: reading them, clustering them

  std::string name() const;
  std::vector<double> tok_s() const;
  double mean_seconds() const;
};

// One operation alone. `calls` of it make up a step; bytes and flops are the fewest that one call needs.
struct Op {
  std::string group, name, shape;
  double us = 0, bytes = 0, flops = 0;
  int64_t calls = 0;
  double selected = 0, selected_rows = 0;  // sparse attention: the share of the clustered rows that was asked for, and what it became
};

struct Skipped {
  std::string test, why;
};

struct Report {
  Options options;
  NamedConfig config;
  Machine machine;
  std::optional<Ceilings> ceilings;
  int64_t weight_bytes = 0, kv_bytes = 0, workspace_bytes = 0, index_bytes = 0;
  // GPU memory in use by everybody: at the start, once CUDA itself runs there, and with the model and its session.
  int64_t used_before = 0, used_by_cuda = 0, used_after = 0;
  double load_seconds = 0;
  std::vector<Test> tests;
  std::vector<Skipped> skipped;
  std::vector<Op> ops;
  std::string date;

  // The time that the ceilings allow over the time it took; 0 where the ceilings are not known.
  double share(double seconds, double bytes, double flops) const;
};

std::string render_configs(const std::string& form);
std::string render(const Report& report, const std::string& form);

double mean(const std::vector<double>& x);
double deviation(const std::vector<double>& x);  // of the sample; 0 for one value
double median(std::vector<double> x);
std::string utc_now();

}  // namespace prt_bench
