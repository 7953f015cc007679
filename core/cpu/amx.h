// Matrix product on the AMX tile unit: out^T = W x^T in tiles of 16 outputs x 16 rows x 32 inputs.
// W is read where it lies: 16 rows of 64 bytes are a tile. x is repacked once per product, in the pair order that the unit wants:
// [block of 16 rows][n_in / 2][rows of the block][2]. A decode step has one row, so its tiles are one column wide and the packed
// form is the row itself. The unit adds along n_in in a fixed order for every element: one row or many, the bits are the same.
#pragma once
#include "cpu/simd.h"

#if defined(__AMX_BF16__)
#include "cpu/dot.h"
#include "cpu/transpose.h"

namespace prt::PRT_ISA {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0-3 accumulate (16 outputs x columns), 4-5 hold W (16 x 32), 6-7 hold x (16 pairs x columns).
PRT_INLINE void amx_begin(int64_t columns) {
  TileConfig c;
  for (int i = 0; i < 8; ++i) {
    c.rows[i] = 16;
    c.row_bytes[i] = i == 4 || i == 5 ? 64 : static_cast<uint16_t>(columns * 4);
  }
  _tile_loadconfig(&c);
}
PRT_INLINE void amx_end() { _tile_release(); }

// x rows [0, n) (n <= 16), f32 -> packed pairs with `columns` columns; columns past n are zero. n_in is a multiple of 32.
PRT_INLINE void amx_pack(const float* x, int64_t ld, int64_t n, int64_t columns, int64_t n_in, uint16_t* out) {
  if (columns == 1) return to_bf16(x, out, n_in);
  for (int64_t k = 0; k < n_in; k += 32) {
    __m512i r[16];
    for (int64_t i = 0; i < 16; ++i)
      r[i] = i < n ? (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i * ld + k + 16), _mm512_loadu_ps(x + i * ld + k))
                   : _mm512_setzero_si512();
    transpose(r);
    for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(out + (k / 2 + i) * 32, r[i]);
  }
}

// 16 outputs x one block of x. sums: [16][columns].
PRT_INLINE void amx_single(const uint16_t* w, int64_t ld_w, const uint16_t* x, int64_t columns, int64_t n_in, float* sums) {
  _tile_zero(0);
  for (int64_t k = 0; k < n_in; k += 32) {
    _tile_loadd(6, x + k * columns, columns * 4);
    _tile_loadd(4, w + k, ld_w * 2);
    _tile_dpbf16ps(0, 4, 6);
  }
  _tile_stored(0, sums, columns * 4);
}

// 32 outputs x two blocks of 16 rows. sums: [2 outputs groups][2 blocks][16][16].
PRT_INLINE void amx_square(const uint16_t* w, int64_t ld_w, const uint16_t* x, int64_t n_in, float* sums) {
  const int64_t w_stride = ld_w * 2, block = n_in * 16;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < n_in; k += 32) {
    _tile_loadd(6, x + k * 16, 64);
    _tile_loadd(4, w + k, w_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, x + block + k * 16, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, w + 16 * ld_w + k, w_stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}

}  // namespace prt::PRT_ISA
#endif
