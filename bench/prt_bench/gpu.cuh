// Shared by the measurements on a GPU: error checks, random data, and the time of a launch.
#pragma once
#include <functional>

#include "cuda/device.h"
#include "cuda/launch.cuh"
#include "cuda/types.cuh"
#include "ops/ops.h"
#include "prt_bench/machine.h"

namespace prt_bench {

inline std::string pci_bus_id(int32_t device) {
  char id[32] = "";
  prt::cuda_check(cudaDeviceGetPCIBusId(id, sizeof id, device), "the device's bus id");
  return id;
}

class Stopwatch {
 public:
  Stopwatch() {
    for (cudaEvent_t& e : events_) prt::cuda_check(cudaEventCreate(&e), "an event");
  }
  ~Stopwatch() {
    for (const cudaEvent_t e : events_) cudaEventDestroy(e);
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

  // Seconds that the device needed for what `work` queues on the stream.
  double time(const prt::CudaStream& s, const std::function<void()>& work) {
    prt::cuda_check(cudaEventRecord(events_[0], s.handle), "an event");
    work();
    prt::cuda_check(cudaEventRecord(events_[1], s.handle), "an event");
    prt::cuda_check(cudaEventSynchronize(events_[1]), "a measurement");
    float ms = 0;
    prt::cuda_check(cudaEventElapsedTime(&ms, events_[0], events_[1]), "an event");
    return ms * 1e-3;
  }
  double median_time(const prt::CudaStream& s, int repetitions, const std::function<void()>& work) {
    std::vector<double> seconds;
    for (int i = 0; i < repetitions; ++i) seconds.push_back(time(s, work));
    return median(seconds);
  }

 private:
  cudaEvent_t events_[2];
};

// Uniform in [-scale, scale), variance scale^2 / 3, added to `offset`; the same for the same seed.
template <class T>
__global__ void fill_random_kernel(T* x, int64_t n, float scale, float offset, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n; i += int64_t{gridDim.x} * blockDim.x) {
    uint64_t z = (static_cast<uint64_t>(i) + (seed << 40)) * 0x9e3779b97f4a7c15u;  // splitmix64
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    x[i] = prt::from_float<T>(offset + scale * (static_cast<float>(static_cast<uint32_t>(z)) * 0x1p-31f - 1.0f));
  }
}

// Keys as they are in text: runs of 4 rows about the same one of 512 points, which differ from head to head. t: [n_page][h_kv][64][d_head].
template <class T>
__global__ void fill_clustered_kernel(T* x, int64_t n, int64_t h_kv, int64_t d, uint64_t seed) {
  const auto noise = [](uint64_t z) {  // in [-1, 1)
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<float>(static_cast<uint32_t>(z ^ (z >> 31))) * 0x1p-31f - 1.0f;
  };
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n; i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t row = i / d, head = row / prt::kPageTokens % h_kv;
    const auto run = static_cast<uint64_t>(row / 4), point = (run + (seed << 40)) * 0x9e3779b97f4a7c15u >> 55;
    const uint64_t about = ((point * static_cast<uint64_t>(h_kv) + static_cast<uint64_t>(head)) << 10) + static_cast<uint64_t>(i % d);
    x[i] = prt::from_float<T>(2.0f * noise((about + 1) * 0x9e3779b97f4a7c15u) +
                              noise((static_cast<uint64_t>(i) + (seed << 40)) * 0x9e3779b97f4a7c15u));
  }
}

inline void fill_clustered(const prt::CudaStream& s, const prt::Tensor& t, uint64_t seed) {
  prt::with_dtype(t.dtype, [&](auto zero) {
    using T = decltype(zero);
    fill_clustered_kernel<T><<<1024, 256, 0, s.handle>>>(t.as<T>(), t.size(), t.shape[1], t.shape[3], seed);
  });
  prt::cuda_check(cudaGetLastError(), "clustered data");
}

inline void fill_random(const prt::CudaStream& s, const prt::Tensor& t, float scale, float offset, uint64_t seed) {
  prt::with_dtype(t.dtype, [&](auto zero) {
    using T = decltype(zero);
    fill_random_kernel<T><<<1024, 256, 0, s.handle>>>(t.as<T>(), t.size(), scale, offset, seed);
  });
  prt::cuda_check(cudaGetLastError(), "random data");
}

}  // namespace prt_bench
