// Element types on the device. A kernel is a template over one of f32 / f16 / bf16 and converts at the edges of its arithmetic.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "base/dtype.h"

namespace prt {

using f16 = __half;
using bf16 = __nv_bfloat16;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) return x;
  else if constexpr (std::is_same_v<T, f16>) return __float2half_rn(x);
  else return __float2bfloat16_rn(x);
}

// with_dtype(t, [&](auto zero) { using T = decltype(zero); ... }): the one place that turns a DType into a type.
template <class F>
void with_dtype(DType t, F&& f) {
  if (t == DType::f32) f(float{});
  else if (t == DType::f16) f(f16{});
  else f(bf16{});
}

}  // namespace prt
