// The rows that are worth most. Votes and pools by the whole GPU; then a cluster of blocks per (entry, kv head) cuts, marks and writes
// ranges.
//
// The cut is that of the CPU twin: three histograms, of 11, 11 and 10 bits of the worth, each of what the one before left open. A block
// counts its part of the units in shared memory, and reads the bins of the others. Counts are integers, and so are shares, in units of
// 2^-48: their sums do not depend on the order in which they are added. Marks are bits, one word for the 32 units that a warp looks at.
//
// Floor: the scores of all heads once; at 1 x 128K and 32 heads 17 MB, 4 us, which the L2 has where attention or score_rows just wrote
// them. The worths are then read five times, from the L2.
#include <algorithm>

#include "attention/choice.h"
#include "cuda/hopper.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "ops/attention_merge.cuh"
#include "ops/cuda_table.h"

namespace prt::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32, kBins = 2048, kEach = kBins / kThreads, kVoteThreads = 256;
constexpr int kAll = 0x7fffffff;

using Wide = unsigned long long;

struct TopArgs {
  int2* ranges;
  int32_t *n_range, *made;
  Wide* counters;
  const float *scores, *log_total;
  const int32_t *kv_len, *state;
  float* scratch;     // [n_entry][h_kv][2][room]
  uint32_t* arrived;  // [n_entry]: kv heads that are done
  int64_t room, k, max_range;
  int32_t h_q, h_kv, group, unit, sinks, window, half;  // half: of the pool
  float fraction, p;
  Vote vote;

  __device__ int place(int entry) const { return state ? state[entry] : entry; }
  __device__ const float* scores_of(int entry, int head) const { return scores + (int64_t{entry} * h_q + head) * room; }
  __device__ float total_of(int entry, int head) const { return log_total[int64_t{entry} * h_q + head]; }
  __device__ float* half_of(int entry, int kv_head, int which) const {
    return scratch + ((int64_t{entry} * h_kv + kv_head) * 2 + which) * room;
  }
  __device__ int voter(int kv_head) const { return vote == Vote::layer ? 0 : kv_head; }  // whose votes a kv head goes by
  // What a unit is worth before and after the pool, and where marks go.
  __device__ const float* votes(int entry, int kv_head) const {
    return vote == Vote::first ? scores_of(entry, kv_head * group) : half_of(entry, voter(kv_head), 0);
  }
  __device__ const float* worth(int entry, int kv_head) const {
    return half > 0 ? half_of(entry, voter(kv_head), 1) : votes(entry, kv_head);
  }
  __device__ uint32_t* marks(int entry, int kv_head) const {
    return reinterpret_cast<uint32_t*>(half_of(entry, kv_head, half > 0 ? 0 : 1));
  }
};

// Rows [begin, end) and units [first, n) can be chosen.
struct Bounds {
  int len, begin, end, first, n;
  __device__ Bounds(const TopArgs& a, int entry) {
    len = a.kv_len[entry];
    end = static_cast<int>(window_begin(len, a.sinks, a.window, a.unit));
    begin = min(a.sinks, end);
    first = begin / a.unit;
    n = begin < end && a.scores ? (end + a.unit - 1) / a.unit : first;
  }
  __device__ int row(const TopArgs& a, int unit) const { return min(max(unit * a.unit, begin), end); }  // first one
};

// A thread has a unit, for a kv head or for the layer.
__global__ void __launch_bounds__(kVoteThreads) vote_kernel(const __grid_constant__ TopArgs a) {
  const int i = static_cast<int>(blockIdx.x * kVoteThreads + threadIdx.x), kv_head = static_cast<int>(blockIdx.y);
  const int entry = static_cast<int>(blockIdx.z);
  pdl_wait();
  pdl_launch();
  if (a.place(entry) < 0 || i >= Bounds(a, entry).n) return;
  const int from = a.vote == Vote::layer ? 0 : kv_head * a.group, to = a.vote == Vote::layer ? a.h_q : from + a.group;
  float worth = a.vote == Vote::max ? -INFINITY : 0;
#pragma unroll 4
  for (int h = from; h < to; ++h) {
    const float share = a.scores_of(entry, h)[i] - a.total_of(entry, h);
    worth = a.vote == Vote::max ? fmaxf(worth, share) : worth + expf(share);
  }
  a.half_of(entry, kv_head, 0)[i] = worth;
}

