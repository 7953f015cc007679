// Dot products of a few rows of x with a few rows of a weight matrix, both along their contiguous dimension. Every (row, output)
// pair has its own accumulator that walks n_in in the same steps, so a result does not depend on the tile it was computed in:
// one row or a thousand, the bits are the same.
#pragma once
#include "cpu/simd.h"

namespace prt::PRT_ISA {

// Any weight format, x in f32.
template <class W>
struct DotF32 {
  using X = float;
  using Weight = typename W::T;
  static constexpr int kStep = kWidth;
  PRT_INLINE vf load_x(const X* p) { return load(p); }
  PRT_INLINE vf load_w(const Weight* p) { return W::load(p); }
  PRT_INLINE vf load_x_part(const X* p, int64_t n) {
    vf v{};
    for (int64_t i = 0; i < n; ++i) v[i] = p[i];
    return v;
  }
  PRT_INLINE vf load_w_part(const Weight* p, int64_t n) {
    vf v{};
    for (int64_t i = 0; i < n; ++i) v[i] = W::get(p[i]);
    return v;
  }
  PRT_INLINE vf dot(vf x, vf w, vf acc) { return fma(x, w, acc); }
};

#if defined(__AVX512BF16__)
// bf16 weights, x rounded to bf16: 32 products per instruction, accumulated in f32.
struct DotBf16 {
  using X = uint16_t;
  using Weight = uint16_t;
  static constexpr int kStep = 32;
  PRT_INLINE __m512i load_x(const X* p) { return _mm512_loadu_si512(p); }
  PRT_INLINE __m512i load_w(const Weight* p) { return _mm512_loadu_si512(p); }
  PRT_INLINE __m512i load_x_part(const X* p, int64_t n) { return _mm512_maskz_loadu_epi16((1u << n) - 1, p); }
  PRT_INLINE __m512i load_w_part(const Weight* p, int64_t n) { return _mm512_maskz_loadu_epi16((1u << n) - 1, p); }
  PRT_INLINE vf dot(__m512i x, __m512i w, vf acc) { return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)x, (__m512bh)w); }
};

// n values rounded to bf16, nearest even.
PRT_INLINE void to_bf16(const float* x, uint16_t* out, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
  for (; i < n; ++i) out[i] = Bf16::put(x[i]);
}
#endif

PRT_INLINE float sum_lanes(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  return sum(v);
#endif
}

template <class D, int kRows, int kOuts>
PRT_INLINE void dot_tile(const typename D::X* x, int64_t ld_x, const typename D::Weight* w, int64_t ld_w, int64_t n_in, float* sums) {
  vf acc[kRows][kOuts] = {};
  int64_t k = 0;
  for (; k + D::kStep <= n_in; k += D::kStep) {
    decltype(D::load_x(x)) xv[kRows];
    for (int i = 0; i < kRows; ++i) xv[i] = D::load_x(x + i * ld_x + k);
    for (int j = 0; j < kOuts; ++j) {
      const auto wv = D::load_w(w + j * ld_w + k);
      for (int i = 0; i < kRows; ++i) acc[i][j] = D::dot(xv[i], wv, acc[i][j]);
    }
  }
  if (k < n_in) {
    for (int j = 0; j < kOuts; ++j) {
      const auto wv = D::load_w_part(w + j * ld_w + k, n_in - k);
      for (int i = 0; i < kRows; ++i) acc[i][j] = D::dot(D::load_x_part(x + i * ld_x + k, n_in - k), wv, acc[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kOuts; ++j) sums[i * kOuts + j] = sum_lanes(acc[i][j]);
}

}  // namespace prt::PRT_ISA
