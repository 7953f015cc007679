// Element types and their scalar conversions. The vector forms are in cpu/simd.h.
#pragma once
#include <cstdint>
#include <cstring>

#include <algorithm>

#include "base/check.h"

namespace prt {

enum class DType : int32_t { f32 = PRT_F32, f16 = PRT_F16, bf16 = PRT_BF16, i32 = PRT_I32, u16 = PRT_U16, f8 = PRT_F8, i64 = PRT_I64 };

inline int64_t dtype_size(DType t) {
  switch (t) {
    case DType::f8: return 1;
    case DType::f32:
    case DType::i32: return 4;
    case DType::i64: return 8;
    default: return 2;
  }
}

inline const char* dtype_name(DType t) {
  switch (t) {
    case DType::f32: return "f32";
    case DType::f16: return "f16";
    case DType::bf16: return "bf16";
    case DType::i32: return "i32";
    case DType::u16: return "u16";
    case DType::f8: return "f8";
    case DType::i64: return "i64";
  }
  return "?";
}

// From a caller's number. Weights and activations are floats; integers carry ids and counts, f8 the index of sparse attention.
inline DType float_dtype(int32_t value, const char* what) {
  check(value == PRT_F32 || value == PRT_F16 || value == PRT_BF16, what, " is ", value,
        ", expected PRT_F32 (0), PRT_F16 (1) or PRT_BF16 (2)");
  return static_cast<DType>(value);
}

inline float bits_to_f32(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint32_t f32_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float bf16_to_f32(uint16_t h) { return bits_to_f32(uint32_t{h} << 16); }

inline uint16_t f32_to_bf16(float f) {  // round to nearest even; NaN stays NaN
  uint32_t u = f32_to_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline float f16_to_f32(uint16_t h) {
  const uint32_t sign = uint32_t{h & 0x8000u} << 16, exp = (h >> 10) & 31, man = h & 0x3ffu;
  if (exp == 31) return bits_to_f32(sign | 0x7f800000u | (man << 13));
  if (exp != 0) return bits_to_f32(sign | ((exp + 112) << 23) | (man << 13));
  const float tiny = static_cast<float>(man) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -tiny : tiny;
}

inline uint16_t f32_to_f16(float f) {  // round to nearest even; overflow becomes infinity
  const uint32_t u = f32_to_bits(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (a >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (a < 0x38800000u) {  // subnormal half: let the float adder do the rounding
    const float r = bits_to_f32(a) + 0.5f;
    return static_cast<uint16_t>(sign | (f32_to_bits(r) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1)) >> 13));
}

// e4m3: 4 bits of exponent with bias 7, 3 of mantissa, no infinity.
inline float f8_to_f32(uint8_t b) {
  const uint32_t a = b & 0x7fu;
  const float f = a == 0x7f ? bits_to_f32(0x7fc00000u) : bits_to_f32(a << 20) * 0x1p120f;  // the exponents' biases differ by 120
  return b & 0x80 ? -f : f;
}

inline uint8_t f32_to_f8(float f) {  // round to nearest even; what is larger becomes 448; NaN stays NaN
  const uint32_t u = f32_to_bits(f), sign = (u >> 24) & 0x80u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7fu);
  if (a >= 0x43e00000u) return static_cast<uint8_t>(sign | 0x7eu);
  if (a < 0x3c800000u)  // subnormal, multiples of 2^-9: let the float adder do the rounding
    return static_cast<uint8_t>(sign | (f32_to_bits(bits_to_f32(a) + 0x1p14f) - 0x46800000u));
  return static_cast<uint8_t>(sign | ((a - 0x3c000000u + 0x7ffffu + ((a >> 20) & 1)) >> 20));
}

inline float to_f32(const void* p, int64_t i, DType t) {
  if (t == DType::f32) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  return t == DType::f16 ? f16_to_f32(h) : bf16_to_f32(h);
}

inline void from_f32(void* p, int64_t i, DType t, float f) {
  if (t == DType::f32) static_cast<float*>(p)[i] = f;
  else static_cast<uint16_t*>(p)[i] = t == DType::f16 ? f32_to_f16(f) : f32_to_bf16(f);
}

}  // namespace prt
