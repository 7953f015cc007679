// The plain form of `cluster`: any type, head size and segment, everything in device memory, f32 centroids, a launch per step. All
// `iterations` are queued; once no row changes its cluster they leave at once.
#include <algorithm>

#include "attention/segment_cuda.cuh"
#include "ops/cuda_table.h"

namespace prt::cuda {
namespace {

constexpr int kPlainWarps = 8, kPlainThreads = 32 * kPlainWarps, kSortWarps = 32;

struct Plain {
  float *centroid, *bias;  // [k][d], [k]
  int32_t *cluster_of, *first, *hist, *state;  // [n rows], [k + 1], [kSortWarps][k], {changed, done}
  char* copy;  // [n rows][d]
  static __host__ __device__ int64_t bytes(int64_t n, int64_t k, int64_t d) {  // n: rows
    return (4 * (k * d + k + n + k + 1 + kSortWarps * k + 2) + 15) / 16 * 16 + 4 * n * d;
  }
  __device__ Plain(char* base, int64_t n, int64_t k, int64_t d) {
    centroid = reinterpret_cast<float*>(base);
    bias = centroid + k * d;
    cluster_of = reinterpret_cast<int32_t*>(bias + k);
    first = cluster_of + n;
    hist = first + k + 1;
    state = hist + kSortWarps * k;
    copy = base + bytes(n, k, d) - 4 * n * d;
  }
};

struct PlainArgs : ClusterArgs {
  char* scratch;  // one part per kv head of this launch
  int32_t d, item0;
};

// A thread block's segment and kv head, blockIdx.y of the launch.
struct Item {
  const PlainArgs& a;
  const int item, n, k;
  const Segment s;
  const Plain w;
  __device__ explicit Item(const PlainArgs& a)
      : a(a),
        item(a.item0 + static_cast<int>(blockIdx.y)),
        n(a.n * kPage),
        k(a.k_clusters),
        s(a.segment(item / a.h_kv, item % a.h_kv)),
        w(a.scratch + blockIdx.y * Plain::bytes(n, k, a.d), n, k, a.d) {}
};

__global__ void __launch_bounds__(kPlainThreads) plain_draw_kernel(const __grid_constant__ PlainArgs a) {
  pdl_wait();
  pdl_launch();
  const Item i(a);
  draw_rows(i.w.cluster_of, i.k, i.n, a.seed, i.s.head, [&](int j, int row) {
    i.w.first[j] = j;
    a.order[i.s.row(j)] = static_cast<uint16_t>(row);
  });
  if (threadIdx.x == 0) i.w.first[i.k] = i.k, i.w.state[0] = i.w.state[1] = 0;
  __syncthreads();
  for (int r = threadIdx.x; r < i.n; r += kPlainThreads) i.w.cluster_of[r] = -1;
}

// Warp by cluster: its mean, as a centroid of the iteration or with kIndex as the index's, of keys (then with variance and range) or
// values.
template <class T, bool kIndex>
__global__ void __launch_bounds__(kPlainThreads) plain_mean_kernel(const __grid_constant__ PlainArgs a, bool keys) {
  pdl_wait();
  pdl_launch();
  const Item i(a);
  const int j = static_cast<int>(blockIdx.x) * kPlainWarps + static_cast<int>(threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (j >= i.k || (!kIndex && i.w.state[1] != 0)) return;
  const int begin = i.w.first[j], end = i.w.first[j + 1];
  if (!kIndex && begin == end) return;
  const T* from = static_cast<const T*>(keys ? a.k : a.v);
  const float n = static_cast<float>(max(end - begin, 1));
  const auto mean_of = [&](int e, auto&& f) {
    float sum = 0;
    for (int p = begin; p < end; ++p) sum += f(to_float(from[i.s.row(a.order[i.s.row(p)]) * a.d + e]));
    return sum / n;
  };
  float square = 0;
  for (int e = lane; e < a.d; e += 32) {
    const float mean = mean_of(e, [](float x) { return x; });
    if constexpr (!kIndex) i.w.centroid[j * a.d + e] = mean, square += mean * mean;
    else {
      const int64_t at = i.s.slot(j, a.n_slot) * a.d + e;
      (keys ? a.centroid : a.value)[at] = to_f8(mean);
      if (keys) a.variance[at] = to_f8(mean_of(e, [&](float x) { return (x - mean) * (x - mean); }));
    }
  }
  if constexpr (!kIndex) {
    square = warp_sum(square);
    if (lane == 0) i.w.bias[j] = square * -0.5f;
  } else if (keys && lane == 0) {
    int* range = a.range + i.s.slot(j, a.n_slot) * 2;
    range[0] = begin - j / a.n_slot * kPage, range[1] = end - begin;
  }
}

// Block by page: 64 keys against 64 centroids at a time, 4 x 4 per thread.
template <class T>
__global__ void __launch_bounds__(kPlainThreads) plain_assign_kernel(const __grid_constant__ PlainArgs a) {
  constexpr int kStep = 16;
  __shared__ float xs[kStep][kPage + 4], cs[kStep][kPage + 4];
  pdl_wait();
  pdl_launch();
  const Item i(a);
  if (i.w.state[1] != 0) return;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16, row0 = static_cast<int>(blockIdx.x) * kPage;
  const T* keys = static_cast<const T*>(a.k) + i.s.row(row0) * a.d;
  float best[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
  int nearest[4] = {};
  for (int j0 = 0; j0 < i.k; j0 += kPage) {
    float sum[4][4] = {};
    for (int e0 = 0; e0 < a.d; e0 += kStep) {
      __syncthreads();
      for (int t = threadIdx.x; t < kPage * kStep; t += kPlainThreads) {
        const int e = e0 + t % kStep, r = t / kStep;
        xs[t % kStep][r] = e < a.d ? to_float(keys[r * a.d + e]) : 0;
        cs[t % kStep][r] = e < a.d && j0 + r < i.k ? i.w.centroid[(j0 + r) * int64_t{a.d} + e] : 0;
      }
      __syncthreads();
#pragma unroll
      for (int e = 0; e < kStep; ++e)
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int c = 0; c < 4; ++c) sum[r][c] += xs[e][4 * ty + r] * cs[e][4 * tx + c];
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int j = j0 + 4 * tx + c;
      if (j >= i.k) continue;
      const float bias = i.w.bias[j];
#pragma unroll
      for (int r = 0; r < 4; ++r)
        if (sum[r][c] + bias > best[r]) best[r] = sum[r][c] + bias, nearest[r] = j;
    }
  }
  bool changed = false;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int step = 1; step < 16; step *= 2) {
      const float other = __shfl_xor_sync(kWarp, best[r], step);
      const int number = __shfl_xor_sync(kWarp, nearest[r], step);
      if (other > best[r] || (other == best[r] && number < nearest[r])) best[r] = other, nearest[r] = number;
    }
    if (tx != 0) continue;
    int& cluster = i.w.cluster_of[row0 + 4 * ty + r];
    changed |= cluster != nearest[r];
    cluster = nearest[r];
  }
  if (__syncthreads_or(changed) && threadIdx.x == 0) i.w.state[0] = 1;
}

// One block: rows by cluster, stable. Each warp counts and then places a stretch of the rows.
__global__ void __launch_bounds__(32 * kSortWarps) plain_sort_kernel(const __grid_constant__ PlainArgs a) {
  __shared__ int totals[kSortWarps];
  pdl_wait();
  pdl_launch();
  const Item i(a);
  const bool changed = i.w.state[0] != 0, done = i.w.state[1] != 0;
  __syncthreads();
  if (threadIdx.x == 0) i.w.state[0] = 0, i.w.state[1] = !changed;
  if (done || !changed) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, per_warp = i.n / kSortWarps, row0 = warp * per_warp;
  int* hist = i.w.hist + int64_t{warp} * i.k;
  for (int t = threadIdx.x; t < kSortWarps * i.k; t += blockDim.x) i.w.hist[t] = 0;
  __syncthreads();
  const auto for_rows = [&](auto&& f) {
    for (int r = 0; r < per_warp; r += 32) {
      const bool valid = r + lane < per_warp;
      const int j = valid ? i.w.cluster_of[row0 + r + lane] : -1;
      const unsigned same = __match_any_sync(kWarp, j);
      const int before = valid ? hist[j] : 0;
      if (valid) f(row0 + r + lane, before + lanes_before(same));
      __syncwarp();
      if (valid && lanes_before(same) == 0) hist[j] = before + __popc(same);
      __syncwarp();
    }
  };
  for_rows([](int, int) {});
  __syncthreads();
  for (int j0 = 0, carry = 0; j0 < i.k; j0 += blockDim.x) {
    const int j = j0 + static_cast<int>(threadIdx.x);
    int total = 0;
    for (int w = 0; w < kSortWarps && j < i.k; ++w) total += i.w.hist[w * int64_t{i.k} + j];
    const int until = scan_warp(total);
    if (lane == 31) totals[warp] = until;
    __syncthreads();
    int at = carry + until - total;
    for (int w = 0; w < kSortWarps; ++w) {
      if (w < warp) at += totals[w];
      carry += totals[w];
    }
    if (j < i.k) i.w.first[j] = at;
    for (int w = 0; w < kSortWarps && j < i.k; ++w) {
      int& count = i.w.hist[w * int64_t{i.k} + j];
      const int here = count;
      count = at;
      at += here;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) i.w.first[i.k] = i.n;
  for_rows([&](int row, int place) { a.order[i.s.row(place)] = static_cast<uint16_t>(row); });
}

// Rows change places by way of the copy. Block by page.
template <class Word, bool kBack>
__global__ void __launch_bounds__(kPlainThreads) plain_permute_kernel(const __grid_constant__ PlainArgs a, bool keys, int words) {
  pdl_wait();
  pdl_launch();
  const Item i(a);
  const int page = static_cast<int>(blockIdx.x);
  Word *copy = reinterpret_cast<Word*>(i.w.copy), *tile = static_cast<Word*>(keys ? a.k : a.v) + i.s.tile(page) * kPage * words;
  for (int t = threadIdx.x; t < kPage * words; t += kPlainThreads) {
    if constexpr (kBack) tile[t] = copy[a.order[i.s.row(page * kPage + t / words)] * int64_t{words} + t % words];
    else copy[page * int64_t{kPage} * words + t] = tile[t];
  }
}

template <class T>
void cluster_plain(const CudaStream& stream, const Cluster& a, const ClusterArgs& shared) {
  const int64_t d = a.k_pages.shape[3], part = Plain::bytes(int64_t{shared.n} * kPage, shared.k_clusters, d);
  const int64_t n_item = a.pages.shape[0] * shared.h_kv, at_once = std::min(n_item, a.scratch.bytes() / part);
  PlainArgs args{shared, a.scratch.as<char>(), static_cast<int32_t>(d), 0};
  for (int64_t item = 0; item < n_item; item += at_once) {
    args.item0 = static_cast<int32_t>(item);
    const auto items = static_cast<uint32_t>(std::min(at_once, n_item - item)), pages = static_cast<uint32_t>(shared.n),
               clusters = static_cast<uint32_t>((shared.k_clusters + kPlainWarps - 1) / kPlainWarps);
    launch(stream, plain_draw_kernel, dim3(1, items), dim3(kPlainThreads), 0, args);
    launch(stream, plain_mean_kernel<T, false>, dim3(clusters, items), dim3(kPlainThreads), 0, args, true);
    for (int i = 0; i < shared.iterations; ++i) {
      launch(stream, plain_assign_kernel<T>, dim3(pages, items), dim3(kPlainThreads), 0, args);
      launch(stream, plain_sort_kernel, dim3(1, items), dim3(32 * kSortWarps), 0, args);
      launch(stream, plain_mean_kernel<T, false>, dim3(clusters, items), dim3(kPlainThreads), 0, args, true);
    }
    for (const bool keys : {true, false}) {
      launch(stream, plain_mean_kernel<T, true>, dim3(clusters, items), dim3(kPlainThreads), 0, args, keys);
      with_row_word(a.k_pages, a.v_pages, [&](auto word) {
        using Word = decltype(word);
        const auto words = static_cast<int>(d * static_cast<int64_t>(sizeof(T)) / static_cast<int64_t>(sizeof(Word)));
        launch(stream, plain_permute_kernel<Word, false>, dim3(pages, items), dim3(kPlainThreads), 0, args, keys, words);
        launch(stream, plain_permute_kernel<Word, true>, dim3(pages, items), dim3(kPlainThreads), 0, args, keys, words);
      });
    }
  }
}

}  // namespace

void cluster_any(const CudaStream& stream, const Cluster& a, const ClusterArgs& args) {
  with_dtype(a.k_pages.dtype, [&](auto zero) { cluster_plain<decltype(zero)>(stream, a, args); });
}

// Of the plain form, for as many kv heads at a time as fit in 32 MiB, at least one. The fast form needs none.
int64_t cluster_scratch_bytes(const CudaStream&, int64_t n_page, int64_t n_slot, int64_t d_head) {
  const int64_t part = Plain::bytes(n_page * kPage, n_page * n_slot, d_head);
  return std::max(part, std::min(16 * part, int64_t{32} << 20));  // more pages never need less
}

}  // namespace prt::cuda
