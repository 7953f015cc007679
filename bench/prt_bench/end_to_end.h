// Prompt and decode speed of a whole model, through the public interface alone.
#pragma once
#include <functional>

#include "prt_bench/report.h"

namespace prt_bench {

// Loads random weights and fills in the tests, the skipped ones and the memory of the report. `at_end` is called before they go.
void run_end_to_end(Report& report, const std::function<void()>& at_end);

// The fewest bytes and floating-point operations of a step over `n` new tokens in each of `batch` sequences of `depth` tokens.
double step_bytes(const prt_model_config& c, int64_t n, int64_t depth, int64_t batch);
double step_flops(const prt_model_config& c, int64_t n, int64_t depth, int64_t batch);

}  // namespace prt_bench
