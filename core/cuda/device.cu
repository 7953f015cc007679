#include <cuda.h>
#include <cuda_runtime.h>
#if __has_include(<dlfcn.h>)
#include <dlfcn.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <mutex>

#include "base/check.h"
#include "cuda/device.h"
#include "cuda/launch.cuh"

namespace prt {

namespace {

constexpr int kOldest = 80;  // compute capability 8.0, Ampere: bf16 matrix units and asynchronous copies
constexpr int kBuiltFor[] = {__CUDA_ARCH_LIST__};  // 900: compute capability 9.0
// CUDA sets memory aside for the stacks of all threads that a device can hold: on an H200 its own memory is 526 MiB with the usual 1024
// bytes each and 279 MiB with 64. Our kernels need 16 at most; for one known to need more, the driver makes room when it is launched.
constexpr size_t kStackBytes = 64;

__global__ void probe() {}

// A function of the driver, which nothing links against.
template <class F>
F* driver(const char* name) {
  void* f = nullptr;
  cudaDriverEntryPointQueryResult found{};
  cuda_check(cudaGetDriverEntryPointByVersion(name, &f, 12000, cudaEnableDefault, &found), name);
  if (found != cudaDriverEntryPointSuccess) fail(PRT_DEVICE_ERROR, "the NVIDIA driver has no ", name, "; it is too old");
  return reinterpret_cast<F*>(f);
}

// Whether this process uses the device already. A context takes some 500 MB and half a second, so that asking must not make one.
bool has_context(int32_t device) {
  static const auto get_device = driver<decltype(cuDeviceGet)>("cuDeviceGet");
  static const auto get_state = driver<decltype(cuDevicePrimaryCtxGetState)>("cuDevicePrimaryCtxGetState");
  CUdevice d = 0;
  unsigned flags = 0;
  int active = 0;
  return get_device(&d, device) == CUDA_SUCCESS && get_state(d, &flags, &active) == CUDA_SUCCESS && active;
}

// Makes the device current. Where that makes its context, this library chooses the size of its stacks; else the application has.
void enter(int32_t device) {
  static std::mutex mutex;
  static uint64_t entered = 0;  // a bit for each device
  const std::lock_guard<std::mutex> lock(mutex);
  const uint64_t bit = uint64_t{1} << (device & 63);
  const bool is_new = !(entered & bit) && !has_context(device);
  cuda_check(cudaSetDevice(device), "choosing the device");
  if (is_new && cudaDeviceSetLimit(cudaLimitStackSize, kStackBytes) != cudaSuccess) cudaGetLastError();  // more memory than needed, no harm
  entered |= bit;
}

// Why this build cannot run on a device; "" if it can.
std::string unusable(const cudaDeviceProp& p, int32_t index) {
  const int capability = 10 * p.major + p.minor;
  if (capability < kOldest)
    return text("its compute capability is ", p.major, ".", p.minor, ", at least ", kOldest / 10, ".", kOldest % 10, " is needed");
  for (const int built : kBuiltFor)  // code runs on the same major version from its minor version on
    if (built / 100 == p.major && built / 10 <= capability) return "";
  const DeviceScope scope(index);  // a newer generation: the driver knows whether it can translate
  cudaFuncAttributes a{};
  if (const cudaError_t e = cudaFuncGetAttributes(&a, probe); e != cudaSuccess) {
    cudaGetLastError();
    return text("this build has no code for it (", cudaGetErrorString(e), ")");
  }
  return "";
}

// Gives something back on its own device, whatever the calling thread's is: without a current one CUDA would make a context on device 0.
// A destructor cannot report, and at the end of a process the driver may be gone before us.
template <class F>
void give_back(int32_t device, F f) noexcept {
  try {
    const DeviceScope scope(device);
    f();
  } catch (...) {
  }
}

cudaDeviceProp properties(int32_t index) {
  cudaDeviceProp p{};
  cuda_check(cudaGetDeviceProperties(&p, index), "device properties");
  return p;
}

// Free memory of a device that this process does not use, from the management library; -1 where that does not know.
int64_t free_from_outside([[maybe_unused]] int32_t index, [[maybe_unused]] size_t total) {
#if __has_include(<dlfcn.h>)
  struct Memory {
    unsigned long long total, free, used;
  } memory{};
  void *library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL), *device = nullptr;
  if (!library) return -1;
  const auto call = [&](const char* name, auto... args) {
    const auto f = reinterpret_cast<int (*)(decltype(args)...)>(dlsym(library, name));
    return f && f(args...) == 0;
  };
  char id[32] = "";
  bool known = cudaDeviceGetPCIBusId(id, sizeof id, index) == cudaSuccess && call("nvmlInit_v2");
  if (known) {
    known = call("nvmlDeviceGetHandleByPciBusId_v2", static_cast<const char*>(id), &device) &&
            call("nvmlDeviceGetMemoryInfo", device, &memory) && memory.total / 2 < total;  // not a part of a GPU
    call("nvmlShutdown");
  }
  dlclose(library);
  return known ? static_cast<int64_t>(memory.free) : -1;
#else
  return -1;
#endif
}

}  // namespace

