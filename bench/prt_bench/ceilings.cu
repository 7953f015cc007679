// What the machine does at best, so that everything else can be given as a share of it.
#include "cuda/hopper.cuh"
#include "cuda/mma.cuh"
#include "prt_bench/gpu.cuh"

namespace prt_bench {

namespace {

using prt::bf16;

constexpr int kThreads = 256;

// ---- memory: every byte once, 8 independent loads of 16 bytes per thread in flight
constexpr int kLoads = 8;
__global__ void __launch_bounds__(kThreads) read_kernel(const uint4* from, int64_t n_block, uint32_t* sink) {
  uint32_t acc = 0;
  for (int64_t b = blockIdx.x; b < n_block; b += gridDim.x) {
    const uint4* p = from + b * (kLoads * kThreads) + threadIdx.x;
    uint4 v[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) v[i] = prt::load_once_16(p + i * kThreads);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) acc ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
  }
  if (acc == 0x12345678) *sink = acc;  // so that the loads are needed
}

// ---- tensor cores. The operands are random and another piece of them at every step: the same bits again and again draw less power and
// let the chip run faster than real data does.
//
// Hopper: two warpgroups a block, one block a multiprocessor, m64n256k16 out of shared memory: 64 columns of A and B, taken 16 at a time.
constexpr int kTile = 64, kHopperN = 256, kHopperGroups = 2, kHopperRounds = 4;
constexpr int64_t kHopperSmem = (kHopperGroups * 64 + kHopperN) * kTile * 2 + 1024;
constexpr double kHopperStepFlops = 2.0 * 64 * kHopperN * kTile * kHopperRounds * kHopperGroups;

__global__ void __launch_bounds__(128 * kHopperGroups, 1) hopper_mma_kernel(const bf16* random, int steps, float* sink) {
#ifdef PRT_SM90A
  extern __shared__ uint8_t raw[];
  auto* tiles = reinterpret_cast<bf16*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t{1023});
  for (int i = threadIdx.x; i < (kHopperGroups * 64 + kHopperN) * kTile; i += blockDim.x) tiles[i] = random[i];
  prt::fence_async_proxy();
  __syncthreads();
  const uint64_t b = prt::wgmma_desc(tiles), a = prt::wgmma_desc(tiles + (kHopperN + 64 * (threadIdx.x / 128)) * kTile);
  float acc[kHopperN / 2] = {};
  for (int s = 0; s < steps; ++s) {
    prt::wgmma_fence();
#pragma unroll
    for (int round = 0; round < kHopperRounds; ++round)
#pragma unroll
      for (int k = 0; k < kTile / 16; ++k) prt::Wgmma<kHopperN, bf16>::mma(acc, a + 2 * k, b + 2 * k, 1);
    prt::wgmma_commit();
    prt::wgmma_wait<0>();
  }
  prt::wgmma_keep(acc);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kHopperN / 2; ++i) sum += acc[i];
  if (sum == 1234.5f) *sink = sum;
#endif
}

// Elsewhere: 8 warps a block, mma.sync out of registers, 4 x 4 tiles of 16 x 8 with 2 sets of operands.
constexpr int kWarps = 8, kTilesM = 4, kTilesN = 4, kSets = 2;
constexpr double kStepFlops = 2.0 * 16 * 8 * 16 * kTilesM * kTilesN * kSets * kWarps;

__global__ void __launch_bounds__(32 * kWarps) mma_kernel(const uint32_t* random, int steps, float* sink) {
  uint32_t a[kSets][kTilesM][4], b[kSets][kTilesN][2];
  const uint32_t* r = random + threadIdx.x;
#pragma unroll
  for (int set = 0; set < kSets; ++set) {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i, r += blockDim.x) a[set][m][i] = *r;
#pragma unroll
    for (int n = 0; n < kTilesN; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i, r += blockDim.x) b[set][n][i] = *r;
  }
  float acc[kTilesM][kTilesN][4] = {};
  for (int s = 0; s < steps; ++s)
#pragma unroll
    for (int set = 0; set < kSets; ++set)
#pragma unroll
      for (int m = 0; m < kTilesM; ++m)
