// Sparse decode attention: one query row per entry over chosen ranges of rows and, each as one more row, over the clusters that were left
// out, at the speed of reading both once.
//
// Work. A segment is an (entry, kv head) and up to 16 of its query heads. Its chosen rows are cut into slices of 16, its clusters into
// slices of 64, whose mean values (f8) are as many bytes. The slices of all segments stand in one line, and CTA b takes the b-th stretch
// of it; every stretch, and every warp's part of it, has rows and clusters in the proportion of their segment. All lengths are read on the
// device: a captured launch serves any choice.
//
// A warp works alone, on a ring of two slices in shared memory that cp.async fills: first clusters, whose place is known at once, and while
// they come it finds its rows (ranges, page table, rows). The products are those of attention_decode_cuda.cu:
//   S^T [rows][heads] = K Q^T    O^T [d][heads] = V^T P^T
// Scores of clusters are given; their values become f16 on the way into the second product.
//
// Most calls are over before a kernel reaches its stride, so what counts is the length of the chain from the first look-up to the last
// merge, and the number of different instructions on it: each is fetched for one use.
#include <algorithm>

#include "attention/sparse.h"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/reduce.cuh"
#include "ops/attention_merge.cuh"
#include "ops/cuda_table.h"

namespace prt::cuda {
namespace {

constexpr int kPage = static_cast<int>(kPageTokens), kRows = 16, kClusters = 64;  // of a slice
constexpr int kAtLeast = 4;  // slices of a stretch
constexpr float kLog2e = 1.44269504f;
// Weights are 2^(score - top), where `top` is set kLift below the highest score and raised when a score exceeds it by kRoom: weights stay
// below 2^15, and in f16 those 2^-31 of the largest still count.
constexpr float kLift = 7, kRoom = 15;

struct SparseArgs {
  DecodeOut to;
  const void *q, *k, *v;  // q: rows of q_stride elements
  const uint8_t* value;  // [n_page][h_kv][n_slot][d_head] f8
  const float* tail;  // [n_entry][h_q][n_tail], or null
  const int2 *ranges, *closed;
  const int32_t *page_table, *n_range, *state;  // state: or null
  int64_t q_stride, table_stride, tail_stride, warm_bytes;  // warm_bytes: of values that are fetched into L2 ahead
  int32_t n_entry, h_kv, group, n_split;  // a group is cut into n_split head blocks of at most to.rows query heads
  int32_t n_slot, n_tail, max_range;
  int32_t n_stage;  // slices in a warp's ring, 1 or 2
  float scale;  // times log2(e)
  float inv_h_kv;
};

// What select chose for a pair, an (entry, kv head); clusters: of the closed pages, the first of which is number `closed`. place: of the
// entry in ranges and tail; -1: it is left alone.
struct Choice {
  int n_row, n_cluster, closed, n_range, place;
};
// A head block of a pair, and its place [begin, end) in the line of slices.
struct Segment {
  int pair, part, begin, end;
};
struct Stretch {
  int begin, end, length;  // length: of a whole stretch
};

// x / y, rounded down and up; neither is negative, and the quotient is below 2^20 or y is 1.
__device__ __forceinline__ int divide(int x, int y) {
  const int q = static_cast<int>(__fdividef(static_cast<float>(x), static_cast<float>(y))), left = x - q * y;
  return q + (left >= y) - (left < 0);
}
__device__ __forceinline__ int divide_up(int x, int y) { return divide(x + y - 1, y); }

__device__ __forceinline__ int entry_of(const SparseArgs& a, int pair) {
  return static_cast<int>((static_cast<float>(pair) + 0.5f) * a.inv_h_kv);
}
__device__ __forceinline__ Choice choice_of(const SparseArgs& a, int pair) {
  const int entry = entry_of(a, pair), place = a.state ? a.state[entry] : entry;
  if (place < 0) return {0, 0, 0, 0, -1};
  const int64_t at = int64_t{place - entry} * a.h_kv + pair;
  const int n = a.n_range[at];
  const int2 closed = a.tail ? a.closed[entry] : int2{0, 0};
  const int rows = a.ranges[at * a.max_range + max(n - 1, 0)].y;
  return {n > 0 ? rows : 0, (closed.y - closed.x) * a.n_slot, closed.x, n, place};
}
__device__ __forceinline__ int row_slices(const Choice& n) { return (n.n_row + kRows - 1) / kRows; }
// Of both kinds; at least one, so that the output of an entry without rows is written, unless it is left alone.
__device__ __forceinline__ int slices(const Choice& n) {
  return max(row_slices(n) + (n.n_cluster + kClusters - 1) / kClusters, n.place >= 0 ? 1 : 0);
}

// Every warp for itself: the stretch of this CTA and the segment it starts in. False where there is nothing to do. Stretches are fitted to
// segments where that leaves few CTAs idle, for a change of segment inside a CTA and a merge across CTAs cost 1 to 2 us each.
__device__ __forceinline__ bool find_stretch(const SparseArgs& a, const Choice* choice, Segment& s, Stretch& stretch) {
  const int lane = threadIdx.x % 32, n_pair = a.n_entry * a.h_kv, n_cta = static_cast<int>(gridDim.x), per_lane = (n_pair + 31) / 32;
  const int first = min(lane * per_lane, n_pair), last = min(first + per_lane, n_pair);
  const auto sum_all = [](int x) { return static_cast<int>(__reduce_add_sync(~0u, static_cast<uint32_t>(x))); };
  const auto rounded = [&](int by) {  // slices of the lane's pairs, each rounded up to whole stretches
    int n = 0;
#pragma unroll 1
    for (int i = first; i < last; ++i) n += divide_up(slices(choice[i]), by);
    return n * by;
  };
  int sum = 0, longest = 0;
#pragma unroll 1
  for (int i = first; i < last; ++i) {
    const int n = slices(choice[i]);
    sum += n, longest = max(longest, n);
  }
  longest = __reduce_max_sync(~0u, longest);
  int total = sum_all(sum) * a.n_split;
  if (total == 0) return false;
  const int even = divide_up(total, n_cta), n_segment = n_pair * a.n_split;
  int length = even;
  bool own = n_segment <= n_cta;
  if (own) {
    length = divide_up(longest, divide(n_cta, n_segment));  // enough if all were of the longest
#pragma unroll 1
    for (int low = even; length - low > even / 16 + 1;) {
      const int middle = (low + length) / 2;
      (sum_all(rounded(middle)) * a.n_split <= n_cta * middle ? length : low) = middle;
    }
    own = length <= even + even / 4 || length <= kAtLeast;
    if (!own) length = even;
  } else if (longest * n_segment == total) {
    const int whole = divide_up(n_segment, n_cta) * longest;
    if (whole <= even + even / 8) length = whole;
  }
  length = max(length, min(longest, kAtLeast));
  const int round = own ? length : 1;
  if (own) sum = rounded(length);
  int until = sum;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const int x = __shfl_up_sync(~0u, until, i);
    if (lane >= i) until += x;
  }
  total = __shfl_sync(~0u, until, 31) * a.n_split;
  const int begin = static_cast<int>(blockIdx.x) * length;
  if (begin >= total) return false;

