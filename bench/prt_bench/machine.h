// The GPU as its driver describes it, and what it does at best.
#pragma once
#include "prt_bench/report.h"

namespace prt_bench {

// From NVML where that is installed; nothing is changed where it is not.
struct Clocks {
  int32_t sm_mhz = 0, memory_mhz = 0;
};
void describe_gpu(const std::string& pci_bus_id, Machine& machine);
Clocks clocks_now(const std::string& pci_bus_id);
int64_t memory_used_now(const std::string& pci_bus_id);  // bytes, by all processes; 0 where NVML is not installed

// In the .cu files; no_cuda.cc stands in for them where CUDA was not built.
int32_t gpu_count();
int64_t gpu_memory_used(int32_t index);  // does not start CUDA on the device, which itself takes memory
void describe_device(int32_t index, Machine& machine);
Ceilings measure_ceilings(int32_t index);
void measure_ops(int32_t index, Report& report);  // the operations of a step for report.options and report.config

}  // namespace prt_bench
