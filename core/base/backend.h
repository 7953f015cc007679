// Where an operation runs. Passed to every op; the op's .cc picks the twin.
#pragma once
#include "cpu/features.h"
#include "cpu/thread_pool.h"

namespace prt {

struct CpuOps;  // ops/cpu_table.h

struct Backend {
  const CpuOps* cpu = nullptr;  // the CPU twins for one instruction set
  ThreadPool* pool = nullptr;
};

Backend cpu_backend(ThreadPool& pool, Isa isa);

}  // namespace prt
