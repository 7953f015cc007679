#include "attention/choice.h"
#include "attention/mass_cuda.cuh"
#include "cuda/launch.cuh"
#include "cuda/vec.cuh"
#include "ops/cuda_table.h"

namespace prt::cuda {
namespace selecting {
namespace {

constexpr int kMassWarps = 16, kThreads = 128;

struct CountArgs {
  unsigned long long* counters;
  float* true_mass;
  const void *q, *k;
  const int32_t *page_table, *kv_len, *n_range, *state, *made;
  const int2 *ranges, *closed;
  int64_t q_stride, table_stride, max_range, unit, sinks, window;
  int32_t n_entry, h_kv, group, d;
  float scale, p;  // scale: times log2(e)

  __device__ int place(int entry) const { return state ? state[entry] : entry; }
  __device__ const int2* ranges_of(int place, int kv_head) const { return ranges + (int64_t{place} * h_kv + kv_head) * max_range; }
};

// A thread per kv head, entry after entry. A few numbers: it is a matter of the launch.
__global__ void __launch_bounds__(kThreads) count_rows_kernel(const __grid_constant__ CountArgs a) {
  pdl_wait();
  pdl_launch();
  for (int h = static_cast<int>(threadIdx.x); h < a.h_kv; h += kThreads) {
    AttentionCounters& c = reinterpret_cast<AttentionCounters*>(a.counters)[h];
    for (int e = 0; e < a.n_entry; ++e) {
      const int place = a.place(e), len = a.kv_len[e];
      if (place < 0 && a.closed) continue;
      const int64_t made = place >= 0 && a.made ? a.made[place] : len, end = window_begin(made, a.sinks, a.window, a.unit);
      const int64_t exact = a.closed ? len - (a.closed[e].y - a.closed[e].x) * kPage : min(a.sinks, end) + len - end;
      const int n = place >= 0 ? a.n_range[int64_t{place} * a.h_kv + h] : 0;
      const int64_t attended = place < 0 ? len : n > 0 ? a.ranges_of(place, h)[n - 1].y : 0;
      ++c.n_step;
      c.n_context += len;
      c.n_exact += exact;
      c.n_selected += attended - exact;
      c.n_full += place < 0;
    }
  }
}

// For benchmarks: a block per query head goes through all keys.
template <class T, int D>
__global__ void __launch_bounds__(32 * kMassWarps) true_mass_kernel(const __grid_constant__ CountArgs a) {
  __shared__ float2 room[2][kMassWarps];
  const int head = blockIdx.x, kv_head = blockIdx.y, entry = blockIdx.z;
  pdl_wait();
  pdl_launch();
  const int place = a.place(entry);
  if (place < 0) return;
  const int64_t h = int64_t{kv_head} * a.group + head;
  const RowScorer<T, D> q(static_cast<const T*>(a.q) + entry * a.q_stride + h * a.d, a.d);
  const HeadKeys<T> keys{static_cast<const T*>(a.k), a.page_table + entry * a.table_stride, a.h_kv, kv_head, a.d};
  const float share = held_share<kMassWarps>(q, keys, a.kv_len[entry], a.ranges_of(place, kv_head),
                                             a.n_range[int64_t{place} * a.h_kv + kv_head], a.scale, room);
  if (threadIdx.x > 0) return;
  a.true_mass[int64_t{entry} * a.h_kv * a.group + h] = share;
  count_true(a.counters + kv_head * kAttentionCounters, share, a.p);
}

}  // namespace
}  // namespace selecting

void count_rows(const CudaStream& stream, const CountRows& x) {
  using namespace selecting;
  const int64_t d = x.k_pages.shape[3], h_kv = x.k_pages.shape[1], group = x.q.shape[1] / d / h_kv, n_entry = x.q.shape[0];
  if (n_entry == 0) return;
  const CountArgs a{x.counters.as<unsigned long long>(),
                    x.true_mass.as<float>(),
                    x.q.data,
                    x.k_pages.data,
                    x.page_table.as<int32_t>(),
                    x.kv_len.as<int32_t>(),
                    x.n_range.as<int32_t>(),
                    x.state.as<int32_t>(),
                    x.made.as<int32_t>(),
                    x.ranges.as<int2>(),
                    x.closed.as<int2>(),
                    x.q.row_stride,
                    x.page_table.row_stride,
                    x.ranges.shape[2],
                    x.unit,
                    x.sinks,
                    x.window,
                    static_cast<int32_t>(n_entry),
                    static_cast<int32_t>(h_kv),
                    static_cast<int32_t>(group),
                    static_cast<int32_t>(d),
                    x.scale * kLog2e,
                    x.p};
  launch(stream, count_rows_kernel, dim3(1), dim3(kThreads), 0, a);
  if (!x.true_mass) return;
  const dim3 grid(static_cast<uint32_t>(group), static_cast<uint32_t>(h_kv), static_cast<uint32_t>(n_entry));
  const bool aligned = reinterpret_cast<uintptr_t>(x.k_pages.data) % 16 == 0 && in_pieces(x.q, 8);
  with_dtype(x.k_pages.dtype, [&](auto zero) {
    using T = decltype(zero);
    auto* kernel = true_mass_kernel<T, 0>;
    if constexpr (!std::is_same_v<T, float>)
      if (aligned) kernel = d == 128 ? true_mass_kernel<T, 128> : d == 64 ? true_mass_kernel<T, 64> : kernel;
    launch(stream, kernel, grid, dim3(32 * kMassWarps), 0, a);
  });
}

}  // namespace prt::cuda