  const int owner = __ffs(__ballot_sync(~0u, until * a.n_split > begin)) - 1;
  int at = __shfl_sync(~0u, until - sum, owner) * a.n_split, n, room;
  s.pair = __shfl_sync(~0u, first, owner);
#pragma unroll 1
  for (;; ++s.pair, at += room * a.n_split) {
    n = slices(choice[s.pair]), room = divide_up(n, round) * round;
    if (at + room * a.n_split > begin) break;
  }
  s.part = a.n_split == 1 ? 0 : divide(begin - at, room);
  s.begin = at + s.part * room;
  s.end = s.begin + n;
  stretch = {begin, min(begin + length, own ? s.end : total), length};
  return true;
}

// All values into L2, while the kernel before this one runs: each warp has a few pages of one entry. Worth 0.3 to 1 us where the values
// leave room for the rest, and a loss where they do not.
__device__ __forceinline__ void warm_values(const SparseArgs& a, int64_t page_bytes) {
  const int n_warp = static_cast<int>(gridDim.x * blockDim.x) / 32, warp = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32, share = max(divide(n_warp, a.n_entry), 1), e = divide(warp, share);
  if (e >= a.n_entry) return;
  const int2 closed = a.closed[e];
  const int per_warp = divide_up(closed.y - closed.x, share), begin = closed.x + (warp - e * share) * per_warp;
  const int end = min(begin + per_warp, closed.y);
  if ((closed.y - closed.x) * page_bytes * a.n_entry > a.warm_bytes) return;
#pragma unroll 1
  for (int at = begin; at < end; ++at) {
    const uint8_t* p = a.value + a.page_table[e * a.table_stride + at] * page_bytes;
#pragma unroll 1
    for (int64_t byte = lane * 128; byte < page_bytes; byte += 32 * 128)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p + byte)));
  }
}

// Two f8 (e4m3) in the low or high half of a word as two f16.
template <int kHalf>
__device__ __forceinline__ uint32_t f8_to_f16(uint32_t x) {
  uint32_t y;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  if constexpr (kHalf == 0) asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, low;\n}" : "=r"(y) : "r"(x));
  else asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, high;\n}" : "=r"(y) : "r"(x));
#else  // the bits as f16 say 2^-8 of the value
  const uint32_t bytes = __byte_perm(x, 0, kHalf == 0 ? 0x1404 : 0x3424), bits = (bytes & 0x80008000u) | (bytes & 0x7f007f00u) >> 1;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(bits), "r"(0x5c005c00u));
