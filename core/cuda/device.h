// CUDA devices as the rest of the library sees them, without a CUDA header: device.cu where CUDA was built, device_none.cc where not.
#pragma once
#include <memory>
#include <string>

#include "base/arena.h"
#include "cuda/stream.h"
#include "pyruntime.h"

struct CUctx_st;
struct CUgraphExec_st;
struct CUevent_st;

namespace prt {

int32_t cuda_device_count();  // 0 without a driver or a CUDA build
void cuda_device_info(int32_t index, prt_device_info& info);  // without making a context on it, where that can be helped
int32_t cuda_require(const std::string& device);  // "cuda:1" -> 1; fails with the reason why models cannot run there

int64_t device_memory_free(int32_t device);
Buffer device_buffer(int32_t device, int64_t bytes, const char* what);  // contents undefined
Buffer pinned_buffer(int32_t device, int64_t bytes, const char* what);  // host memory that the GPU can copy from while the host goes on

// The calls below, and kernel launches, go to the calling thread's current device. A scope makes it `device` and restores it. What is
// destroyed needs none: it enters its own device for that, on whatever thread.
class DeviceScope {
 public:
  explicit DeviceScope(int32_t device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  CUctx_st* before_ = nullptr;
};

// A stream of its own on a device, with the properties that kernels are launched by.
class CudaContext {
 public:
  explicit CudaContext(int32_t device);
  ~CudaContext();
  CudaContext(const CudaContext&) = delete;
  CudaContext& operator=(const CudaContext&) = delete;
  const CudaStream& stream() const { return stream_; }

 private:
  CudaStream stream_;
  Buffer counters_;
};

// Queued on the stream. Host memory that is not pinned is copied before the call returns.
void copy_to_device(const CudaStream& s, void* dst, const void* src, int64_t bytes);
void copy_rows_to_device(const CudaStream& s, void* dst, const void* src, int64_t row_bytes, int64_t pitch, int64_t n_row);
void copy_on_device(const CudaStream& s, void* dst, const void* src, int64_t bytes);
void copy_to_host(const CudaStream& s, void* dst, const void* src, int64_t bytes);
void fill(const CudaStream& s, void* dst, int byte, int64_t bytes);
void synchronize(const CudaStream& s);  // and reports what went wrong in anything queued so far

// "Has the work queued before record() finished?"
class CudaEvent {
 public:
  CudaEvent();
  ~CudaEvent();
  CudaEvent(CudaEvent&& other) noexcept;
  CudaEvent& operator=(CudaEvent&&) = delete;
  void record(const CudaStream& s);
  void wait();  // the host waits; at once if nothing was recorded

 private:
  CUevent_st* handle_ = nullptr;
  int32_t device_ = 0;
};

// A recorded sequence of launches, replayed as one.
class CudaGraph {
 public:
  CudaGraph() = default;
  ~CudaGraph();
  CudaGraph(CudaGraph&& other) noexcept : exec_(other.exec_), device_(other.device_) { other.exec_ = nullptr; }
  CudaGraph& operator=(CudaGraph&&) = delete;
  static void begin(const CudaStream& s);
  void end(const CudaStream& s);     // after begin() and the launches
  static void cancel(const CudaStream& s);  // instead of end(), when one of the launches failed
  void replay(const CudaStream& s) const;

 private:
  CUgraphExec_st* exec_ = nullptr;
  int32_t device_ = 0;
};

}  // namespace prt
