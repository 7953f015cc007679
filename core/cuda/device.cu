#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

#include "base/check.h"
#include "cuda/device.h"

namespace prt {

namespace {
constexpr const char* kNoKernels = "this version has no CUDA forward pass yet";
}

int32_t cuda_device_count() {
  int n = 0;
  return cudaGetDeviceCount(&n) == cudaSuccess ? n : 0;
}

void cuda_device_info(int32_t index, prt_device_info& info) {
  cudaDeviceProp p{};
  if (const cudaError_t e = cudaGetDeviceProperties(&p, index); e != cudaSuccess)
    fail(PRT_DEVICE_ERROR, "cuda:", index, ": ", cudaGetErrorString(e));
  int driver = 0;
  cudaDriverGetVersion(&driver);
  size_t free = 0, total = 0;
  int before = 0;
  cudaGetDevice(&before);
  if (cudaSetDevice(index) == cudaSuccess) cudaMemGetInfo(&free, &total);
  cudaSetDevice(before);
  info.is_cuda = 1;
  info.index = index;
  info.usable = 0;
  info.memory_total = static_cast<int64_t>(p.totalGlobalMem);
  info.memory_free = static_cast<int64_t>(free);
  std::snprintf(info.id, sizeof info.id, "cuda:%d", index);
  std::snprintf(info.name, sizeof info.name, "%s", p.name);
  std::snprintf(info.features, sizeof info.features, "sm_%d%d, driver for CUDA %d.%d", p.major, p.minor, driver / 1000, driver % 1000 / 10);
  std::snprintf(info.note, sizeof info.note, "%s", kNoKernels);
}

void cuda_require(const std::string& device) {
  const int32_t n = cuda_device_count();
  if (n == 0) fail(PRT_DEVICE_ERROR, "device '", device, "': no NVIDIA driver or no GPU was found; use device 'cpu'");
  fail(PRT_DEVICE_ERROR, "device '", device, "': ", kNoKernels, "; use device 'cpu'");
}

}  // namespace prt
