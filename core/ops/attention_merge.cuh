// Split attention: merging the partial softmax sums of the warps of a CTA, and of CTAs.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/reduce.cuh"

namespace prt::cuda {

constexpr float kNegInf = -__builtin_inff();

__device__ __forceinline__ float pow2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A result of one query head: scores up to `top` (in powers of two), `total` = sum 2^(score - top), value = sum 2^(...) v.
struct Partial {
  float top = kNegInf, total = 0;
  float4 value{0, 0, 0, 0};  // of four dimensions
};
template <class T>
__device__ __forceinline__ void store_result(T* to, const Partial& p) {
  const float f = p.total == 0 ? 0 : __fdividef(1, p.total);
  const uint2 x{pack2<T>(p.value.x * f, p.value.y * f), pack2<T>(p.value.z * f, p.value.w * f)};
  *reinterpret_cast<uint2*>(to) = x;
}

// Counts an arrival: what was written before the last barrier is seen by whoever sees the count, and the other way round.
__device__ __forceinline__ uint32_t arrive(uint32_t* counter) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// A warp merges n parts of a result, in their order: 4 dimensions a lane, of up to 32 lanes. values and sums (top, total): both in shared
// or in global memory, `step` apart from part to part.
template <int kLanes, int kBatch>
__device__ __forceinline__ Partial merge_parts(const float4* values, int value_step, const float2* sums, int sum_step, int n) {
  constexpr int kAtOnce = 32 / kLanes;
  const int lane = threadIdx.x % 32, mine = kAtOnce > 1 ? lane / kLanes : 0;
  values += lane % kLanes;
  Partial p;
#pragma unroll 1
  for (int begin = 0; begin < n; begin += 32, values += 32 * value_step, sums += 32 * sum_step) {
    const int left = min(n - begin, 32);
    const float2 sum = lane < left ? sums[lane * sum_step] : float2{kNegInf, 0};
    float factor = 0;
#pragma unroll 1
    for (int i = 0; i < left; i += kBatch * kAtOnce) {
      float4 v[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) v[k] = values[min(i + k * kAtOnce + mine, left - 1) * value_step];
      if (i == 0) {
        const float top = warp_max(fmaxf(p.top, sum.x)), base = top == kNegInf ? 0 : top, old = pow2(p.top - base);
        factor = pow2(sum.x - base);
        p.top = top;
        p.total = p.total * old + warp_sum(sum.y * factor);
        p.value = {p.value.x * old, p.value.y * old, p.value.z * old, p.value.w * old};
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const float f = __shfl_sync(~0u, factor, i + k * kAtOnce + mine);
        p.value = {p.value.x + v[k].x * f, p.value.y + v[k].y * f, p.value.z + v[k].z * f, p.value.w + v[k].w * f};
      }
    }
  }
  if constexpr (kAtOnce == 2) {
    p.value.x += __shfl_xor_sync(~0u, p.value.x, 16), p.value.y += __shfl_xor_sync(~0u, p.value.y, 16);
    p.value.z += __shfl_xor_sync(~0u, p.value.z, 16), p.value.w += __shfl_xor_sync(~0u, p.value.w, 16);
  }
  return p;
}

// Where a decode kernel leaves its results.
struct DecodeOut {
  void* out;           // [n_entry][h_q][d_head], rows of out_stride elements
  float* partials;     // [2 CTAs][rows][d_head], then [2 CTAs][rows][2]
  uint32_t* counters;  // [CTAs][rows], or twice as many
  int64_t out_stride;
  int32_t rows;        // query heads of a head block; the last may have fewer
  float* log_total = nullptr;  // [n_entry][h_q], or null
  int32_t h_q = 0;             // with it
};
// A head block of an entry as its parts are merged. CTAs first to last have parts of it.
struct Cut {
  int entry, head0, heads, first, last;
};

// In shared memory a warp's part of a head block is [rows][kPad] units of 4 values, then [rows] (top, total): merge_bytes.
template <int D>
constexpr int kPad = D / 4 + 2;
template <int D>
__host__ __device__ constexpr int merge_bytes(int rows) {
  return (rows * (kPad<D> * 16 + 8) + 15) / 16 * 16;
}

// The warps' parts, `step` bytes apart, meet, after a barrier: a warp for each head, or two from d_head 256 on. If the head block is cut,
// the CTA's part goes to scratch, and the last warp to arrive there with a part of its head merges those too, by the same code: what is run
// once is mostly waited for.
template <class T, int D, int W, int kBatch, bool kTotal = false>  // kBatch: parts that are asked for together; kTotal: for log_total
__device__ __forceinline__ void merge(const DecodeOut& a, const Cut& cut, const uint8_t* parts, int step) {
  constexpr int kPieces = (D + 127) / 128, kLanes = D / 4 / kPieces;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float2* all_sums = reinterpret_cast<float2*>(a.partials + 2 * gridDim.x * a.rows * D);
#pragma unroll 1
  for (int i = warp; i < cut.heads * kPieces; i += W) {
    const int head = i / kPieces, unit = i % kPieces * kLanes;
    // Parts of a cut head block follow each other in scratch, and no two head blocks share a place.
    const int place = (cut.first + 1 + static_cast<int>(blockIdx.x)) * a.rows + head, place0 = (2 * cut.first + 1) * a.rows + head;
    const float4* values = reinterpret_cast<const float4*>(parts) + head * kPad<D> + unit;
    const float2* sums = reinterpret_cast<const float2*>(parts + a.rows * kPad<D> * 16) + head;
    int value_step = step / 16, sum_step = step / 8, n = W;
#pragma unroll 1
    for (bool whole = cut.first == cut.last;; whole = true) {
      const Partial p = merge_parts<kLanes, kBatch>(values, value_step, sums, sum_step, n);
      if (whole) {
        if (lane < kLanes) store_result(static_cast<T*>(a.out) + cut.entry * a.out_stride + (cut.head0 + head) * D + 4 * (unit + lane), p);
        if constexpr (kTotal)
          if (a.log_total && lane == 0 && unit == 0)
            a.log_total[int64_t{cut.entry} * a.h_q + cut.head0 + head] = (p.top + __log2f(p.total)) * 0.693147181f;
        break;
      }
      if (lane < kLanes) reinterpret_cast<float4*>(a.partials)[place * (D / 4) + unit + lane] = p.value;
      if (lane == 0) all_sums[place] = {p.top, p.total};
      __syncwarp();
      uint32_t* counter = a.counters + cut.first * a.rows * kPieces + i;
      const uint32_t before = __shfl_sync(~0u, lane == 0 ? arrive(counter) : 0, 0);
      if (before != static_cast<uint32_t>(cut.last - cut.first)) break;
      if (lane == 0) *counter = 0;
      __syncwarp();  // what lane 0 has seen, the others see
      values = reinterpret_cast<const float4*>(a.partials) + place0 * (D / 4) + unit, value_step = a.rows * (D / 4);
      sums = all_sums + place0, sum_step = a.rows, n = cut.last - cut.first + 1;
    }
  }
}

}  // namespace prt::cuda