int32_t cuda_device_count() {
  int n = 0;
  if (cudaGetDeviceCount(&n) == cudaSuccess) return n;
  cudaGetLastError();
  return 0;
}

void cuda_device_info(int32_t index, prt_device_info& info) {
  const cudaDeviceProp p = properties(index);
  int driver = 0;
  cudaDriverGetVersion(&driver);
  const std::string why = unusable(p, index);
  int64_t free = !why.empty() ? 0 : has_context(index) ? -1 : free_from_outside(index, p.totalGlobalMem);
  if (free < 0) free = device_memory_free(index);
  info.is_cuda = 1;
  info.index = index;
  info.usable = why.empty();
  info.memory_total = static_cast<int64_t>(p.totalGlobalMem);
  info.memory_free = free;
  std::snprintf(info.id, sizeof info.id, "cuda:%d", index);
  std::snprintf(info.name, sizeof info.name, "%.95s", p.name);
  std::snprintf(info.features, sizeof info.features, "sm_%d%d, driver for CUDA %d.%d", p.major, p.minor, driver / 1000, driver % 1000 / 10);
  std::snprintf(info.note, sizeof info.note, "%.159s", why.c_str());
}

int32_t cuda_require(const std::string& device) {
  const int32_t n = cuda_device_count();
  if (n == 0) fail(PRT_DEVICE_ERROR, "device '", device, "': no NVIDIA driver or no GPU was found; use device 'cpu'");
  int32_t index = -1;
  char rest = 0;
  const bool numbered = std::sscanf(device.c_str(), "cuda:%d%c", &index, &rest) == 1;
  if (device == "cuda") index = 0;
  else check(numbered && index >= 0, "device '", device, "' is unknown, expected \"cpu\" or \"cuda:N\"");
  if (index >= n) fail(PRT_DEVICE_ERROR, "device '", device, "' does not exist, there ", n == 1 ? "is 1 GPU" : text("are ", n, " GPUs"));
  const cudaDeviceProp p = properties(index);
  const std::string why = unusable(p, index);
  if (!why.empty()) fail(PRT_DEVICE_ERROR, "device '", device, "' (", p.name, "): ", why, "; use device 'cpu'");
  return index;
}

DeviceScope::DeviceScope(int32_t device) {
  static const auto get = driver<decltype(cuCtxGetCurrent)>("cuCtxGetCurrent");
  get(&before_);
  enter(device);
}

// Not by cudaSetDevice: where the thread had no context, that would make one on device 0.
DeviceScope::~DeviceScope() {
  static const auto set = driver<decltype(cuCtxSetCurrent)>("cuCtxSetCurrent");
  set(before_);
}

int64_t device_memory_free(int32_t device) {
  const DeviceScope scope(device);
  size_t free = 0, total = 0;
  cuda_check(cudaMemGetInfo(&free, &total), "free device memory");
  return static_cast<int64_t>(free);
}

Buffer device_buffer(int32_t device, int64_t bytes, const char* what) {
  check(bytes >= 0, what, ": ", bytes, " bytes is not a size");
  if (bytes == 0) return {};
  const DeviceScope scope(device);
  void* data = nullptr;
  if (const cudaError_t e = cudaMalloc(&data, static_cast<size_t>(bytes)); e != cudaSuccess) {
    cudaGetLastError();
    if (e != cudaErrorMemoryAllocation) fail(PRT_DEVICE_ERROR, what, ": ", cudaGetErrorString(e));
    fail(PRT_OUT_OF_MEMORY, what, " needs ", bytes, " bytes (", bytes >> 20, " MiB) on cuda:", device, "; ", device_memory_free(device),
         " bytes (", device_memory_free(device) >> 20, " MiB) are free");
  }
  const auto release = [](const Buffer& b) { give_back(static_cast<int32_t>(b.extra()), [&] { cudaFree(b.data()); }); };
  return Buffer(static_cast<char*>(data), bytes, release, nullptr, device);
}

Buffer pinned_buffer(int32_t device, int64_t bytes, const char* what) {
  if (bytes == 0) return {};
  const DeviceScope scope(device);
  void* data = nullptr;
  if (const cudaError_t e = cudaHostAlloc(&data, static_cast<size_t>(bytes), cudaHostAllocPortable); e != cudaSuccess) {
    cudaGetLastError();
    fail(PRT_OUT_OF_MEMORY, what, " needs ", bytes, " bytes of pinned host memory: ", cudaGetErrorString(e));
  }
  const auto release = [](const Buffer& b) { give_back(static_cast<int32_t>(b.extra()), [&] { cudaFreeHost(b.data()); }); };
  return Buffer(static_cast<char*>(data), bytes, release, nullptr, device);
}

