// Prefill attention with mma.sync, in the manner of FlashAttention-2, for every GPU from sm_80 on. A block is four warps with 16 query
// rows each; keys come one page at a time. K's next page is on its way (cp.async) while the block works on V, and the other way round,
// so one buffer each is enough and d_head 256 fits the 99 KB of the smaller chips.
#pragma once
#include "cuda/hopper.cuh"
#include "ops/attention_prefill.cuh"

namespace prt::cuda {

// 16-byte unit c of row r: permuted within 128 bytes, so that ldmatrix reads eight rows without a bank conflict.
template <int kHead>
__device__ __forceinline__ uint32_t prefill_unit(uint32_t tile, int32_t row, int32_t c) {
  return tile + static_cast<uint32_t>(row * kHead * 2 + (c ^ (row & 7)) * 16);
}

__device__ __forceinline__ void copy_async(uint32_t dst, const void* src, bool there) {  // zeros where not
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

__device__ __forceinline__ void load_matrix(uint32_t (&r)[4], uint32_t addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(addr)
               : "memory");
}
__device__ __forceinline__ void load_matrix_transposed(uint32_t (&r)[4], uint32_t addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(addr)
               : "memory");
}

// d[16][8] += a[16][16] b[16][8]
template <class T>
__device__ __forceinline__ void mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <class T, int kHead>
__global__ void __launch_bounds__(128)
    attention_prefill_mma(const T* q, int64_t q_stride, const T* k_pages, const T* v_pages, const PrefillParams p) {
#ifndef PRT_SM90A  // there the other kernel runs
  constexpr int kUnits = kHead / 8, kTile = 64 * kHead * 2;
  extern __shared__ __align__(128) char raw[];
  const uint32_t q_tile = static_cast<uint32_t>(__cvta_generic_to_shared(raw)), k_tile = q_tile + kTile, v_tile = k_tile + kTile;
  pdl_wait();
  pdl_launch();
  const int32_t thread = static_cast<int32_t>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const PrefillPlan plan(p, 64 / p.pack, kHead * 4);
  if (static_cast<int32_t>(blockIdx.x) >= plan.n_item) return;
  const PrefillItem it = plan.item(p, static_cast<int32_t>(blockIdx.x), 64);
  const PrefillRows rows(0, p.pack);

  for (int32_t i = thread; i < 64 * kUnits; i += 128) {
    const int32_t row = i / kUnits, c = i % kUnits, tok = row / p.pack;
    const bool there = tok < it.n_tok && c * 8 < p.d;
    copy_async(prefill_unit<kHead>(q_tile, row, c),
               there ? q + (it.row + tok) * q_stride + (it.head * p.pack + row % p.pack) * p.d + c * 8 : q, there);
  }
  const int32_t kv_head = it.head / (p.n_head / p.h_kv);
  const int32_t lo = p.window > 0 ? max(0, it.position + 1 - p.window) : 0;
  const int32_t* pages = p.page_table + static_cast<int64_t>(it.entry) * p.max_pages;
  const auto load = [&](uint32_t tile, const T* base, int32_t n) {  // rows without a key become 0: what lies there may be NaN
    const int32_t from = lo - n * 64, to = it.kv_len - n * 64;
    const T* page = base + (static_cast<int64_t>(pages[n]) * p.h_kv + kv_head) * 64 * p.d;
    for (int32_t i = thread; i < 64 * kUnits; i += 128) {
      const int32_t row = i / kUnits, c = i % kUnits;
      const bool there = row >= from && row < to && c * 8 < p.d;
      copy_async(prefill_unit<kHead>(tile, row, c), there ? page + row * p.d + c * 8 : base, there);
    }
    copy_commit();
  };

  float o[kHead / 2] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
  load(k_tile, k_pages, it.end - 1);
  for (int32_t n = it.end - 1; n >= it.begin; --n) {
    __syncthreads();  // V's tile has been used
    load(v_tile, v_pages, n);
    copy_wait<1>();
    __syncthreads();

    float s[32] = {};
#pragma unroll(kHead > 128 ? 2 : kHead / 16)  // more would spill
    for (int k = 0; k < kHead / 16; ++k) {
      uint32_t a[4];
      load_matrix(a, prefill_unit<kHead>(q_tile, warp * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // 16 keys
        uint32_t b[4];
        load_matrix(b, prefill_unit<kHead>(k_tile, 16 * j + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
        mma<T>(s + 8 * j, a, b[0], b[1]);
        mma<T>(s + 8 * j + 4, a, b[2], b[3]);
      }
    }
    __syncthreads();  // K's tile has been used
    if (n > it.begin) load(k_tile, k_pages, n - 1);
    else copy_commit();

    float rescale[2];
    uint32_t w[4][4];
    const bool clear = n * 64 + 64 <= it.position + 1 && (p.window == 0 || n * 64 >= it.position + it.n_tok - p.window);
    if (clear) prefill_softmax<false>(s, top, total, rescale, p, rows, it.position, n * 64);
    else prefill_softmax<true>(s, top, total, rescale, p, rows, it.position, n * 64);
    prefill_round<T>(w, s);
#pragma unroll
    for (int j = 0; j < kHead / 2; ++j) o[j] *= rescale[j / 2 % 2];
    copy_wait<1>();
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int j = 0; j < kHead / 16; ++j) {  // 16 columns
        uint32_t b[4];
        load_matrix_transposed(b, prefill_unit<kHead>(v_tile, 16 * k + lane % 16, 2 * j + lane / 16));
        mma<T>(o + 8 * j, w[k], b[0], b[1]);
        mma<T>(o + 8 * j + 4, w[k], b[2], b[3]);
      }
  }
  prefill_store<T>(o, total, p, rows, it);
#endif
}

}  // namespace prt::cuda
