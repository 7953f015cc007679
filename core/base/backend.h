// Where an operation runs. Passed to every op; the op's .cc picks the twin.
#pragma once
#include "base/dtype.h"
#include "cpu/features.h"
#include "cpu/thread_pool.h"

namespace prt {

struct CpuOps;      // ops/cpu_table.h
struct CudaOps;     // ops/cuda_table.h
struct CudaStream;  // cuda/stream.h

struct Backend {
  const CpuOps* cpu = nullptr;  // the CPU twins for one instruction set
  ThreadPool* pool = nullptr;
  const CudaOps* cuda = nullptr;  // set: tensors are in the memory of stream->device, and work is queued on the stream
  const CudaStream* stream = nullptr;

  // Between operations the CPU keeps f32. A GPU keeps what its matrix units read, the type of the weights; only the residual stream
  // and the logits are f32 there.
  DType activation(DType weights) const { return cuda ? weights : DType::f32; }
};

Backend cpu_backend(ThreadPool& pool, Isa isa);
Backend cuda_backend(const CudaStream& stream);  // null twins where CUDA was not built

}  // namespace prt
