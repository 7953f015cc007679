// Transposes a block of 32-bit values: kWidth rows (stride ld) of kWidth values -> kWidth vectors.
#pragma once
#include "cpu/simd.h"

namespace prt::PRT_ISA {

#if defined(__AVX512F__)
PRT_INLINE void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
#elif defined(__AVX2__)
PRT_INLINE void transpose(__m256 r[8]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}
#endif

// out[column][row] (stride ld_out) = float(in[row][column]) for n_row rows of d columns in storage format W; rows up to
// round_up(n_row, kWidth) are written, those past n_row as zeros. in is not read past row n_row.
template <class W>
PRT_INLINE void transpose_to_f32(const typename W::T* in, int64_t ld_in, int64_t n_row, int64_t d, float* out, int64_t ld_out) {
  for (int64_t r = 0; r < n_row; r += kWidth) {
    const int64_t n = min64(kWidth, n_row - r);
    int64_t c = 0;
#if defined(__AVX512F__)
    for (; c + 16 <= d; c += 16) {
      __m512i block[16];
      for (int i = 0; i < 16; ++i) block[i] = i < n ? (__m512i)W::load(in + (r + i) * ld_in + c) : _mm512_setzero_si512();
      transpose(block);
      for (int i = 0; i < 16; ++i) store(out + (c + i) * ld_out + r, (vf)block[i]);
    }
#elif defined(__AVX2__)
    for (; c + 8 <= d; c += 8) {
      __m256 block[8];
      for (int i = 0; i < 8; ++i) block[i] = i < n ? (__m256)W::load(in + (r + i) * ld_in + c) : _mm256_setzero_ps();
      transpose(block);
      for (int i = 0; i < 8; ++i) store(out + (c + i) * ld_out + r, (vf)block[i]);
    }
#endif
    for (; c < d; ++c)
      for (int64_t i = 0; i < kWidth; ++i) out[c * ld_out + r + i] = i < n ? W::get(in[(r + i) * ld_in + c]) : 0.0f;
  }
}

}  // namespace prt::PRT_ISA
