#include "cpu/amx.h"
#include "cpu/dot.h"
#include "ops/cpu_table.h"

namespace prt::PRT_ISA {

namespace {

// Accumulators that fit the register file next to one row of operands.
#if defined(__AVX512F__)
constexpr int kTileRows = 5, kTileOuts = 5;
#else
constexpr int kTileRows = 3, kTileOuts = 4;
#endif
constexpr int64_t kCacheBytes = 512 << 10;  // a block of x that stays in the second-level cache while W passes by

PRT_INLINE void finish(const Linear& a, int64_t row, int64_t out, float value) {
  float* p = a.out.row<float>(row) + out;
  if (a.bias.data) value += static_cast<const float*>(a.bias.data)[out];
  *p = a.accumulate ? *p + value : value;
}

// Outputs out, out + gap, out + 2 gap, ...
template <class D, int kRows, int kOuts>
void tile(const Linear& a, const typename D::X* x, int64_t ld_x, int64_t row, int64_t out, int64_t gap) {
  float sums[kRows * kOuts];
  const int64_t n_in = a.weight.shape[1], ld_w = gap * a.weight.row_stride;
  dot_tile<D, kRows, kOuts>(x + row * ld_x, ld_x, a.weight.row<typename D::Weight>(out), ld_w, n_in, sums);
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kOuts; ++j) finish(a, row + i, out + j * gap, sums[i * kOuts + j]);
}

// Outputs [begin, end) of all rows. The weight rows of a tile lie far apart, each the head of a stream that the tile after it goes
// on with: a core prefetches several such streams at once, but neighbouring rows share a 4 KB page and count as one. Reading
// 270 MB on two cores: 24 GB/s with 8 streams each, 13 GB/s with 8 neighbouring rows (docs/kernels/decode_linear_cpu.md).
template <class D>
void dot_range(const Linear& a, const typename D::X* x, int64_t ld_x, int64_t begin, int64_t end) {
  const int64_t n_row = a.x.shape[0];
  const int64_t step = max64(kTileRows, kCacheBytes / (ld_x * static_cast<int64_t>(sizeof(*x))) / kTileRows * kTileRows);
  for (int64_t r0 = 0; r0 < n_row; r0 += step) {
    const int64_t r1 = min64(n_row, r0 + step);
    const int64_t gap = (end - begin) / kTileOuts;
    for (int64_t o = begin; o < begin + gap; ++o) {
      int64_t r = r0;
      for (; r + kTileRows <= r1; r += kTileRows) tile<D, kTileRows, kTileOuts>(a, x, ld_x, r, o, gap);
      for (; r < r1; ++r) tile<D, 1, kTileOuts>(a, x, ld_x, r, o, gap);
    }
    for (int64_t o = begin + gap * kTileOuts; o < end; ++o)
      for (int64_t r = r0; r < r1; ++r) tile<D, 1, 1>(a, x, ld_x, r, o, 1);
  }
}

// Outputs per work item: enough items to share out evenly, few enough that handing them out is free and the streams are long.
int64_t outs_per_item(int64_t n_out, int32_t n_threads, int64_t multiple) {
  return min64(512, round_up(max64(1, n_out / (4 * n_threads)), multiple));
}

template <class D>
void dot_linear(ThreadPool& pool, const Linear& a, const typename D::X* x, int64_t ld_x) {
  const int64_t n_out = a.weight.shape[0], per_item = outs_per_item(n_out, pool.size(), kTileOuts);
  pool.parallel_for((n_out + per_item - 1) / per_item,
                    [&](int64_t item, int32_t) { dot_range<D>(a, x, ld_x, item * per_item, min64(n_out, (item + 1) * per_item)); });
}

#if defined(__AVX512BF16__)
void bf16_linear(ThreadPool& pool, const Linear& a) {
  const int64_t n_row = a.x.shape[0], n_in = a.x.shape[1], ld_x = round_up(n_in, 32);
  uint16_t* x = static_cast<uint16_t*>(a.scratch.data);
  pool.parallel_for(n_row, [&](int64_t r, int32_t) { to_bf16(a.x.row<float>(r), x + r * ld_x, n_in); });
  dot_linear<DotBf16>(pool, a, x, ld_x);
}
#endif

#if defined(__AMX_BF16__)
// sums [16 outputs][16 rows] -> out[row][output], n rows
PRT_INLINE void finish_square(const Linear& a, int64_t row, int64_t n, int64_t out, const float* sums) {
  __m512i r[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(sums + i * 16);
  transpose(r);
  const vf bias = a.bias.data ? load(static_cast<const float*>(a.bias.data) + out) : vf{};
  for (int64_t i = 0; i < n; ++i) {
    float* p = a.out.row<float>(row + i) + out;
    const vf value = (vf)r[i] + bias;
    store(p, a.accumulate ? load(p) + value : value);
  }
}

// Outputs [begin, end) of up to 16 rows. The 16 weight rows of a tile lie far apart for the reason given at dot_range; one tile at a
// time, because a second one would double the streams past what the prefetcher follows.
void amx_few_rows(const Linear& a, const uint16_t* x, int64_t columns, int64_t begin, int64_t end) {
  alignas(64) float sums[256];
  const int64_t n_row = a.x.shape[0], n_in = a.x.shape[1], gap = (end - begin) / 16;
  for (int64_t o = begin; o < begin + gap; ++o) {
    amx_single(a.weight.row<uint16_t>(o), gap * a.weight.row_stride, x, columns, n_in, sums);
    for (int64_t j = 0; j < 16; ++j)
      for (int64_t r = 0; r < n_row; ++r) finish(a, r, o + j * gap, sums[j * columns + r]);
  }
}

// Outputs [begin, end) of more than 16 rows, in groups of rows whose packed form stays in the second-level cache while the outputs pass.
void amx_many_rows(const Linear& a, const uint16_t* x, int64_t begin, int64_t end) {
  alignas(64) float sums[1024];
  const int64_t n_row = a.x.shape[0], n_in = a.x.shape[1], ld_w = a.weight.row_stride, block = n_in * 16;
  const int64_t step = max64(32, kCacheBytes / (n_in * 2) / 32 * 32);
  for (int64_t r0 = 0; r0 < n_row; r0 += step) {
    const int64_t r1 = min64(n_row, r0 + step);
    for (int64_t o = begin; o < end; o += 32) {
      const uint16_t* w = a.weight.row<uint16_t>(o);
      const int64_t groups = o + 32 <= end ? 2 : 1;  // of 16 outputs
      int64_t r = r0;
      for (; groups == 2 && r + 16 < r1; r += 32) {
        amx_square(w, ld_w, x + r / 16 * block, n_in, sums);
        for (int64_t j = 0; j < 4; ++j)
          finish_square(a, r + 16 * (j % 2), min64(16, n_row - r - 16 * (j % 2)), o + 16 * (j / 2), sums + 256 * j);
      }
      for (; r < r1; r += 16)
        for (int64_t j = 0; j < groups; ++j) {
          amx_single(w + 16 * j * ld_w, ld_w, x + r / 16 * block, 16, n_in, sums);
          finish_square(a, r, min64(16, n_row - r), o + 16 * j, sums);
        }
    }
  }
}

void amx_linear(ThreadPool& pool, const Linear& a) {
  const int64_t n_row = a.x.shape[0], n_in = a.x.shape[1], n_out = a.weight.shape[0];
  const int64_t columns = n_row == 1 ? 1 : 16, n_block = (n_row + 15) / 16;
  uint16_t* x = static_cast<uint16_t*>(a.scratch.data);
  pool.parallel_for(n_block, [&](int64_t b, int32_t) {
    amx_pack(a.x.row<float>(b * 16), a.x.row_stride, min64(16, n_row - b * 16), columns, n_in, x + b * 16 * n_in);
  });
  const int64_t per_item = outs_per_item(n_out, pool.size(), 32);
  pool.parallel_for((n_out + per_item - 1) / per_item, [&](int64_t item, int32_t) {
    const int64_t begin = item * per_item, end = min64(n_out, begin + per_item);
    amx_begin(columns);
    n_row <= 16 ? amx_few_rows(a, x, columns, begin, end) : amx_many_rows(a, x, begin, end);
    amx_end();
  });
}
#endif

}  // namespace

void linear(ThreadPool& pool, const Linear& a) {
#if defined(__AVX512BF16__)
  if (a.weight.dtype == DType::bf16) {
#if defined(__AMX_BF16__)
    if (a.x.shape[1] % 32 == 0 && a.weight.shape[0] % 16 == 0) return amx_linear(pool, a);
#endif
    return bf16_linear(pool, a);
  }
#endif
  with_weight(static_cast<int32_t>(a.weight.dtype),
              [&](auto format) { dot_linear<DotF32<decltype(format)>>(pool, a, static_cast<const float*>(a.x.data), a.x.row_stride); });
}

}  // namespace prt::PRT_ISA