__global__ void __launch_bounds__(kVoteThreads) pool_kernel(const __grid_constant__ TopArgs a) {
  const int i = static_cast<int>(blockIdx.x * kVoteThreads + threadIdx.x), kv_head = static_cast<int>(blockIdx.y);
  const int entry = static_cast<int>(blockIdx.z);
  pdl_wait();
  pdl_launch();
  if (a.place(entry) < 0) return;
  const Bounds x(a, entry);
  if (i < x.first || i >= x.n) return;
  const float* votes = a.votes(entry, kv_head);
  float best = votes[i];
  for (int j = max(0, i - a.half); j < min(x.n, i + a.half + 1); ++j) best = votes[j] > best ? votes[j] : best;
  a.half_of(entry, kv_head, 1)[i] = best;
}

// Floats in the order of these integers; NaN is above all.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t u = __float_as_uint(x);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
__device__ __forceinline__ float float_of(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

__device__ __forceinline__ Wide parts_of(float share) { return __float2ull_rz(fminf(share, 2) * 0x1p48f); }

// -> the sum over the threads before this one, and over all
template <class W>
__device__ __forceinline__ W block_scan(W x, W* room, W& total) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  W sum = x, before = 0;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const W other = __shfl_up_sync(kWarp, sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();  // the room is free
  if (lane == 31) room[warp] = sum;
  __syncthreads();
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp ? room[w] : 0;
    total += room[w];
  }
  return before + sum - x;
}

// What is above `key` is taken, and of what equals it those whose number is below `ties`; the first of this block's is number `before`.
struct Cut {
  uint32_t key;
  int ties, before;
  bool numbered;  // some are left
};

template <bool kShare>
struct Chooser {
  using Weight = std::conditional_t<kShare, Wide, uint32_t>;
  struct Shared {
    Weight histogram[kBins];
    Weight scan[kWarps], above, here, before;
    Wide wide[32];
    uint32_t bin;
    int equal[kWarps];
  };
  const TopArgs& a;
  Shared& s;
  const int rank = blockIdx.x, n_block = gridDim.x, kv_head = blockIdx.y, entry = blockIdx.z, tid = threadIdx.x, warp = tid / 32,
            lane = tid % 32;
  const Bounds x;
  uint32_t* marks;
  int low, high;              // words of the marks
  int first_word, last_word;  // of this warp

  __device__ Chooser(const TopArgs& args, Shared& shared) : a(args), s(shared), x(args, static_cast<int>(blockIdx.z)) {
    marks = a.marks(entry, kv_head);
    low = x.first / 32, high = x.n > x.first ? (x.n + 31) / 32 : low;
    const int of_block = (high - low + n_block - 1) / n_block, of_warp = (of_block + kWarps - 1) / kWarps;
    const int block_end = min(low + (rank + 1) * of_block, high);
    first_word = min(low + rank * of_block + warp * of_warp, block_end);
    last_word = min(first_word + of_warp, block_end);
  }

  // f(word, whether the lane's unit is one, its worth) for every word of this warp
  template <class F>
  __device__ __forceinline__ void for_words(const float* worth, F&& f) const {
    constexpr int kDeep = 4;
#pragma unroll 1
    for (int w = first_word; w < last_word; w += kDeep) {
      float some[kDeep];
      bool there[kDeep];
#pragma unroll
      for (int k = 0; k < kDeep; ++k) {
        const int i = 32 * (w + k) + lane;
        there[k] = w + k < last_word && i >= x.first && i < x.n;
        some[k] = there[k] ? worth[i] : 0;
      }
#pragma unroll
      for (int k = 0; k < kDeep; ++k)
        if (w + k < last_word) f(w + k, there[k], some[k]);
    }
  }

