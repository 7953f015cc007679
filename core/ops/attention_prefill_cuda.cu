#include "cuda/launch.cuh"
#include "ops/attention_cuda.h"
#include "ops/attention_prefill_mma.cuh"
#include "ops/attention_prefill_sm90.cuh"
#include "ops/cuda_table.h"

namespace prt::cuda {
namespace {

PrefillParams prefill_params(const CudaStream& s, const Attention& a) {
  const auto i32 = [](int64_t x) { return static_cast<int32_t>(std::min<int64_t>(x, 1 << 30)); };
  const int64_t d = a.k_pages.shape[3], h_kv = a.k_pages.shape[1], h_q = a.q.shape[1] / d, group = h_q / h_kv,
                pack = group <= 64 ? group : 1;
  PrefillParams p{};
  p.q_begin = a.q_begin.as<int32_t>(), p.kv_len = a.kv_len.as<int32_t>(), p.page_table = a.page_table.as<int32_t>();
  p.counters = s.counters;
  p.out = a.out.data, p.out_stride = a.out.row_stride;
  p.n_entry = i32(a.kv_len.shape[0]), p.max_pages = i32(a.page_table.shape[1]);
  p.h_kv = i32(h_kv), p.n_head = i32(h_q / pack), p.pack = i32(pack), p.d = i32(d);
  p.window = i32(a.window), p.l2_bytes = i32(s.l2_bytes * 2 / 3), p.n_sm = s.n_sm;
  p.scale_log2 = a.scale * 1.44269504f;
  return p;
}

// The most items there can be: every entry may leave its last tile unfilled.
int64_t prefill_items(const Attention& a, const PrefillParams& p, int64_t groups) {
  return (a.q.shape[0] / (groups * (64 / p.pack)) + p.n_entry) * p.n_head;
}

template <class C>
void prefill_wgmma(const CudaStream& s, const Attention& a, const PrefillParams& p) {
  const int64_t rows = a.k_pages.shape[0] * p.h_kv * kPageTokens, h_q = p.n_head * p.pack;
  const CUtensorMap q_map =
      make_tensor_map<3>(a.q.data, a.q.dtype, {{p.d, h_q, a.q.shape[0]}, {p.d * 2, a.q.row_stride * 2}, {64, p.pack, 64 / p.pack}},
                         CU_TENSOR_MAP_SWIZZLE_128B);
  const CUtensorMap k_map = make_matrix_map(a.k_pages.data, a.k_pages.dtype, rows, p.d, p.d, 64, 64, CU_TENSOR_MAP_SWIZZLE_128B);
  const CUtensorMap v_map = make_matrix_map(a.v_pages.data, a.v_pages.dtype, rows, p.d, p.d, 64, 64, CU_TENSOR_MAP_SWIZZLE_128B);
  const int64_t grid = std::min<int64_t>(s.n_sm, prefill_items(a, p, C::kGroups));
  launch(s, attention_prefill_wgmma<C>, static_cast<uint32_t>(grid), C::kThreads, C::kSmem, q_map, k_map, v_map, p);
}

template <class T, int kHead>
void prefill_mma(const CudaStream& s, const Attention& a, const PrefillParams& p) {
  launch(s, attention_prefill_mma<T, kHead>, static_cast<uint32_t>(prefill_items(a, p, 1)), 128, 3 * 64 * kHead * 2, a.q.as<T>(),
         a.q.row_stride, a.k_pages.as<T>(), a.v_pages.as<T>(), p);
}

template <class T>
void prefill(const CudaStream& s, const Attention& a) {
  const PrefillParams p = prefill_params(s, a);
  if (s.arch == 90) {
    if (p.d <= 64) prefill_wgmma<PrefillTile<T, 64, 128, 3, 4, 2>>(s, a, p);
    else if (p.d <= 128) prefill_wgmma<PrefillTile<T, 128, 128, 2, 2, 2>>(s, a, p);
    else prefill_wgmma<PrefillTile<T, 256, 64, 2, 2, 1>>(s, a, p);
  } else {
    if (p.d <= 64) prefill_mma<T, 64>(s, a, p);
    else if (p.d <= 128) prefill_mma<T, 128>(s, a, p);
    else prefill_mma<T, 256>(s, a, p);
  }
}

// Both kernels move 16 bytes at a time.
bool aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.row_stride % 8 == 0; }

}  // namespace

void attention_prefill(const CudaStream& s, const Attention& a) {
  const bool whole = a.k_pages.shape[3] % 8 == 0 && aligned(a.q) && aligned(a.out) && aligned(a.k_pages) && aligned(a.v_pages);
  if (a.q.shape[0] == 0) return;
  if (a.k_pages.dtype == DType::bf16 && whole) prefill<bf16>(s, a);
  else if (a.k_pages.dtype == DType::f16 && whole) prefill<f16>(s, a);
  else attention_any(s, a);
}

}  // namespace prt::cuda
