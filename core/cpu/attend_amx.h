// The same work as attend_chunk_f32 on the tile unit, for bf16 pages: both products take bf16 operands (queries and softmax weights are
// rounded) and accumulate in f32. Every element adds its terms in a fixed order, so the guarantees at the top of attend.h hold here too.
#pragma once
#include "cpu/amx.h"
#include "cpu/attend.h"

namespace prt::PRT_ISA {

// Picks the way for one (storage format, head size); load_queries of the same way must have filled the scratch.
template <class W>
PRT_INLINE bool use_amx([[maybe_unused]] int64_t d) {
#if defined(__AMX_BF16__)
  return __is_same(W, Bf16) && d % 32 == 0;
#else
  return false;
#endif
}

#if defined(__AMX_BF16__)
// q as bf16 rows [n_row][d], the left operand as it is.
PRT_INLINE void load_queries_amx(const Attention& a, const RowBlock& b, int64_t d, uint16_t* q) {
  for (int64_t i = 0; i < b.n_row; ++i)
    to_bf16(a.q.row<float>(b.first_row + i / b.group) + (b.kv_head * b.group + i % b.group) * d, q + i * d, d);
}

// Right operands hold pairs along the summed dimension. K: [4 blocks of 16 keys][d / 2][16 keys][2]; keys past n_key are zero, unread.
PRT_INLINE void pack_keys(const uint16_t* k, int64_t n_key, int64_t d, uint16_t* out) {
  for (int64_t key = 0; key < kPageTokens; key += 16)
    for (int64_t c = 0; c < d; c += 32) {
      __m512i r[16];
      for (int64_t i = 0; i < 16; ++i) r[i] = key + i < n_key ? _mm512_loadu_si512(k + (key + i) * d + c) : _mm512_setzero_si512();
      transpose(r);
      for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(out + (key * d / 2 + (c / 2 + i) * 16) * 2, r[i]);
    }
}

// V: [32 pairs of keys][d][2]
PRT_INLINE void pack_values(const uint16_t* v, int64_t n_key, int64_t d, uint16_t* out) {
  alignas(64) static constexpr uint16_t kFirst[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_load_si512(kFirst), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  for (int64_t key = 0; key < kPageTokens; key += 2)
    for (int64_t c = 0; c < d; c += 32) {
      const __m512i x = key < n_key ? _mm512_loadu_si512(v + key * d + c) : _mm512_setzero_si512();
      const __m512i y = key + 1 < n_key ? _mm512_loadu_si512(v + (key + 1) * d + c) : _mm512_setzero_si512();
      _mm512_storeu_si512(out + (key / 2 * d + c) * 2, _mm512_permutex2var_epi16(x, first, y));
      _mm512_storeu_si512(out + (key / 2 * d + c + 16) * 2, _mm512_permutex2var_epi16(x, second, y));
    }
}

// scores [rows][64] = q k^T for 16 rows
PRT_INLINE void score_tiles(const uint16_t* q, const uint16_t* k, int64_t d, float* scores) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t c = 0; c < d; c += 32) {
    const uint16_t* kc = k + c * 16;
    _tile_loadd(4, q + c, d * 2);
    _tile_loadd(5, kc, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, kc + 16 * d, 64);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(5, kc + 32 * d, 64);
    _tile_dpbf16ps(2, 4, 5);
    _tile_loadd(6, kc + 48 * d, 64);
    _tile_dpbf16ps(3, 4, 6);
  }
  _tile_stored(0, scores, kPageTokens * 4);
  _tile_stored(1, scores + 16, kPageTokens * 4);
  _tile_stored(2, scores + 32, kPageTokens * 4);
  _tile_stored(3, scores + 48, kPageTokens * 4);
}

// sum [16 rows][d] += p v; p: 64 bf16 weights at the start of each row of scores
PRT_INLINE void value_tiles(const float* p, const uint16_t* v, int64_t d, float* sum) {
  _tile_loadd(4, p, kPageTokens * 4);
  _tile_loadd(5, p + 16, kPageTokens * 4);
  for (int64_t c = 0; c < d; c += 32) {
    _tile_loadd(0, sum + c, d * 4);
    _tile_loadd(1, sum + c + 16, d * 4);
    _tile_loadd(6, v + c * 2, d * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, v + (c + 16) * 2, d * 4);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(6, v + (16 * d + c) * 2, d * 4);
    _tile_dpbf16ps(0, 5, 6);
    _tile_loadd(7, v + (16 * d + c + 16) * 2, d * 4);
    _tile_dpbf16ps(1, 5, 7);
    _tile_stored(0, sum + c, d * 4);
    _tile_stored(1, sum + c + 16, d * 4);
  }
}

// Tiles hold 16 rows, so `into` has room for n_row rounded up to 16; d is a multiple of 32, hence its own d_pad.
PRT_INLINE void attend_chunk_amx(const Attention& a, const RowBlock& b, int64_t c, const AttendScratch& s, const Partial& into) {
  const int64_t d = a.k_pages.shape[3];
  const uint16_t* q = reinterpret_cast<const uint16_t*>(s.q);
  uint16_t *k = reinterpret_cast<uint16_t*>(s.k), *v = reinterpret_cast<uint16_t*>(s.v);
  clear(into, b.n_row, d);
  amx_begin(16);
  for_pages(a, b, c, [&](int64_t key, int64_t n_key, int64_t page) {
    const int64_t at = (page * a.k_pages.shape[1] + b.kv_head) * kPageTokens * d;
    pack_keys(static_cast<const uint16_t*>(a.k_pages.data) + at, n_key, d, k);
    pack_values(static_cast<const uint16_t*>(a.v_pages.data) + at, n_key, d, v);
    for (int64_t r = 0; r < b.n_row; r += 16) score_tiles(q + r * d, k, d, s.scores + r * kPageTokens);
    softmax_page(a, b, key, n_key, kPageTokens, a.scale, s.scores, into, d);
    for (int64_t r = 0; r < b.n_row; ++r)
      to_bf16(s.scores + r * kPageTokens, reinterpret_cast<uint16_t*>(s.scores + r * kPageTokens), kPageTokens);
    for (int64_t r = 0; r < b.n_row; r += 16) value_tiles(s.scores + r * kPageTokens, v, d, into.sum + r * d);
  });
  amx_end();
}
#endif

template <class W>
PRT_INLINE void load_block(const Attention& a, const RowBlock& b, int64_t d, const AttendScratch& s) {
#if defined(__AMX_BF16__)
  if (use_amx<W>(d)) return load_queries_amx(a, b, d, reinterpret_cast<uint16_t*>(s.q));
#endif
  load_queries(a, b, d, s.q);
}

// Attends the rows of `b` to chunk c; the result is in s.chunk.
template <class W>
PRT_INLINE void attend_chunk(const Attention& a, const RowBlock& b, int64_t c, const AttendScratch& s) {
#if defined(__AMX_BF16__)
  if (use_amx<W>(a.k_pages.shape[3])) return attend_chunk_amx(a, b, c, s, s.chunk);
#endif
  attend_chunk_f32<W>(a, b, c, s, s.chunk);
}

}  // namespace prt::PRT_ISA
