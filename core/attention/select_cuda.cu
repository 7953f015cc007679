// Which rows each kv head attends to: scores by the whole GPU, then a cluster of blocks per (entry, kv head) chooses. Nothing is decided on
// the host. docs/kernels/select.md has the measurements, and what lost.
#include <algorithm>
#include <cmath>

#include "attention/select_fit.cuh"
#include "attention/select_moment.cuh"
#include "attention/select_ranges.cuh"
#include "attention/select_score.cuh"
#include "cuda/vec.cuh"
#include "ops/cuda_table.h"

namespace prt::cuda {
namespace selecting {
namespace {

template <class T, int D, bool kFit>
__global__ void __launch_bounds__(kThreads, 1) choose_kernel(const __grid_constant__ SelectArgs a) {
  using Choice = std::conditional_t<kFit, Fit<T>, Moment<T, D>>;
  extern __shared__ uint4 shared[];
  if (a.state) pdl_wait();  // a kernel may have written it
  Choice x(a, shared);
  x.prepare();
  cluster_arrive_block();
  pdl_wait();
  pdl_launch();
  cluster_wait_block();  // all blocks are there and have set up their memory
  if (a.place(x.entry) < 0) return;
  const int log_share = !kFit && a.searched && x.e.n_cluster > 0 ? a.log_share : 0, n_block = 1 << log_share;  // blocks of a query head
#pragma unroll 1
  for (int head = x.rank >> log_share; head < a.group; head += x.blocks >> log_share) {
    if (x.e.n_cluster == 0 || !a.searched) x.take_all(head);
    else if constexpr (kFit) x.choose(head);
    else x.choose(head, x.rank & (n_block - 1), n_block);
    __syncthreads();
  }
  if (n_block > 1 && x.rank >> log_share >= a.group) cluster_arrive_block(), cluster_wait_block();  // with the others, who count
  cluster_arrive_block();
  cluster_wait_block();
  if (a.tail) clear_tail(x);
  if (x.rank == 0) write_ranges(x);
  cluster_arrive_block();
  if (x.rank == 0) cluster_wait_block();  // the others read its bitmap
}

// Blocks and warps of the first launch: as many as their memory allows, and every warp keeps its kv head.
dim3 score_grid(const CudaStream& stream, int64_t h_kv, int64_t warp_bytes, int& warps) {
  warps = static_cast<int>(std::min<int64_t>(kScoreWarps, stream.smem_per_block / std::max<int64_t>(warp_bytes, 1)));
  if (h_kv <= warps) warps = static_cast<int>(warps / h_kv * h_kv);
  int64_t blocks = stream.n_sm;
  while (blocks > 0 && blocks * warps % h_kv != 0) --blocks;
  return dim3(static_cast<uint32_t>(blocks > 0 ? blocks : h_kv));
}
int64_t most_units(const CudaStream& stream, int64_t h_kv) { return std::max<int64_t>(stream.n_sm, h_kv) * kScoreWarps / h_kv; }

template <class T, int D, bool kFit>
void run(const CudaStream& stream, SelectArgs a) {
  int warps;
  dim3 grid = score_grid(stream, a.h_kv, Scorer<T, D>::smem(a.group), warps);
  a.n_unit = static_cast<int32_t>(grid.x) * warps / a.h_kv;
  grid.y = static_cast<uint32_t>((a.n_entry + 31) / 32);
  launch(stream, score_kernel<T, D>, grid, dim3(static_cast<uint32_t>(warps * 32)), int64_t{warps} * Scorer<T, D>::smem(a.group), a);
  // As many blocks as the SMs take at once.
  int blocks = stream.arch >= 90 ? 8 : 1;
  while (blocks > 1 && int64_t{a.h_kv} * a.n_entry * blocks > stream.n_sm) blocks /= 2;
  while (a.group << a.log_share < blocks) ++a.log_share;
  if (a.group << a.log_share > blocks && a.log_share > 0) --a.log_share;
  a.in_shared = true;
  a.in_shared = Chooser<T, D>::smem(a) <= stream.smem_per_block;
  check(Chooser<T, D>::smem(a) <= stream.smem_per_block, "select: ", a.room, " clusters do not fit into shared memory");
  launch_clusters(stream, choose_kernel<T, D, kFit>,
                  dim3(static_cast<uint32_t>(blocks), static_cast<uint32_t>(a.h_kv), static_cast<uint32_t>(a.n_entry)), dim3(kThreads),
                  Chooser<T, D>::smem(a), blocks, a);
  if (a.true_mass)
    launch(stream, measure_kernel<T, D>,
           dim3(static_cast<uint32_t>(a.group), static_cast<uint32_t>(a.h_kv), static_cast<uint32_t>(a.n_entry)), dim3(kThreads), 0, a);
}

int64_t room_of(int64_t max_pages, int64_t n_slot) { return (max_pages * n_slot + kTile - 1) / kTile * kTile; }

}  // namespace
}  // namespace selecting

int64_t select_scratch_bytes(const CudaStream& stream, int64_t n_entry, int64_t h_q, int64_t h_kv, int64_t max_pages, int64_t n_slot) {
  const int64_t room = selecting::room_of(max_pages, n_slot);
  return n_entry * (h_q * (16 * room + 8 * selecting::most_units(stream, h_kv)) + 4 * h_kv * (room + selecting::kTile));
}

void select(const CudaStream& stream, const Select& x) {
  using namespace selecting;
  const int64_t n_entry = x.q.shape[0], d = x.k_pages.shape[3], h_kv = x.k_pages.shape[1], h_q = x.q.shape[1] / d, group = h_q / h_kv;
  const int64_t n_slot = x.index.centroid.shape[2], max_pages = x.page_table.shape[1], n = n_entry * h_q;
  if (n_entry == 0) return;
  check(max_pages * n_slot < 1 << kNumberBits, "select: ", max_pages, " pages of ", n_slot, " clusters, expected less than ",
        1 << kNumberBits, " clusters");
  check(group <= 32, "select: ", group, " query heads per kv head, expected at most 32");
  SelectArgs a{};
  a.ranges = x.ranges.as<int2>(), a.n_range = x.n_range.as<int32_t>();
  a.tail = x.tail.as<float>(), a.mass = x.mass.as<float>(), a.true_mass = x.true_mass.as<float>();
  a.counters = x.counters.as<unsigned long long>();
  a.state = x.state.as<int32_t>(), a.made = x.made.as<int32_t>();
  a.q = x.q.data, a.k = x.k_pages.data;
  a.page_table = x.page_table.as<int32_t>(), a.kv_len = x.kv_len.as<int32_t>(), a.closed = x.closed.as<int32_t>();
  a.centroid = x.index.centroid.as<uint8_t>(), a.variance = x.index.variance.as<uint8_t>(), a.range = x.index.range.as<int2>();
  a.q_stride = x.q.row_stride, a.table_stride = x.page_table.row_stride, a.closed_stride = x.closed.row_stride;
  a.ranges_stride = x.ranges.row_stride / 2, a.n_range_stride = x.n_range.row_stride, a.tail_stride = x.tail.row_stride,
  a.tail_row = x.tail ? x.tail.shape[2] : 0;
  a.mass_stride = x.mass.row_stride, a.true_stride = x.true_mass.row_stride, a.max_range = x.ranges.shape[2];
  a.n_entry = static_cast<int32_t>(n_entry), a.h_kv = static_cast<int32_t>(h_kv), a.group = static_cast<int32_t>(group);
  a.d = static_cast<int32_t>(d), a.n_slot = static_cast<int32_t>(n_slot);
  a.per_slot = static_cast<uint32_t>((int64_t{1} << 31) / n_slot + 1);
  a.room = static_cast<int32_t>(room_of(max_pages, n_slot));
  a.n_table = static_cast<int32_t>((max_pages + 3) / 4 * 4);
  a.sorted = x.scratch.as<uint64_t>(), a.open = reinterpret_cast<float2*>(a.sorted + n * a.room);
  a.keys = reinterpret_cast<int32_t*>(a.open + n * most_units(stream, h_kv)), a.sorted_mass = reinterpret_cast<float*>(a.keys + n * a.room);
  a.begin = reinterpret_cast<int32_t*>(a.sorted_mass + n * a.room);
  a.fit = x.estimator == Estimator::fit, a.searched = x.p < 1 || x.budget < 1;
  a.scale = x.scale, a.p = x.p, a.aim = aimed_share(x.p), a.budget = x.budget, a.least = static_cast<int32_t>(least_clusters(x.p));
  a.log_odds = x.p < 1 ? static_cast<float>(std::log2(a.aim / (1 - static_cast<double>(a.aim)))) : INFINITY;
  if (a.fit) a.variance = a.centroid;  // goes with a factor of 0
  const auto any = reinterpret_cast<uintptr_t>(x.k_pages.data) | reinterpret_cast<uintptr_t>(x.index.centroid.data) |
                   reinterpret_cast<uintptr_t>(x.index.variance.data);
  const bool aligned = any % 16 == 0 && in_pieces(x.q, 8);
  with_dtype(x.k_pages.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (a.fit) return run<T, 0, true>(stream, a);
    if constexpr (!std::is_same_v<T, float>) {
      if (aligned && d == 128) return run<T, 128, false>(stream, a);
      if (aligned && d == 64) return run<T, 64, false>(stream, a);
    }
    run<T, 0, false>(stream, a);
  });
}

}  // namespace prt::cuda
