// One vector type, vf, of kWidth floats, as wide as the instruction set this file is compiled for (PRT_ISA). GCC and clang vector
// extensions carry the arithmetic, so the baseline works on any processor; intrinsics only where the compiler needs a hint.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace prt::PRT_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float vf __attribute__((vector_size(kWidth * 4)));
typedef int32_t vi __attribute__((vector_size(kWidth * 4)));
typedef uint32_t vu __attribute__((vector_size(kWidth * 4)));
typedef uint16_t vh __attribute__((vector_size(kWidth * 2)));
typedef uint8_t vb __attribute__((vector_size(kWidth)));

#define PRT_INLINE static inline __attribute__((always_inline))

PRT_INLINE vf splat(float x) { return vf{} + x; }
PRT_INLINE vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
PRT_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

PRT_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

PRT_INLINE vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

PRT_INLINE float sum(vf v) {  // pairwise, the same order on every call
  float lane[kWidth];
  store(lane, v);
  for (int n = kWidth / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lane[i] += lane[i + n];
  return lane[0];
}

PRT_INLINE float max_of(vf v) {
  float lane[kWidth];
  store(lane, v);
  for (int n = kWidth / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lane[i] = lane[i] > lane[i + n] ? lane[i] : lane[i + n];
  return lane[0];
}

// e^x to 2 ulp (Cephes' polynomial after x = n ln 2 + r); exactly 1 at 0, and 0 below -87.
PRT_INLINE vf exp(vf x) {
  const vi low = x < splat(-87.0f);
  x = max(x, splat(-87.0f));
  x = (x > splat(88.0f)) ? splat(88.0f) : x;
  const vf t = x * 1.44269504088896341f;
  const vi n = __builtin_convertvector(t + ((t >= 0.0f) ? splat(0.5f) : splat(-0.5f)), vi);
  const vf nf = __builtin_convertvector(n, vf);
  const vf r = fma(nf, splat(2.12194440e-4f), fma(nf, splat(-0.693359375f), x));
  vf p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  const vf y = p * (vf)((n + 127) << 23);
  return low ? vf{} : y;
}

// Storage formats. A weight format is one of these types; to add one, add its load() here and its case to with_weight().
struct F32 {
  using T = float;
  PRT_INLINE vf load(const T* p) { return PRT_ISA::load(p); }
  PRT_INLINE float get(T x) { return x; }
  PRT_INLINE T put(float x) { return x; }
};

struct Bf16 {
  using T = uint16_t;
  PRT_INLINE vf load(const T* p) {
    vh h;
    __builtin_memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
  }
  PRT_INLINE float get(T x) {
    const uint32_t u = uint32_t{x} << 16;
    float f;
    __builtin_memcpy(&f, &u, 4);
    return f;
  }
  PRT_INLINE T put(float x) {  // round to nearest even
    uint32_t u;
    __builtin_memcpy(&u, &x, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<T>((u >> 16) | 0x40);
    return static_cast<T>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
};

struct F16 {
  using T = uint16_t;
  PRT_INLINE float get(T h) {
    const uint32_t sign = uint32_t{h & 0x8000u} << 16, e = (h >> 10) & 31, m = h & 0x3ffu;
    uint32_t u = e == 31 ? sign | 0x7f800000u | (m << 13) : sign | ((e + 112) << 23) | (m << 13);
    float f;
    if (e == 0) {
      f = static_cast<float>(m) * 5.9604644775390625e-8f;
      return sign ? -f : f;
    }
    __builtin_memcpy(&f, &u, 4);
    return f;
  }
  PRT_INLINE vf load(const T* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    vf v;
    for (int i = 0; i < kWidth; ++i) v[i] = get(p[i]);
    return v;
#endif
  }
  PRT_INLINE T put(float x) {
    uint32_t u;
    __builtin_memcpy(&u, &x, 4);
    const uint32_t sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return static_cast<T>(sign | 0x7e00u);
    if (a >= 0x477ff000u) return static_cast<T>(sign | 0x7c00u);
    if (a < 0x38800000u) {  // subnormal half: let the float adder do the rounding
      float r;
      __builtin_memcpy(&r, &a, 4);
      r += 0.5f;
      __builtin_memcpy(&u, &r, 4);
      return static_cast<T>(sign | (u - 0x3f000000u));
    }
    return static_cast<T>(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1)) >> 13));
  }
};

// e4m3, of which an index of sparse attention is made.
struct F8 {
  using T = uint8_t;
  PRT_INLINE vf load(const T* p) {
#if defined(__AVX512F__)  // as f16, whose bias is 15 instead of 7
    const __m256i h = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return (vf)_mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(h, 7), _mm256_set1_epi16(-0x4080))) * 256.0f;
#elif defined(__F16C__)
    const __m128i h = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return (vf)_mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(h, 7), _mm_set1_epi16(-0x4080))) * 256.0f;
#else
    vb b;
    __builtin_memcpy(&b, p, sizeof b);
    const vu u = __builtin_convertvector(b, vu), a = u & 0x7f;
    const vf normal = (vf)((a << 20) + (120u << 23));
    const vf f = a < 8 ? normal + normal - 0.015625f : normal;  // 2^-6, the smallest normal number
    return (vf)((vu)f | (u & 0x80) << 24);
#endif
  }
  PRT_INLINE float get(T b) {
    const uint32_t a = b & 0x7fu, u = a << 20;
    float f;
    __builtin_memcpy(&f, &u, 4);
    f *= 0x1p120f;
    return b & 0x80 ? -f : f;
  }
  PRT_INLINE T put(float x) {  // round to nearest even; what is larger becomes 448
    uint32_t u;
    __builtin_memcpy(&u, &x, 4);
    const uint32_t sign = (u >> 24) & 0x80u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return static_cast<T>(sign | 0x7fu);
    if (a >= 0x43e00000u) return static_cast<T>(sign | 0x7eu);
    if (a < 0x3c800000u) {  // subnormal: let the float adder do the rounding
      float r;
      __builtin_memcpy(&r, &a, 4);
      r += 0x1p14f;
      __builtin_memcpy(&u, &r, 4);
      return static_cast<T>(sign | (u - 0x46800000u));
    }
    return static_cast<T>(sign | ((a - 0x3c000000u + 0x7ffffu + ((a >> 20) & 1)) >> 20));
  }
};

// Calls f with the storage type of `dtype` (a prt::DType, passed as its number to keep this header free of others).
template <class F>
PRT_INLINE void with_weight(int32_t dtype, F&& f) {
  if (dtype == 2) f(Bf16{});
  else if (dtype == 1) f(F16{});
  else f(F32{});
}

PRT_INLINE int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }
PRT_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
PRT_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace prt::PRT_ISA