#endif
  return y;
}
__device__ __forceinline__ float f8_to_float(uint8_t x) { return __half2float(__ushort_as_half(static_cast<uint16_t>(f8_to_f16<0>(x)))); }

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// A slice in shared memory is K and V of 16 rows, or the values of 64 clusters and behind them the scores of each head. 16-byte units
// change places within a row so that the 8 rows of a matrix lie in different banks.
constexpr int kScoreBytes = 4 * kClusters + 32;
__host__ __device__ constexpr int slice_bytes(int rows, int d) { return 64 * d + rows * kScoreBytes; }
// kUnits: of a row. The row is row + more, where `more` is known to the compiler and shares no bit with `row`.
template <int kUnits>
__device__ __forceinline__ int unit_at(int row, int unit, int more = 0) {
  constexpr int kShift = kUnits >= 8 ? 0 : 1, kMask = kUnits >= 8 ? 7 : 3;
  return (row + more) * kUnits + ((unit ^ (row >> kShift & kMask)) ^ (more >> kShift & kMask));
}

// Finds and fetches the rows of a pair, slice after slice.
template <int D>
struct Rows {
  const SparseArgs& a;
  const int2* ranges;  // first row; rows of this and all ranges before
  const int32_t* pages;
  int kv_head, n_row, n_range;
  int row = 0, page = 0;  // of row 16 n + lane % 16 of the choice, n the slice looked up last
  int window_at = 0;  // `window` has a range for each lane, from here on; the first ends before the slice looked up next
  int2 window{0, 0};

  __device__ __forceinline__ void read_window() {
    const int i = window_at + static_cast<int>(threadIdx.x % 32);
    window = i < 0 ? int2{0, 0} : i < n_range ? ranges[i] : int2{0, 0x7fffffff};
  }
  // Goes to a slice: the search narrows the ranges that may hold its first row by 32 a step.
  __device__ __forceinline__ void seek(int slice) {
    int low = 0, span = n_range;
#pragma unroll 1
    while (span > 15) {
      const int step = (span + 31) / 32, at = (static_cast<int>(threadIdx.x % 32) + 1) * step - 1;
      const bool before = at < span && ranges[low + at].y <= kRows * slice;
      const int passed = __popc(__ballot_sync(~0u, before)) * step;
      low += passed;
      span = min(step, span - passed);
    }
    window_at = low - 1;
    read_window();
  }
  __device__ __forceinline__ void look_up(int slice) {
    const int x = min(kRows * slice + static_cast<int>(threadIdx.x % kRows), n_row - 1);
    int i = 0;  // the last range that ends before x
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
      if (__shfl_sync(~0u, window.y, (i + step) % 32) <= x) i += step;
    row = __shfl_sync(~0u, window.x, (i + 1) % 32) + x - __shfl_sync(~0u, window.y, i);
    page = pages[row / kPage];
    window_at += __popc(__ballot_sync(~0u, window.y <= kRows * slice + kRows)) - 1;
    read_window();
  }
  __device__ __forceinline__ void fetch(uint32_t to) const {
    constexpr int kUnits = D / 8, kAtOnce = 32 / kUnits;
    const int lane = threadIdx.x % 32, at = (page * a.h_kv + kv_head) * kPage + row % kPage;
    const char *k = static_cast<const char*>(a.k) + lane % kUnits * 16, *v = static_cast<const char*>(a.v) + lane % kUnits * 16;
#pragma unroll
    for (int r = 0; r < kRows; r += kAtOnce) {
      const int64_t from = static_cast<int64_t>(__shfl_sync(~0u, at, r + lane / kUnits)) * (2 * D);
      const uint32_t place = to + unit_at<kUnits>(lane / kUnits, lane % kUnits, r) * 16;
      cp_async_16(place, k + from);
      cp_async_16(place + 32 * D, v + from);
    }
  }
};

// The same for clusters.
template <int D>
struct Clusters {
  const SparseArgs& a;
  const float* tail;  // of the segment's first head
  const int32_t* pages;  // closed ones
  int kv_head, heads, n_cluster;
  int page[2], slot[2];  // of clusters `lane` and 32 + `lane` of the slice looked up last

  __device__ __forceinline__ void look_up(int slice) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int j = min(slice * kClusters + 32 * i + static_cast<int>(threadIdx.x % 32), n_cluster - 1), from = divide(j, a.n_slot);
      page[i] = pages[from];
      slot[i] = j - from * a.n_slot;
    }
  }
  __device__ __forceinline__ void fetch(int slice, uint32_t to) const {
    constexpr int kUnits = D / 16, kAtOnce = 32 / kUnits;
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int i = lane; i < heads * (kClusters / 4); i += 32) {
      const int head = i / (kClusters / 4), j = i % (kClusters / 4) * 4;
      if (slice * kClusters + j < n_cluster)
        cp_async_16(to + 64 * D + head * kScoreBytes + 4 * j, tail + static_cast<int64_t>(head) * a.n_tail + slice * kClusters + j);
    }
    const uint8_t* value = a.value + lane % kUnits * 16;
    const int at[2] = {(page[0] * a.h_kv + kv_head) * a.n_slot + slot[0], (page[1] * a.h_kv + kv_head) * a.n_slot + slot[1]};
