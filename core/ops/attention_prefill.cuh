// What the two prefill kernels (attention_prefill_sm90.cuh, attention_prefill_mma.cuh) share: the order of the work, and the softmax on
// scores that lie in registers in the layout of the tensor cores' results, which is the same for mma.sync and wgmma.
//
// A work item is (entry, tile of query rows, heads). A row of the tile is a (token, head) pair: the pack = h_q / h_kv heads that share a
// kv head are packed together, 64 / pack tokens to a group of 64 rows. Short entries fill a tile that way, and fewer tiles straddle the
// diagonal.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/types.cuh"
#include "ops/ops.h"

namespace prt::cuda {

struct PrefillItem {
  int32_t row, n_tok;     // query rows [row, row + n_tok); n_tok 0: no more work
  int32_t position;       // of the first row among the keys
  int32_t head;           // item head: heads [head * pack, (head + 1) * pack)
  int32_t begin, end;     // tiles of keys
  int32_t entry, kv_len;  // for the producer
};

struct PrefillParams {
  const int32_t *q_begin, *kv_len, *page_table;
  uint32_t* counters;  // [0] items drawn, [1] blocks that are done
  void* out;
  int64_t out_stride;
  int32_t n_entry, max_pages, h_kv, n_head, pack, d;  // n_head = h_q / pack item heads
  int32_t window, l2_bytes, n_sm;
  float scale_log2;
};

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Among the four lanes of a quad: lane q gives word i for lane i, and gets word q of lanes 0..3.
__device__ __forceinline__ uint4 quad_transpose(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  const uint32_t a = __shfl_xor_sync(~0u, odd ? w0 : w1, 1), b = __shfl_xor_sync(~0u, odd ? w2 : w3, 1);
  (odd ? w0 : w1) = a, (odd ? w2 : w3) = b;
  const uint32_t c = __shfl_xor_sync(~0u, high ? w0 : w2, 2), e = __shfl_xor_sync(~0u, high ? w1 : w3, 2);
  (high ? w0 : w2) = c, (high ? w1 : w3) = e;
  return {w0, w1, w2, w3};
}

// The order of the work, walked by one warp. Items of one section (as many kv heads as keep their keys and values in L2) come before
// those of the next. In a section the longest come first, so that the short ones fill the gaps at the end: of an entry the last tile, which
// sees most keys, and up to 32 entries by their length.
struct PrefillPlan {
  int32_t tile_tok, n_tile, section_heads, n_item, ranked;  // ranked: the entry whose rank is this lane's

  __device__ PrefillPlan(const PrefillParams& p, int32_t tile_tok, int32_t bytes_per_key) : tile_tok(tile_tok) {
    const int32_t lane = static_cast<int32_t>(threadIdx.x % 32);
    int32_t tiles = 0, longest = 1;
    for (int32_t e = lane; e < p.n_entry; e += 32) {
      tiles += (p.q_begin[e + 1] - p.q_begin[e] + tile_tok - 1) / tile_tok;
      longest = max(longest, p.kv_len[e]);
    }
    ranked = lane;
    if (p.n_entry > 1 && p.n_entry <= 32) {
      int32_t rank = 0;
      for (int32_t e = 0; e < p.n_entry; ++e) {
        const int32_t other = __shfl_sync(~0u, longest, e);
        rank += other > longest || (other == longest && e < lane);
      }
      for (int32_t e = 0; e < p.n_entry; ++e)
        if (__shfl_sync(~0u, rank, e) == lane) ranked = e;
    }
    n_tile = __reduce_add_sync(~0u, tiles);
    const int64_t head_bytes = static_cast<int64_t>(__reduce_max_sync(~0u, longest)) * bytes_per_key;
    // At least 8 items for each SM, as the order within a section is what balances them.
    const int32_t per_kv = p.n_head / p.h_kv, fit = static_cast<int32_t>(p.l2_bytes / head_bytes);
    const int32_t enough = 8 * p.n_sm / max(1, n_tile * per_kv) + 1;
    const int32_t n_section = (p.h_kv + max(fit, enough) - 1) / max(fit, enough);
    section_heads = (p.h_kv + n_section - 1) / n_section * per_kv;
    n_item = n_tile * p.n_head;
  }