#pragma unroll
        for (int n = 0; n < kTilesN; ++n) prt::mma_16816<bf16>(acc[m][n], a[set][m], b[set][n][0], b[set][n][1]);
  float sum = 0;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m)
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) sum += acc[m][n][0] + acc[m][n][1] + acc[m][n][2] + acc[m][n][3];
  if (sum == 1234.5f) *sink = sum;
}

}  // namespace

int32_t gpu_count() { return prt::cuda_device_count(); }

int64_t gpu_memory_used(int32_t index) { return memory_used_now(pci_bus_id(index)); }

void describe_device(int32_t index, Machine& machine) {
  const prt::DeviceScope scope(index);
  int runtime = 0;
  prt::cuda_check(cudaRuntimeGetVersion(&runtime), "the CUDA version");
  machine.cuda = std::to_string(runtime / 1000) + "." + std::to_string(runtime % 1000 / 10);
  describe_gpu(pci_bus_id(index), machine);
}

Ceilings measure_ceilings(int32_t index) {
  const prt::DeviceScope scope(index);
  const prt::CudaContext context(index);
  const prt::CudaStream& s = context.stream();
  Stopwatch watch;
  Ceilings c;

  // 1 GiB is far beyond any L2; smaller cards give a quarter of what is free.
  const int64_t piece = kLoads * kThreads * 16;
  const int64_t bytes = std::min(int64_t{1} << 30, prt::device_memory_free(index) / 4) / piece * piece;
  const prt::Buffer from = prt::device_buffer(index, bytes, "the copy test"), to = prt::device_buffer(index, bytes, "the copy test");
  fill_random(s, prt::make_tensor(from.data(), prt::DType::bf16, bytes / 2), 1, 0, 1);
  const auto copy = [&] {
    prt::cuda_check(cudaMemcpyAsync(to.data(), from.data(), static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, s.handle), "a copy");
  };
  auto* sink = reinterpret_cast<uint32_t*>(to.data());
  const auto read = [&] {
    read_kernel<<<s.n_sm * 8, kThreads, 0, s.handle>>>(reinterpret_cast<const uint4*>(from.data()), bytes / piece, sink);
    prt::cuda_check(cudaGetLastError(), "the reading test");
  };
  watch.median_time(s, 3, copy);
  c.copy_bytes = 2.0 * static_cast<double>(bytes) / watch.median_time(s, 15, copy);
  watch.median_time(s, 3, read);
  c.read_bytes = static_cast<double>(bytes) / watch.median_time(s, 15, read);

  // About 20 ms a launch, so that the clocks settle where the power limit lets them.
  const bool hopper = s.arch == 90;
  const double step_flops = s.n_sm * (hopper ? kHopperStepFlops : 2 * kStepFlops);
  int steps = 1000;
  const auto multiply = [&] {
    auto* out = reinterpret_cast<float*>(sink);
    if (hopper) {
      prt::cuda_check(cudaFuncSetAttribute(hopper_mma_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kHopperSmem), "shared memory");
      hopper_mma_kernel<<<s.n_sm, 128 * kHopperGroups, kHopperSmem, s.handle>>>(reinterpret_cast<const bf16*>(from.data()), steps, out);
    } else {
      mma_kernel<<<2 * s.n_sm, 32 * kWarps, 0, s.handle>>>(reinterpret_cast<const uint32_t*>(from.data()), steps, out);
    }
    prt::cuda_check(cudaGetLastError(), "the tensor-core test");
  };
  watch.time(s, multiply);
  steps = static_cast<int>(std::clamp(20e-3 / (watch.time(s, multiply) / steps), 1000.0, 1e7));
  watch.time(s, multiply);
  c.tensor_flops = steps * step_flops / watch.median_time(s, 9, multiply);
  for (int i = 0; i < 10; ++i) multiply();  // the clocks are read while the cores are busy
  const Clocks clocks = clocks_now(pci_bus_id(index));
  c.sm_mhz = clocks.sm_mhz;
  c.memory_mhz = clocks.memory_mhz;
  prt::synchronize(s);
  return c;
}

}  // namespace prt_bench