#pragma unroll
    for (int r = 0; r < kClusters; r += kAtOnce)
      cp_async_16(to + unit_at<kUnits>(lane / kUnits, lane % kUnits, r) * 16,
                  value + static_cast<int64_t>(__shfl_sync(~0u, at[r / 32], r % 32 + lane / kUnits)) * D);
  }
};

// What a warp has summed up for the heads of its segment. Lane 4 g + c; o: tiles of 16 dimensions as the second product leaves them.
template <class T, int D, int NB>
struct Sums {
  uint32_t q[NB][D / 8];  // the B operand of the first product
  float o[NB][D / 16][4] = {};
  float top[NB][2], total[NB][2];  // of heads 8 b + 2 c and the next; total: of this thread's rows only
  float tail_top[NB], tail_total[NB];  // among clusters: of head 8 b + g

  __device__ __forceinline__ Sums() {
#pragma unroll
    for (int b = 0; b < NB; ++b) top[b][0] = top[b][1] = tail_top[b] = kNegInf, total[b][0] = total[b][1] = tail_total[b] = 0;
  }
  // Columns past the last head repeat it.
  __device__ __forceinline__ void load_q(const T* from, int heads) {
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int b = 0; b < NB; ++b)
#pragma unroll
      for (int w = 0; w < D / 8; ++w) q[b][w] = *reinterpret_cast<const uint32_t*>(from + min(8 * b + g, heads - 1) * D + 8 * w + 2 * c);
  }

  // The first `left` clusters of a slice.
  __device__ __forceinline__ void add_clusters(uint8_t* slice, int left, int heads) {
    constexpr int kUnits = D / 16;
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    if (left < kClusters) {  // the scores behind them were not written
#pragma unroll 1
      for (int j = left + lane; j < kClusters; j += 32)
#pragma unroll 1
        for (int head = 0; head < heads; ++head) reinterpret_cast<float*>(slice + 64 * D + head * kScoreBytes)[j] = kNegInf;
      __syncwarp();
    }
    const auto score = [&](int b, int j) {  // of clusters j and j + 1
      return *reinterpret_cast<const float2*>(slice + 64 * D + min(8 * b + g, heads - 1) * kScoreBytes + 4 * j);
    };
    bool rises = false;
    float highest[NB];
#pragma unroll
    for (int b = 0; b < NB; ++b) {
      highest[b] = kNegInf;
#pragma unroll
      for (int j = 0; j < kClusters; j += 8) highest[b] = fmaxf(highest[b], fmaxf(score(b, j + 2 * c).x, score(b, j + 2 * c).y));
      highest[b] *= kLog2e;
      rises |= highest[b] > tail_top[b] + kRoom;
    }
    if (__any_sync(~0u, rises)) {
#pragma unroll
      for (int b = 0; b < NB; ++b) {
        const float x = fmaxf(highest[b], __shfl_xor_sync(~0u, highest[b], 1));
        const float most = fmaxf(fmaxf(x, __shfl_xor_sync(~0u, x, 2)) - kLift, tail_top[b]);
        const float f = pow2(tail_top[b] - (most == kNegInf ? 0 : most));
        tail_top[b] = most;
        tail_total[b] *= f;
        const float f0 = __shfl_sync(~0u, f, 8 * c), f1 = __shfl_sync(~0u, f, 8 * c + 4);
#pragma unroll
        for (int t = 0; t < D / 16; ++t) o[b][t][0] *= f0, o[b][t][1] *= f1, o[b][t][2] *= f0, o[b][t][3] *= f1;
      }
    }
#pragma unroll 2
    for (int s = 0; s < kClusters; s += 16) {
      uint32_t p[NB][2], counts[4] = {};
      bool dead = false;  // a cluster that counts for nobody: its value may be anything
#pragma unroll
      for (int b = 0; b < NB; ++b) {
        const float base = tail_top[b] == kNegInf ? 0 : tail_top[b];
        const float2 low = score(b, s + 2 * c), high = score(b, s + 2 * c + 8);
        float x[4] = {low.x, low.y, high.x, high.y};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          counts[k] |= x[k] > kNegInf;
          dead |= x[k] == kNegInf;
          x[k] = pow2(x[k] * kLog2e - base);
          tail_total[b] += x[k];
        }
        p[b][0] = pack2<f16>(x[0], x[1]);
        p[b][1] = pack2<f16>(x[2], x[3]);
      }
      uint32_t keep[2] = {~0u, ~0u};
      if (__any_sync(~0u, dead)) {
#pragma unroll
        for (int k = 0; k < 4; ++k) counts[k] = __ballot_sync(~0u, counts[k]);
        if ((counts[0] | counts[1] | counts[2] | counts[3]) == 0) continue;
#pragma unroll
        for (int k = 0; k < 4; ++k) counts[k] &= 0x11111111u << c;
        keep[0] = (counts[0] ? 0xffffu : 0) | (counts[1] ? 0xffff0000u : 0);
        keep[1] = (counts[2] ? 0xffffu : 0) | (counts[3] ? 0xffff0000u : 0);
      }
      // Two f8 are one element of a matrix: rows g and g + 8 of tile t become dimensions 16 t + 2 g and the next.
#pragma unroll
      for (int t = 0; t < D / 16; t += 2) {
        uint32_t x[4];
        ldmatrix_x4_trans(x, smem_addr(slice) + unit_at<kUnits>(lane % 16, t + lane / 16, s) * 16);
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          const uint32_t low = __byte_perm(x[2 * u] & keep[0], 0, 0x3120), high = __byte_perm(x[2 * u + 1] & keep[1], 0, 0x3120);
          const uint32_t values[4] = {f8_to_f16<0>(low), f8_to_f16<1>(low), f8_to_f16<0>(high), f8_to_f16<1>(high)};
#pragma unroll
          for (int b = 0; b < NB; ++b) mma_16816<f16>(o[b][t + u], values, p[b][0], p[b][1]);
        }
      }
    }
  }

  // After the last cluster: top, total and o as rows have them.
  __device__ __forceinline__ void close_clusters() {
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    const int low = g / 2 * 4 + c, high = 16 + low;  // lanes with dimensions g and 8 + g of a tile
#pragma unroll
    for (int b = 0; b < NB; ++b) {
      tail_total[b] += __shfl_xor_sync(~0u, tail_total[b], 1);
      tail_total[b] += __shfl_xor_sync(~0u, tail_total[b], 2);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        top[b][k] = __shfl_sync(~0u, tail_top[b], 8 * c + 4 * k);
        const float x = __shfl_sync(~0u, tail_total[b], 8 * c + 4 * k);
        total[b][k] = g == 0 ? x : 0;
#pragma unroll
        for (int t = 0; t < D / 16; ++t) {
          const float x0 = __shfl_sync(~0u, o[b][t][k], low), x1 = __shfl_sync(~0u, o[b][t][k + 2], low);
          const float y0 = __shfl_sync(~0u, o[b][t][k], high), y1 = __shfl_sync(~0u, o[b][t][k + 2], high);
          o[b][t][k] = g % 2 == 0 ? x0 : x1;
          o[b][t][k + 2] = g % 2 == 0 ? y0 : y1;
        }
      }
    }
  }

  // The first `left` rows of a slice; the others are the last one again.
  __device__ __forceinline__ void add_rows(uint32_t slice, int left, float scale) {
    constexpr int kUnits = D / 8;
    const int lane = threadIdx.x % 32, g = lane / 4;
    float s[NB][4] = {}, odd[NB][4] = {};  // two chains of products
#pragma unroll
    for (int t = 0; t < D / 16; ++t) {
      uint32_t keys[4];
      ldmatrix_x4(keys, slice + unit_at<kUnits>(lane % 16, 2 * t + lane / 16) * 16);
#pragma unroll
      for (int b = 0; b < NB; ++b) mma_16816<T>(t % 2 == 0 ? s[b] : odd[b], keys, q[b][2 * t], q[b][2 * t + 1]);
    }
    bool rises = false;
    float highest[NB][2];
#pragma unroll
    for (int b = 0; b < NB; ++b) {
#pragma unroll
      for (int k = 0; k < 4; ++k) s[b][k] = (s[b][k] + odd[b][k]) * scale;
      if (left < kRows)
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (g + k / 2 * 8 >= left) s[b][k] = kNegInf;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        highest[b][k] = fmaxf(s[b][k], s[b][k + 2]);
        rises |= highest[b][k] > top[b][k] + kRoom;
      }
    }
    if (__any_sync(~0u, rises)) {
#pragma unroll
      for (int b = 0; b < NB; ++b)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float x = highest[b][k];
#pragma unroll
          for (int step = 4; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
          x = fmaxf(x - kLift, top[b][k]);
          const float f = pow2(top[b][k] - (x == kNegInf ? 0 : x));
          top[b][k] = x;
          total[b][k] *= f;
#pragma unroll
          for (int t = 0; t < D / 16; ++t) o[b][t][k] *= f, o[b][t][k + 2] *= f;
        }
    }
    uint32_t p[NB][2];
