// One CUDA device and the stream that a session queues its work on; no CUDA header needed to read this one.
#pragma once
#include <cstdint>

struct CUstream_st;

namespace prt {

struct CudaStream {
  static constexpr int64_t kCounters = 1 << 14;

  int32_t device = 0;
  CUstream_st* handle = nullptr;  // a cudaStream_t
  int32_t arch = 0;               // compute capability: 90 is 9.0
  int32_t n_sm = 0;
  int32_t smem_per_block = 0;     // bytes a block may opt in to
  int64_t l2_bytes = 0;
  // [kCounters] device memory for "the last block to arrive finishes the job". Zero whenever no kernel runs: who counts, resets.
  uint32_t* counters = nullptr;
};

}  // namespace prt