  __device__ PrefillItem item(const PrefillParams& p, int32_t ticket, int32_t keys) const {
    const int32_t lane = static_cast<int32_t>(threadIdx.x % 32);
    const int32_t section = ticket / (n_tile * section_heads), in_section = ticket % (n_tile * section_heads);
    const int32_t first_head = section * section_heads, heads = min(section_heads, p.n_head - first_head);
    int32_t tile = in_section / heads;
    PrefillItem it;
    it.head = first_head + in_section % heads;
    for (int32_t e0 = 0;; e0 += 32) {
      const int32_t e = p.n_entry <= 32 ? ranked : e0 + lane;
      const int32_t n = e < p.n_entry ? (p.q_begin[e + 1] - p.q_begin[e] + tile_tok - 1) / tile_tok : 0;
      int32_t up_to = n;
#pragma unroll
      for (int32_t d = 1; d < 32; d *= 2) {
        const int32_t below = __shfl_up_sync(~0u, up_to, d);
        if (lane >= d) up_to += below;
      }
      const uint32_t found = __ballot_sync(~0u, tile < up_to);
      if (found) {
        const int32_t src = __ffs(static_cast<int32_t>(found)) - 1;
        tile = __shfl_sync(~0u, up_to, src) - 1 - tile;
        it.entry = __shfl_sync(~0u, e, src);
        break;
      }
      tile -= __shfl_sync(~0u, up_to, 31);
    }
    const int32_t row_end = p.q_begin[it.entry + 1];
    it.kv_len = p.kv_len[it.entry];
    it.row = p.q_begin[it.entry] + tile * tile_tok;
    it.n_tok = min(tile_tok, row_end - it.row);
    it.position = it.kv_len - (row_end - it.row);
    it.begin = p.window > 0 ? max(0, it.position + 1 - p.window) / keys : 0;
    it.end = max(it.begin + 1, (it.position + it.n_tok + keys - 1) / keys);
    return it;
  }
};

// The two rows of a group of 64 that a thread holds: in warp w, lane l, rows 16 w + l / 4 and 8 more; of a tile of keys the columns
// 8 j + 2 (l % 4) + {0, 1}. Element 4 j + 2 r + c of its registers is row r, column pair j, c.
struct PrefillRows {
  int32_t quad, row[2], tok[2];  // in the group, in the tile

  __device__ PrefillRows(int32_t group, int32_t pack) {
    quad = static_cast<int32_t>(threadIdx.x % 4);
    row[0] = static_cast<int32_t>(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4), row[1] = row[0] + 8;
    tok[0] = group * (64 / pack) + row[0] / pack, tok[1] = group * (64 / pack) + row[1] / pack;
  }
};

// One step of the running softmax: s becomes exp2(s * scale - top * scale) with the new top, total grows by it, and rescale is what the
// sums before this tile are to be multiplied by. first_key is the tile's; without kMasked every row sees every key.
template <bool kMasked, int kSize>
__device__ __forceinline__ void prefill_softmax(float (&s)[kSize], float (&top)[2], float (&total)[2], float (&rescale)[2],
                                                const PrefillParams& p, const PrefillRows& rows, int32_t position, int32_t first_key) {
  if constexpr (kMasked) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int32_t end = position + rows.tok[r] + 1 - first_key - 2 * rows.quad, begin = p.window > 0 ? end - p.window : INT32_MIN;
#pragma unroll
      for (int j = 0; j < kSize / 4; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (8 * j + c >= end || 8 * j + c < begin) s[4 * j + 2 * r + c] = -INFINITY;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float most = top[r];
#pragma unroll
    for (int j = 0; j < kSize / 4; ++j) most = fmaxf(most, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    const float base = kMasked && most == -INFINITY ? 0 : most * p.scale_log2;  // a masked row may have no key yet
    rescale[r] = exp2_approx(top[r] * p.scale_log2 - base);
    top[r] = most;
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kSize / 4; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& x = s[4 * j + 2 * r + c];
        x = exp2_approx(fmaf(x, p.scale_log2, -base));
        sum += x;
      }
    total[r] = total[r] * rescale[r] + sum;
  }
}

// The weights of 16 keys each as the A operand of the product with V.
template <class T, int kSize>
__device__ __forceinline__ void prefill_round(uint32_t (&w)[kSize / 8][4], const float (&s)[kSize]) {
#pragma unroll
  for (int k = 0; k < kSize / 8; ++k)
#pragma unroll
    for (int j = 0; j < 4; ++j) w[k][j] = pack2<T>(s[8 * k + 2 * j], s[8 * k + 2 * j + 1]);
}

template <class T, int kSize>
__device__ __forceinline__ void prefill_store(const float (&o)[kSize], const float (&total)[2], const PrefillParams& p,
                                              const PrefillRows& rows, const PrefillItem& it) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = total[r] + __shfl_xor_sync(~0u, total[r], 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const float inverse = 1 / sum;
    const bool mine = rows.row[r] < 64 / p.pack * p.pack && rows.tok[r] < it.n_tok;
    T* out = static_cast<T*>(p.out) + (it.row + rows.tok[r]) * p.out_stride + (it.head * p.pack + rows.row[r] % p.pack) * p.d;
#pragma unroll
    for (int j = 0; j < kSize / 4; j += 4) {  // four blocks of 8 columns; this lane ends up with block j + quad
      uint32_t x[4];
#pragma unroll
      for (int b = 0; b < 4; ++b) x[b] = pack2<T>(o[4 * (j + b) + 2 * r] * inverse, o[4 * (j + b) + 2 * r + 1] * inverse);
      const uint4 words = quad_transpose(x[0], x[1], x[2], x[3]);
      const int32_t column = 8 * (j + rows.quad);
      if (mine && column < p.d) *reinterpret_cast<uint4*>(out + column) = words;
    }
  }
}

}  // namespace prt::cuda
