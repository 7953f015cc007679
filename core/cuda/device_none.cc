// A build without CUDA: there are no devices, and nothing below cuda_require() is ever reached.
#include "base/backend.h"
#include "base/check.h"
#include "cuda/device.h"
#include "cuda/upload.h"

namespace prt {

namespace {
[[noreturn]] void none() { fail(PRT_DEVICE_ERROR, "this build has no CUDA (", PRT_CUDA_REASON, ")"); }
}  // namespace

int32_t cuda_device_count() { return 0; }
void cuda_device_info(int32_t, prt_device_info&) {}
int32_t cuda_require(const std::string& device) {
  fail(PRT_DEVICE_ERROR, "device '", device, "': this build has no CUDA (", PRT_CUDA_REASON, "); use device 'cpu'");
}
Backend cuda_backend(const CudaStream&) { none(); }

int64_t device_memory_free(int32_t) { none(); }
Buffer device_buffer(int32_t, int64_t, const char*) { none(); }
Buffer pinned_buffer(int32_t, int64_t, const char*) { none(); }
DeviceScope::DeviceScope(int32_t) { none(); }
DeviceScope::~DeviceScope() = default;
CudaContext::CudaContext(int32_t) { none(); }
CudaContext::~CudaContext() = default;
void copy_to_device(const CudaStream&, void*, const void*, int64_t) { none(); }
void copy_rows_to_device(const CudaStream&, void*, const void*, int64_t, int64_t, int64_t) { none(); }
void copy_on_device(const CudaStream&, void*, const void*, int64_t) { none(); }
void copy_to_host(const CudaStream&, void*, const void*, int64_t) { none(); }
void fill(const CudaStream&, void*, int, int64_t) { none(); }
void synchronize(const CudaStream&) { none(); }
CudaEvent::CudaEvent() = default;
CudaEvent::CudaEvent(CudaEvent&&) noexcept {}
CudaEvent::~CudaEvent() = default;
void CudaEvent::record(const CudaStream&) { none(); }
void CudaEvent::wait() {}
CudaGraph::~CudaGraph() = default;
void CudaGraph::begin(const CudaStream&) { none(); }
void CudaGraph::cancel(const CudaStream&) {}
void CudaGraph::end(const CudaStream&) { none(); }
void CudaGraph::replay(const CudaStream&) const { none(); }

struct Upload::Lane {};
Upload::Upload(int32_t) { none(); }
Upload::~Upload() = default;
void Upload::write(void*, int64_t, const Fill&) { none(); }

}  // namespace prt