#pragma unroll
    for (int b = 0; b < NB; ++b) {
      const float base[2] = {top[b][0] == kNegInf ? 0 : top[b][0], top[b][1] == kNegInf ? 0 : top[b][1]};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        s[b][k] = pow2(s[b][k] - base[k % 2]);
        total[b][k % 2] += s[b][k];
      }
      p[b][0] = transpose_8x8(pack2<T>(s[b][0], s[b][1]));
      p[b][1] = transpose_8x8(pack2<T>(s[b][2], s[b][3]));
    }
#pragma unroll
    for (int t = 0; t < D / 16; ++t) {
      uint32_t values[4];
      ldmatrix_x4_trans(values, slice + 32 * D + unit_at<kUnits>(lane % 8 + lane / 16 * 8, 2 * t + lane / 8 % 2) * 16);
#pragma unroll
      for (int b = 0; b < NB; ++b) mma_16816<T>(o[b][t], values, p[b][0], p[b][1]);
    }
  }

  // Leaves the warp's part in shared memory, as merge() wants it.
  __device__ __forceinline__ void store(float* values, int rows, int heads) {
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    float2* sums = reinterpret_cast<float2*>(values + rows * kPad<D> * 4);
#pragma unroll
    for (int b = 0; b < NB; ++b)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) total[b][k] += __shfl_xor_sync(~0u, total[b][k], step);
        const int head = 8 * b + 2 * c + k;
        if (head >= heads) continue;
        if (g == 0) sums[head] = {top[b][k], total[b][k]};