  // The shortest prefix in descending order whose weights reach `left`, above 0; everything, if they do not. total: of the head.
  __device__ Cut find_cut(const float* worth, Weight left, float total) const {
    const auto weight = [&](float score) -> Weight {
      if constexpr (kShare) return parts_of(expf(score - total));
      else return 1;
    };
    Cut cut{0, 0, 0, false};
    uint32_t mask = 0;
#pragma unroll 1
    for (int pass = 0; pass < 3; ++pass) {
      const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, n_bin = pass == 2 ? kBins / 2 : kBins;
      for (int b = tid; b < kBins; b += kThreads) s.histogram[b] = 0;
      if (tid == 0) s.bin = 0, s.above = s.here = s.before = 0;
      __syncthreads();
      for_words(worth, [&](int, bool there, float score) {
        const uint32_t key = key_of(score);
        if (there && (key & mask) == cut.key) atomicAdd(&s.histogram[key >> shift & (n_bin - 1)], weight(score));
      });
      cluster_arrive_block();
      cluster_wait_block();
      // This thread's bins, the highest first.
      Weight mine[kEach] = {}, sum = 0, all;
      const int top = n_bin - 1 - tid * kEach;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        for (int r = 0; top - i >= 0 && r < n_block; ++r) mine[i] += *in_block(&s.histogram[top - i], r);
        sum += mine[i];
      }
      Weight above = block_scan(sum, s.scan, all);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int bin = top - i;
        if (bin >= 0 && above < left && (left <= above + mine[i] || bin == 0)) s.bin = bin, s.above = above, s.here = mine[i];
        above += mine[i];
      }
      __syncthreads();
      const uint32_t bin = s.bin;
      left -= s.above;
      cut.key |= bin << shift;
      mask |= static_cast<uint32_t>(n_bin - 1) << shift;
      if (pass == 2 && tid == 0)
        for (int r = 0; r < rank; ++r) s.before += *in_block(&s.histogram[bin], r);
      cluster_arrive_block();  // everybody has read
      cluster_wait_block();
    }
    const Weight each = weight(float_of(cut.key));  // of those that are equal
    if (each == 0) return {cut.key, kAll, 0, false};
    cut.ties = static_cast<int>(min(static_cast<Wide>(left + each - 1) / each, static_cast<Wide>(kAll)));
    cut.before = static_cast<int>(s.before / each);
    cut.numbered = s.here / each > static_cast<Weight>(cut.ties);
    return cut;
  }

  __device__ void mark(const float* worth, Cut cut) const {
    int number = cut.before;
    if (cut.numbered) {
      int n = 0;
      for_words(worth, [&](int, bool there, float score) { n += __popc(__ballot_sync(kWarp, there && key_of(score) == cut.key)); });
      if (lane == 0) s.equal[warp] = n;
      __syncthreads();
      for (int w = 0; w < warp; ++w) number += s.equal[w];
      __syncthreads();
    }
    for_words(worth, [&](int word, bool there, float score) {
      const uint32_t key = key_of(score), equal = __ballot_sync(kWarp, there && key == cut.key);
      const bool tie = !cut.numbered || number + __popc(equal & ((1u << lane) - 1)) < cut.ties;
      const uint32_t taken = __ballot_sync(kWarp, there && (key > cut.key || (key == cut.key && tie)));
      number += __popc(equal);
      if (lane == 0) marks[word] |= taken;
    });
  }

  __device__ void choose() const {
    for (int w = first_word + lane; w < last_word; w += 32) marks[w] = 0;
    __syncwarp();
    if (x.n <= x.first) return;
    if constexpr (kShare) {
      for (int head = kv_head * a.group; head < (kv_head + 1) * a.group; ++head) {
        const float *scores = a.scores_of(entry, head), total = a.total_of(entry, head);
        if (a.p >= 1) {  // everything, whatever rounding makes of the sum
          mark(scores, {0, kAll, 0, false});
          continue;
        }
        Wide exact = 0;
        for (int i = tid; i < x.begin + x.len - x.end; i += kThreads)
          exact += parts_of(expf(scores[i < x.begin ? i : x.end + i - x.begin] - total));
        exact = block_sum(exact, s.wide);
        __syncthreads();
        const Wide target = static_cast<Wide>(a.p * 0x1p48f);
        if (exact < target) mark(scores, find_cut(scores, target - exact, total));
      }
    } else {
      const float wanted = __fadd_rn(__fmul_rn(a.fraction, static_cast<float>(x.len)), 0.5f);
      const int64_t k = a.fraction > 0 ? static_cast<int64_t>(wanted) : a.k, n_unit = (k + a.unit - 1) / a.unit;
      const float* worth = a.worth(entry, kv_head);
      if (n_unit >= x.n - x.first) mark(worth, {0, kAll, 0, false});
      else if (n_unit > 0) mark(worth, find_cut(worth, static_cast<uint32_t>(n_unit), 0));
    }
  }

  // Of rows [from, to): how many are chosen.
  __device__ int chosen(int from, int to) const {
    int n = 0;
    if (from >= to) return 0;
    for (int w = from / a.unit / 32; w <= (to - 1) / a.unit / 32; ++w) {
      uint32_t bits = marks[w];
      if (a.unit == 1) {
        if (w == from / 32) bits &= ~0u << from % 32;
        if (w == (to - 1) / 32) bits &= ~0u >> (31 - (to - 1) % 32);
        n += __popc(bits);
      } else {
        for (; bits != 0; bits &= bits - 1) {
          const int row = (32 * w + __ffs(static_cast<int>(bits)) - 1) * a.unit;
          n += max(min(row + a.unit, to) - max(row, from), 0);
        }
      }
    }
    return n;
  }

  __device__ void add(int64_t AttentionCounters::* field, Wide n) const {
    atomicAdd(reinterpret_cast<Wide*>(&(reinterpret_cast<AttentionCounters*>(a.counters)[kv_head].*field)), n);
  }

  // How much of the new choice the one before had, among the rows that both could choose. By all blocks.
  __device__ void count_overlap(const int2* range, int n_range, int made) const {
    if (made <= 0 || made >= x.len || x.n <= x.first) return;
    const int end = min(static_cast<int>(window_begin(made, a.sinks, a.window, a.unit)), x.end), step = kThreads * n_block;
    Wide compared = 0, both = 0;
    for (int w = low + rank * kThreads + tid; w < high; w += step)
      compared += static_cast<Wide>(chosen(max(32 * w * a.unit, x.begin), min(32 * (w + 1) * a.unit, end)));
    for (int i = rank * kThreads + tid; i < n_range; i += step) {
      const int first = range[i].x, past = first + range[i].y - (i > 0 ? range[i - 1].y : 0);
      both += static_cast<Wide>(chosen(max(first, x.begin), min(past, end)));
    }
    compared = block_sum(compared, s.wide);
    __syncthreads();
    both = block_sum(both, s.wide);
    if (tid == 0) add(&AttentionCounters::n_compared, compared), add(&AttentionCounters::n_overlap, both);
  }

  // By the first block: where marks begin, ranges do.
  __device__ void write_ranges(int2* to, int32_t* n_range) const {
    const int surplus = x.begin - x.first * a.unit, last = x.n - 1;  // surplus: rows of the first unit that are sinks
    int n = x.begin > 0, rows = x.begin;                             // ranges begun, rows in them
    if (tid == 0 && x.begin > 0) to[0].x = 0;
#pragma unroll 1
    for (int w0 = low; w0 < high; w0 += kThreads) {
      const int w = w0 + tid;
      const uint32_t bits = w < high ? marks[w] : 0, before = w < high && w > low ? marks[w - 1] >> 31 : 0;
      uint32_t starts = bits & ~(bits << 1 | before);
      const bool trimmed = w == low && (bits >> x.first % 32 & 1);
      if (trimmed && x.begin > 0) starts &= ~(1u << x.first % 32);  // goes on where the sinks end
      int here = __popc(bits) * a.unit - (trimmed ? surplus : 0);
      if (w == last / 32 && (bits >> last % 32 & 1)) here -= x.n * a.unit - x.end;
      Wide total;
      const Wide at =
          block_scan(static_cast<Wide>(__popc(starts)) << 32 | static_cast<uint32_t>(here), reinterpret_cast<Wide*>(s.wide), total);
      int i = n + static_cast<int>(at >> 32);
      const int passed = rows + static_cast<int>(at & 0xffffffffu);
      for (; starts != 0; starts &= starts - 1, ++i) {
        const int bit = __ffs(static_cast<int>(starts)) - 1, inside = __popc(bits & ((1u << bit) - 1));
        if (i > 0) to[i - 1].y = passed + inside * a.unit - (trimmed && inside > 0 ? surplus : 0);
        to[i].x = x.row(a, 32 * w + bit);
      }
      n += static_cast<int>(total >> 32), rows += static_cast<int>(total & 0xffffffffu);
    }
    if (tid != 0) return;
    const bool joined = x.n > x.first ? marks[last / 32] >> last % 32 & 1 : x.begin == x.end && x.begin > 0;  // with the window
    if (x.len > x.end && !joined) {
      if (n > 0) to[n - 1].y = rows;
      to[n++].x = x.end;
    }
    to[n - 1].y = rows + x.len - x.end;
    *n_range = n;
  }
};

