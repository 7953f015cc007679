// A row of K in the registers that the tensor cores read it from: what decode attention and score_rows share.
#pragma once
#include "cuda/mma.cuh"

namespace prt::cuda {

// A row of K as part of the A operand of S^T: thread (g, c) holds of rows g and g + 8 the elements 32 i + 8 c ... + 7, which stand for
// the columns 2c 2c+1 2c+8 2c+9 of two products. Q as the B operand is read the same way.
template <class T, int D>
__device__ __forceinline__ void load_row(uint32_t (&r)[D / 8], const T* row, int c) {
#pragma unroll
  for (int i = 0; i < D / 32; ++i) {
    const uint4 x = load_once_16(row + 32 * i + 8 * c);
    r[4 * i] = x.x, r[4 * i + 1] = x.y, r[4 * i + 2] = x.z, r[4 * i + 3] = x.w;
  }
  if constexpr (D % 32 != 0) {
    const uint2 x = load_once_8(row + D / 32 * 32 + 4 * c);
    r[D / 8 - 2] = x.x, r[D / 8 - 1] = x.y;
  }
}

}  // namespace prt::cuda
