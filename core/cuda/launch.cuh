// How every kernel is started, and what a kernel does first and last.
//
// On sm_90 and newer a kernel may begin before the one queued ahead of it has finished (programmatic dependent launch), so that its
// own start-up and its first reads of constant memory (weights) overlap the other's tail. Two rules make that safe:
//   1. pdl_wait() comes before the first read of anything that a kernel has written, and before the first write of anything. What only
//      copies from the host write (lengths, page tables, tokens) may be read earlier: a copy is over before any kernel behind it starts.
//   2. pdl_launch() may come at any time, before pdl_wait() too: it only lets the next kernel's start-up overlap. A kernel of which one
//      block or more waits does not end before the kernels ahead of it, so that the next one's pdl_wait() is a wait for all of them.
#pragma once
#include <cuda_runtime.h>

#include "base/check.h"
#include "cuda/stream.h"

namespace prt {

inline void cuda_check(cudaError_t e, const char* what) {
  if (e == cudaSuccess) return;
  cudaGetLastError();  // clears it where it can be cleared
  fail(e == cudaErrorMemoryAllocation ? PRT_OUT_OF_MEMORY : PRT_DEVICE_ERROR, what, ": ", cudaGetErrorString(e));
}

// launch(), with the blocks of a row in thread block clusters of `cluster`, 8 at most (sm_90 and newer; 1: none).
template <class... Params, class... Args>
void launch_clusters(const CudaStream& s, void (*kernel)(Params...), dim3 grid, dim3 block, int64_t smem, int64_t cluster, Args... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (smem > 48 << 10)
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem)),
               "shared memory of a kernel");
  cudaLaunchAttribute attrs[2]{};
  attrs[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attrs[0].val.programmaticStreamSerializationAllowed = 1;
  attrs[1].id = cudaLaunchAttributeClusterDimension;
  attrs[1].val.clusterDim = {static_cast<uint32_t>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(smem);
  config.stream = s.handle;
  config.attrs = attrs;
  config.numAttrs = s.arch < 90 ? 0 : cluster > 1 ? 2 : 1;
  cuda_check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), "kernel launch");
}
template <class... Params, class... Args>
void launch(const CudaStream& s, void (*kernel)(Params...), dim3 grid, dim3 block, int64_t smem, Args... args) {
  launch_clusters(s, kernel, grid, block, smem, 1, args...);
}

// For kernels that read from memory straight into registers: what is on its way waits in the L1, which the driver would otherwise leave
// as small as the kernel before needed it. Decoding an 8B model at 65,536 tokens: 153 -> 174 tok/s (bench/results/h200.json).
template <class... Params>
void prefer_l1(void (*kernel)(Params...)) {
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxL1),
             "L1 cache of a kernel");
}

#ifdef __CUDACC__
__device__ __forceinline__ void pdl_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void pdl_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif

}  // namespace prt