#pragma unroll
        for (int t = 0; t < D / 16; ++t) {
          values[head * kPad<D> * 4 + 16 * t + g] = o[b][t][k];
          values[head * kPad<D> * 4 + 16 * t + 8 + g] = o[b][t][k + 2];
        }
      }
  }
};

template <class T, int D, int NB, int W>
__global__ void __launch_bounds__(32 * W, 1) sparse_attention_kernel(const __grid_constant__ SparseArgs a) {
  extern __shared__ __align__(128) uint8_t memory[];  // [W][n_stage] slices, then the choices of all pairs
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int stage_bytes = slice_bytes(a.to.rows, D), warp_bytes = a.n_stage * stage_bytes;
  uint8_t* ring = memory + warp * warp_bytes;
  Choice* choice = reinterpret_cast<Choice*>(memory + W * warp_bytes);
  if (a.tail) warm_values(a, static_cast<int64_t>(a.h_kv) * a.n_slot * D);
  pdl_wait();
#pragma unroll 1
  for (int i = threadIdx.x; i < a.n_entry * a.h_kv; i += 32 * W) choice[i] = choice_of(a, i);
  __syncthreads();
  Segment here;
  Stretch stretch;
  if (!find_stretch(a, choice, here, stretch)) return;
  pdl_launch();

#pragma unroll 1
  for (;;) {
    const Choice n = choice[here.pair];
    const int entry = entry_of(a, here.pair), kv_head = here.pair - entry * a.h_kv, head0 = kv_head * a.group + here.part * a.to.rows;
    const int heads = min(a.to.rows, a.group - here.part * a.to.rows);

    // This warp's slices. Of the first x of a segment, x n_row / length (rounded down) are rows.
    const int length = here.end - here.begin, n_row = row_slices(n), begin = max(here.begin, stretch.begin);
    const int n_here = min(here.end, stretch.end) - begin, from = begin - here.begin + n_here * warp / W;
    const int to = begin - here.begin + n_here * (warp + 1) / W, x = lane == 0 ? from : to;
    const int before = length < 1 << 16 ? static_cast<int>(static_cast<uint32_t>(x) * static_cast<uint32_t>(n_row) / length)
                                        : static_cast<int>(static_cast<int64_t>(x) * n_row / length);
    const int row0 = __shfl_sync(~0u, before, 0), n_rows = __shfl_sync(~0u, before, 1) - row0;
    const int cluster0 = from - row0, n_clusters = n.n_cluster > 0 ? to - from - n_rows : 0;

    const int32_t* pages = a.page_table + entry * a.table_stride;
    Rows<D> rows{a, a.ranges + (int64_t{n.place} * a.h_kv + kv_head) * a.max_range, pages, kv_head, n.n_row, n.n_range};
    Clusters<D> clusters{
        a, a.tail + n.place * a.tail_stride + static_cast<int64_t>(head0) * a.n_tail, pages + n.closed, kv_head, heads, n.n_cluster, {},
        {}};
    // Two chains of look-ups side by side: page, values; range, window, page, rows.
    if (n_clusters > 0) clusters.look_up(cluster0);
    if (n_rows > 0) rows.seek(row0);
    Sums<T, D, NB> sums;
    sums.load_q(static_cast<const T*>(a.q) + entry * a.q_stride + head0 * D, heads);

    // Slice i is used, slice i + n_stage - 1 fetched, and the one after that looked up.
#pragma unroll 1
    for (int i = -a.n_stage, fill = 0, use = 0, looked = -1; i < n_clusters + n_rows; ++i) {  // fill, use: bytes; looked: of the rows
      __syncwarp();  // everybody has read the slice whose place is filled now
      const int ahead = i + a.n_stage - 1, row = max(ahead + 1 - n_clusters, 0);
      if (ahead >= 0 && ahead < n_clusters + n_rows) {
        if (ahead < n_clusters) {
          clusters.fetch(cluster0 + ahead, smem_addr(ring + fill));
          if (ahead + 1 < n_clusters) clusters.look_up(cluster0 + ahead + 1);
        } else rows.fetch(smem_addr(ring + fill));
        fill = fill + stage_bytes < warp_bytes ? fill + stage_bytes : 0;
      }
      if (row > looked && row < n_rows && (ahead >= 0 || n_clusters == 0)) rows.look_up(row0 + row), looked = row;
      cp_async_commit();
      if (i < 0) continue;
      if (a.n_stage > 1) cp_async_wait<1>();
      else cp_async_wait<0>();
      __syncwarp();
      if (i < n_clusters) sums.add_clusters(ring + use, n.n_cluster - (cluster0 + i) * kClusters, heads);
      else sums.add_rows(smem_addr(ring + use), n.n_row - (row0 + i - n_clusters) * kRows, a.scale);
      if (i + 1 == n_clusters) sums.close_clusters();
      use = use + stage_bytes < warp_bytes ? use + stage_bytes : 0;
    }
    cp_async_wait<0>();
    __syncwarp();
    sums.store(reinterpret_cast<float*>(ring), a.to.rows, heads);
    __syncthreads();
    merge<T, D, W, 16>(a.to, {entry, head0, heads, divide(here.begin, stretch.length), divide(here.end - 1, stretch.length)}, memory,
                       warp_bytes);
    __syncthreads();
    if (here.end >= stretch.end) break;
    here.begin = here.end;
    do {
      if (++here.part == a.n_split) here.part = 0, ++here.pair;
      here.end += slices(choice[here.pair]);
    } while (here.end == here.begin);
  }
}

