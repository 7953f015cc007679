// Stands in for the .cu files in a build without CUDA, where no GPU is ever chosen.
#include "prt_bench/machine.h"

namespace prt_bench {

int32_t gpu_count() { return 0; }
int64_t gpu_memory_used(int32_t) { return 0; }
void describe_device(int32_t, Machine&) {}
Ceilings measure_ceilings(int32_t) { return {}; }
void measure_ops(int32_t, Report&) {}

}  // namespace prt_bench