template <bool kShare>
__global__ void __launch_bounds__(kThreads, 1) top_rows_kernel(const __grid_constant__ TopArgs a) {
  __shared__ typename Chooser<kShare>::Shared shared;
  cluster_arrive_block();
  pdl_wait();
  pdl_launch();
  cluster_wait_block();  // all blocks are there
  const int place = a.place(static_cast<int>(blockIdx.z));
  if (place < 0) return;
  const Chooser<kShare> x(a, shared);
  int2* ranges = a.ranges + (int64_t{place} * a.h_kv + x.kv_head) * a.max_range;
  int32_t* n_range = a.n_range + int64_t{place} * a.h_kv + x.kv_head;
  x.choose();
  cluster_arrive_block();
  cluster_wait_block();  // all marks are there
  if (a.counters && a.made) x.count_overlap(ranges, *n_range, a.made[place]);
  cluster_arrive_block();
  if (x.rank != 0) return;
  cluster_wait_block();  // nobody needs the old ranges any more
  x.write_ranges(ranges, n_range);
  if (x.tid != 0) return;
  if (a.counters) x.add(&AttentionCounters::n_choice, 1);
  if (!a.made || arrive(a.arrived + x.entry) != static_cast<uint32_t>(a.h_kv - 1)) return;
  a.arrived[x.entry] = 0;  // the last of the kv heads: none compares with the old choice any more
  a.made[place] = x.x.len;
}

}  // namespace

