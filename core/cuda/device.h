// CUDA devices as the rest of the library sees them; device.cu where CUDA was built, device_none.cc where not.
#pragma once
#include <string>

#include "pyruntime.h"

namespace prt {
int32_t cuda_device_count();  // 0 without a driver or a CUDA build
void cuda_device_info(int32_t index, prt_device_info& info);
void cuda_require(const std::string& device);  // fails with the reason why models cannot run there
}  // namespace prt
