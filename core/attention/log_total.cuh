// log sum e^scores of every head: shared by score_rows and score_blocks, whose scores the L2 still has.
#pragma once
#include "attention/choice.h"
#include "cuda/hopper.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace prt::cuda {

constexpr int kTotalThreads = 512, kTotalBlocks = 8;

// Scores of an entry of n rows: one for each row, or for each block of the whole pages before its last row.
template <bool kOfBlocks>
__device__ __forceinline__ int n_score(int n) {
  constexpr int kPage = static_cast<int>(kPageTokens);
  return kOfBlocks ? (n - 1) / kPage * (kPage / static_cast<int>(kBlockRows)) : n;
}

// A cluster of blocks per (entry, head); the first one adds up the parts, in their order. Floor: 4 bytes a score.
template <bool kOfBlocks>
__global__ void __launch_bounds__(kTotalThreads)
    log_total_kernel(float* log_total, const float* scores, const int32_t* kv_len, const int32_t* state, int64_t room) {
  __shared__ float2 parts[kTotalBlocks];
  __shared__ float tops[32], sums[32];
  const int rank = static_cast<int>(blockIdx.x), n_block = static_cast<int>(gridDim.x), entry = static_cast<int>(blockIdx.z);
  const int64_t row = int64_t{blockIdx.z} * gridDim.y + blockIdx.y;
  cluster_arrive_block();
  pdl_wait();
  pdl_launch();
  cluster_wait_block();  // all blocks are there
  if (state && state[entry] < 0) return;
  const int n = n_score<kOfBlocks>(kv_len[entry]), each = (n + n_block - 1) / n_block, end = min((rank + 1) * each, n);
  const float* x = scores + row * room;
  LogSum sum;
  for (int i = rank * each + static_cast<int>(threadIdx.x); i < end; i += 4 * kTotalThreads) {
    float some[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) some[k] = i + k * kTotalThreads < end ? x[i + k * kTotalThreads] : -INFINITY;
    sum.add(some);
  }
  const float top = block_max(sum.top, tops), total = block_sum(sum.sum > 0 ? sum.sum * expf(sum.top - top) : 0, sums);
  if (threadIdx.x == 0) *in_block(&parts[rank], 0) = {top, total};
  cluster_arrive_block();
  if (rank != 0) return;
  cluster_wait_block();
  if (threadIdx.x != 0) return;
  float most = parts[0].x, all = 0;
  for (int i = 1; i < n_block; ++i) most = fmaxf(most, parts[i].x);
  for (int i = 0; i < n_block; ++i) all += parts[i].y > 0 ? parts[i].y * expf(parts[i].x - most) : 0;
  log_total[row] = n > 0 ? most + logf(all) : 0;
}

template <bool kOfBlocks>
void add_log_total(const CudaStream& stream, const Tensor& log_total, const Tensor& scores, const Tensor& kv_len, const Tensor& state) {
  const int64_t n_entry = scores.shape[0], h_q = scores.shape[1];
  int64_t blocks = stream.arch >= 90 ? kTotalBlocks : 1;
  while (blocks > 1 && n_entry * h_q * blocks > 2 * stream.n_sm) blocks /= 2;
  launch_clusters(stream, log_total_kernel<kOfBlocks>,
                  dim3(static_cast<uint32_t>(blocks), static_cast<uint32_t>(h_q), static_cast<uint32_t>(n_entry)), dim3(kTotalThreads), 0,
                  blocks, log_total.as<float>(), scores.as<float>(), kv_len.as<int32_t>(), state.as<int32_t>(), scores.shape[2]);
}

}  // namespace prt::cuda
