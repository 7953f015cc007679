#include "base/check.h"
#include "cuda/device.h"

namespace prt {
int32_t cuda_device_count() { return 0; }
void cuda_device_info(int32_t, prt_device_info&) {}
void cuda_require(const std::string& device) {
  fail(PRT_DEVICE_ERROR, "device '", device, "': this build has no CUDA (", PRT_CUDA_REASON, "); use device 'cpu'");
}
}  // namespace prt