// Every dtype, d_head and group, written to read like the formula: a block per (entry, query head), rows and then clusters 128 at a time.
constexpr int kThreads = 128;
template <class T>
__global__ void __launch_bounds__(kThreads) sparse_attention_any_kernel(const __grid_constant__ SparseArgs a, int d) {
  __shared__ float query[kMaxHead], weight[kThreads], shared[32];
  __shared__ int64_t from[kThreads];  // row of v_pages, or of value
  pdl_wait();
  pdl_launch();
  const int entry = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y), kv_head = head / a.group;
  const int thread = static_cast<int>(threadIdx.x), pair = entry * a.h_kv + kv_head;
  const Choice n = choice_of(a, pair);
  if (n.place < 0) return;
  const int2* ranges = a.ranges + (int64_t{n.place} * a.h_kv + kv_head) * a.max_range;
  const int32_t* pages = a.page_table + entry * a.table_stride;
  for (int i = thread; i < d; i += kThreads) query[i] = to_float(static_cast<const T*>(a.q)[entry * a.q_stride + head * d + i]) * a.scale;

  float top = kNegInf, total = 0, sum[2] = {0, 0};
  for (int x0 = 0; x0 < n.n_row + n.n_cluster; x0 += kThreads) {
    const int x = x0 + thread, cluster = x - n.n_row;
    __syncthreads();  // query is there, and the previous weights have been read
    float score = kNegInf;
    if (cluster < 0) {
      int low = 0;  // the first range that ends after x
      for (int high = n.n_range - 1; low < high;) {
        const int middle = (low + high) / 2;
        if (ranges[middle].y <= x) low = middle + 1;
        else high = middle;
      }
      const int row = ranges[low].x + x - (low > 0 ? ranges[low - 1].y : 0);
      from[thread] = (static_cast<int64_t>(pages[row / kPage]) * a.h_kv + kv_head) * kPage + row % kPage;
      const T* key = static_cast<const T*>(a.k) + from[thread] * d;
      score = 0;
      for (int i = 0; i < d; ++i) score = fmaf(query[i], to_float(key[i]), score);
    } else if (cluster < n.n_cluster) {
      from[thread] = (static_cast<int64_t>(pages[n.closed + cluster / a.n_slot]) * a.h_kv + kv_head) * a.n_slot + cluster % a.n_slot;
      score = a.tail[n.place * a.tail_stride + static_cast<int64_t>(head) * a.n_tail + cluster] * kLog2e;
    }
    const float most = fmaxf(top, block_max(score, shared));
    __syncthreads();
    const float base = most == kNegInf ? 0 : most, rescale = pow2(top - base);
    weight[thread] = pow2(score - base);
    total = total * rescale + block_sum(weight[thread], shared);
    top = most;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int i = thread + c * kThreads;
      sum[c] *= rescale;
      if (i >= d) continue;
      for (int j = 0; j < min(kThreads, n.n_row + n.n_cluster - x0); ++j) {
        if (weight[j] == 0) continue;  // what counts for nothing may be anything
        const int64_t at = from[j] * d + i;
        sum[c] = fmaf(weight[j], x0 + j < n.n_row ? to_float(static_cast<const T*>(a.v)[at]) : f8_to_float(a.value[at]), sum[c]);
      }
    }
  }
  for (int c = 0; c < 2; ++c)
    if (const int i = thread + c * kThreads; i < d)
      static_cast<T*>(a.to.out)[entry * a.to.out_stride + head * d + i] = from_float<T>(total > 0 ? __fdividef(sum[c], total) : 0);
}