void top_rows(const CudaStream& stream, const TopRows& x) {
  const int64_t n_entry = x.kv_len.shape[0], h_kv = x.ranges.shape[1], room = x.scores ? x.scores.shape[2] : 0;
  if (n_entry == 0) return;
  check(n_entry <= CudaStream::kCounters, "top_rows: ", n_entry, " entries, expected at most ", CudaStream::kCounters);
  const TopArgs a{x.ranges.as<int2>(),
                  x.n_range.as<int32_t>(),
                  x.made.as<int32_t>(),
                  x.counters.as<Wide>(),
                  x.scores.as<float>(),
                  x.log_total.as<float>(),
                  x.kv_len.as<int32_t>(),
                  x.state.as<int32_t>(),
                  x.scratch.as<float>(),
                  stream.counters,
                  room,
                  x.k,
                  x.ranges.shape[2],
                  static_cast<int32_t>(x.h_q),
                  static_cast<int32_t>(h_kv),
                  static_cast<int32_t>(x.h_q / h_kv),
                  static_cast<int32_t>(x.unit),
                  static_cast<int32_t>(std::min<int64_t>(x.sinks, 1 << 30)),
                  static_cast<int32_t>(std::min<int64_t>(x.window, 1 << 30)),
                  static_cast<int32_t>(x.p > 0 ? 0 : x.pool / 2),
                  x.fraction,
                  x.p,
                  x.vote};
  const auto by_units = dim3(static_cast<uint32_t>((room + kVoteThreads - 1) / kVoteThreads),
                             static_cast<uint32_t>(x.vote == Vote::layer ? 1 : h_kv), static_cast<uint32_t>(n_entry));
  if (x.scores && x.p == 0 && x.vote != Vote::first) launch(stream, vote_kernel, by_units, dim3(kVoteThreads), 0, a);
  if (x.scores && a.half > 0) launch(stream, pool_kernel, by_units, dim3(kVoteThreads), 0, a);
  int64_t blocks = stream.arch >= 90 && x.scores ? 8 : 1;  // as many as the SMs take at once
  while (blocks > 1 && h_kv * n_entry * blocks > stream.n_sm) blocks /= 2;
  const dim3 grid(static_cast<uint32_t>(blocks), static_cast<uint32_t>(h_kv), static_cast<uint32_t>(n_entry));
  launch_clusters(stream, x.scores && x.p > 0 ? top_rows_kernel<true> : top_rows_kernel<false>, grid, dim3(kThreads), 0, blocks, a);
}

}  // namespace prt::cuda