CudaContext::CudaContext(int32_t device) {
  const DeviceScope scope(device);
  const cudaDeviceProp p = properties(device);
  stream_.device = device;
  // What the code was compiled for, where that is older than the device: PTX of another generation has none of this one's instructions.
  cudaFuncAttributes code{};
  cuda_check(cudaFuncGetAttributes(&code, probe), "the code of this device");
  stream_.arch = std::min(10 * p.major + p.minor, code.ptxVersion);
  stream_.n_sm = p.multiProcessorCount;
  stream_.smem_per_block = static_cast<int32_t>(p.sharedMemPerBlockOptin);
  stream_.l2_bytes = p.l2CacheSize;
  counters_ = device_buffer(device, CudaStream::kCounters * static_cast<int64_t>(sizeof(uint32_t)), "the counters");
  stream_.counters = reinterpret_cast<uint32_t*>(counters_.data());
  cuda_check(cudaStreamCreateWithFlags(&stream_.handle, cudaStreamNonBlocking), "a stream");
  cuda_check(cudaMemsetAsync(stream_.counters, 0, static_cast<size_t>(counters_.bytes()), stream_.handle), "the counters");
  synchronize(stream_);
}

CudaContext::~CudaContext() {
  if (!stream_.handle) return;
  give_back(stream_.device, [&] {
    cudaStreamSynchronize(stream_.handle);
    cudaStreamDestroy(stream_.handle);
  });
}

void copy_to_device(const CudaStream& s, void* dst, const void* src, int64_t bytes) {
  cuda_check(cudaMemcpyAsync(dst, src, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, s.handle), "a copy to the device");
}

void copy_rows_to_device(const CudaStream& s, void* dst, const void* src, int64_t row_bytes, int64_t pitch, int64_t n_row) {
  const auto n = static_cast<size_t>(pitch);
  cuda_check(
      cudaMemcpy2DAsync(dst, n, src, n, static_cast<size_t>(row_bytes), static_cast<size_t>(n_row), cudaMemcpyHostToDevice, s.handle),
      "a copy to the device");
}

void copy_on_device(const CudaStream& s, void* dst, const void* src, int64_t bytes) {
  cuda_check(cudaMemcpyAsync(dst, src, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, s.handle), "a copy on the device");
}

void copy_to_host(const CudaStream& s, void* dst, const void* src, int64_t bytes) {
  cuda_check(cudaMemcpyAsync(dst, src, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, s.handle), "a copy from the device");
}

void fill(const CudaStream& s, void* dst, int byte, int64_t bytes) {
  cuda_check(cudaMemsetAsync(dst, byte, static_cast<size_t>(bytes), s.handle), "filling device memory");
}

void synchronize(const CudaStream& s) { cuda_check(cudaStreamSynchronize(s.handle), "the device"); }

CudaEvent::CudaEvent() = default;
CudaEvent::CudaEvent(CudaEvent&& other) noexcept : handle_(other.handle_), device_(other.device_) { other.handle_ = nullptr; }
CudaEvent::~CudaEvent() {
  if (handle_) give_back(device_, [&] { cudaEventDestroy(handle_); });
}
void CudaEvent::record(const CudaStream& s) {
  device_ = s.device;
  if (!handle_) cuda_check(cudaEventCreateWithFlags(&handle_, cudaEventDisableTiming), "an event");
  cuda_check(cudaEventRecord(handle_, s.handle), "an event");
}
void CudaEvent::wait() {
  if (handle_) cuda_check(cudaEventSynchronize(handle_), "the device");
}

CudaGraph::~CudaGraph() {
  if (exec_) give_back(device_, [&] { cudaGraphExecDestroy(exec_); });
}
void CudaGraph::begin(const CudaStream& s) {
  cuda_check(cudaStreamBeginCapture(s.handle, cudaStreamCaptureModeThreadLocal), "recording a graph");
}
void CudaGraph::cancel(const CudaStream& s) {
  cudaGraph_t graph = nullptr;
  cudaStreamEndCapture(s.handle, &graph);
  if (graph) cudaGraphDestroy(graph);
  cudaGetLastError();
}
void CudaGraph::end(const CudaStream& s) {
  device_ = s.device;
  cudaGraph_t graph = nullptr;
  cuda_check(cudaStreamEndCapture(s.handle, &graph), "recording a graph");
  const cudaError_t e = cudaGraphInstantiate(&exec_, graph, 0);
  cudaGraphDestroy(graph);
  cuda_check(e, "instantiating a graph");
}
void CudaGraph::replay(const CudaStream& s) const { cuda_check(cudaGraphLaunch(exec_, s.handle), "a graph launch"); }

}  // namespace prt