// Query heads of a head block: a group of up to 16 stays together.
int64_t block_rows(int64_t group) {
  const int64_t blocks = (group + 15) / 16;
  return (group + blocks - 1) / blocks;
}

SparseArgs sparse_args(const CudaStream& stream, const SparseAttention& a) {
  const int64_t d = a.k_pages.shape[3], h_kv = a.k_pages.shape[1], group = a.q.shape[1] / d / h_kv, rows = block_rows(group);
  SparseArgs args{};
  args.to = {a.out.data, a.scratch.as<float>(), stream.counters, a.out.row_stride, static_cast<int32_t>(rows)};
  args.q = a.q.data, args.k = a.k_pages.data, args.v = a.v_pages.data;
  args.page_table = a.page_table.as<int32_t>(), args.ranges = a.ranges.as<int2>(), args.n_range = a.n_range.as<int32_t>();
  args.state = a.state.as<int32_t>();
  args.q_stride = a.q.row_stride, args.table_stride = a.page_table.row_stride;
  args.n_entry = static_cast<int32_t>(a.q.shape[0]), args.h_kv = static_cast<int32_t>(h_kv), args.group = static_cast<int32_t>(group);
  args.n_split = static_cast<int32_t>((group + rows - 1) / rows), args.max_range = static_cast<int32_t>(a.ranges.shape[2]);
  args.scale = a.scale * kLog2e, args.inv_h_kv = 1.0f / static_cast<float>(h_kv), args.n_slot = 1;
  if (a.tail) {
    args.value = a.value.as<uint8_t>(), args.tail = a.tail.as<float>(), args.closed = a.closed.as<int2>();
    args.tail_stride = a.tail.row_stride, args.n_tail = static_cast<int32_t>(a.tail.shape[2]);
    args.n_slot = static_cast<int32_t>(a.value.shape[2]), args.warm_bytes = stream.l2_bytes / 2;
  }
  return args;
}

// False: there is no room for a slice a warp, or for the choices of so many pairs. With a ring of three slices nothing is faster; 12 warps
// win 0 to 4 % where there is much to read, lose 1 to 4 % where there is little, and leave no room for the next kernel.
template <class T, int D, int NB>
bool run(const CudaStream& stream, SparseArgs a) {
  constexpr int W = 8;
  const int64_t choices = static_cast<int64_t>(sizeof(Choice)) * a.n_entry * a.h_kv, stage = W * slice_bytes(a.to.rows, D);
  a.n_stage = static_cast<int32_t>(std::min<int64_t>((stream.smem_per_block - 1024 - choices) / stage, 2));
  if (a.n_stage < 1) return false;
  prefer_l1(sparse_attention_kernel<T, D, NB, W>);
  launch(stream, sparse_attention_kernel<T, D, NB, W>, dim3(static_cast<uint32_t>(stream.n_sm)), dim3(32 * W), a.n_stage * stage + choices,
         a);
  return true;
}
template <class T>
bool run(const CudaStream& stream, const SparseArgs& a, int64_t d) {
  if (d == 64) return a.to.rows > 8 ? run<T, 64, 2>(stream, a) : run<T, 64, 1>(stream, a);
  return a.to.rows > 8 ? run<T, 128, 2>(stream, a) : run<T, 128, 1>(stream, a);
}

bool is_fast(const SparseAttention& a) {
  const int64_t d = a.k_pages.shape[3];
  const auto aligned = [](const Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.row_stride * dtype_size(t.dtype) % 16 == 0;
  };
  return a.k_pages.dtype != DType::f32 && (d == 64 || d == 128) && aligned(a.q) && aligned(a.out) && aligned(a.k_pages) &&
         aligned(a.v_pages) && (!a.tail || (aligned(a.tail) && a.tail.shape[2] % 4 == 0 && aligned(a.value)));
}

}  // namespace

int64_t sparse_attention_scratch_bytes(const CudaStream& stream, int64_t n_entry, int64_t, int64_t h_q, int64_t h_kv, int64_t d_head) {
  return n_entry == 0 ? 0 : 2 * stream.n_sm * block_rows(h_q / h_kv) * (d_head + 2) * 4;
}

void sparse_attention(const CudaStream& stream, const SparseAttention& a) {
  const SparseArgs args = sparse_args(stream, a);
  const int64_t d = a.k_pages.shape[3], h_q = a.q.shape[1] / d;
  if (args.n_entry == 0) return;
  if (is_fast(a) && (a.k_pages.dtype == DType::bf16 ? run<bf16>(stream, args, d) : run<f16>(stream, args, d))) return;
  with_dtype(a.k_pages.dtype, [&](auto zero) {
    launch(stream, sparse_attention_any_kernel<decltype(zero)>, dim3(static_cast<uint32_t>(args.n_entry), static_cast<uint32_t>(h_q)),
           kThreads, 0, args, static_cast<int>(d));
  });
}

}  // namespace prt::cuda
