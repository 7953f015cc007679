// `moment`: the clusters of one query head, in the order of their keys, the first kExact of them counted exactly.
//
//   rank    finds the first kExact and the one behind, by a threshold that so many threads have a cluster above
//   count   the exact mass of their rows, in parts of 8, shared with the other blocks of the head
//   decide  one warp: sums of what is taken from the front, and of what is left from the back, so that nothing is subtracted: one
//           over-estimated cluster may be all of the estimates but for 1e-10
//   extend  behind the counted ones: a search for the key that the missing mass ends at
#pragma once
#include "attention/select_choose.cuh"

namespace prt::cuda::selecting {

template <class T, int D>
struct Moment : Chooser<T, D> {
  using Base = Chooser<T, D>;
  using Base::a, Base::begin, Base::e, Base::keys, Base::s, Base::tid, Base::warp, Base::lane;
  enum class Weight { one, rows, estimate };
  static constexpr int kCoarse = 256, kFine = 512, kFew = 16, kLogRows = 3;

  __device__ Moment(const SelectArgs& args, uint4* shared) : Base(args, shared) {}

  template <class F>
  __device__ void each_key(F&& f) const {  // f(j, key)
#pragma unroll 1
    for (int j = 4 * tid; j < e.n_cluster; j += 4 * kThreads) {
      const int4 k = *reinterpret_cast<const int4*>(keys + j);
      f(j, k.x), f(j + 1, k.y), f(j + 2, k.z), f(j + 3, k.w);
    }
  }

  // ---- rank
  __device__ int load(int head, bool with_rows) {  // -> the highest of this thread's keys
    const int32_t *from = this->keys_of(head), *rows = this->first_rows();
    int32_t *to_rows = this->room() + a.n_table, *to = to_rows + a.room + kTile;
    int nearest = kEmpty;
#pragma unroll 4
    for (int j = 4 * tid; j < e.n_cluster; j += 4 * kThreads) {
      const int4 k = *reinterpret_cast<const int4*>(from + j);
      nearest = max(max(max(nearest, k.x), max(k.y, k.z)), k.w);
      if (!a.in_shared) continue;
      *reinterpret_cast<int4*>(to + j) = k;
      if (with_rows) *reinterpret_cast<int4*>(to_rows + j) = *reinterpret_cast<const int4*>(rows + j);
    }
    if (a.in_shared && tid == 0) to_rows[e.n_cluster] = e.end_page * kPage;
    keys = a.in_shared ? to : from;
    if (a.in_shared) begin = to_rows;
    return nearest;
  }
  __device__ void rank_clusters(int head, bool first_head) {
    const int nearest = load(head, first_head), most = __reduce_max_sync(kWarp, nearest);
    if (lane == 0) s.top[warp] = most;
    for (int i = tid; i < kCoarse + kFine; i += kThreads) s.histogram[i] = 0;
    if (tid == 0) s.n_order = 0;
    __syncthreads();
    int high = kEmpty;
#pragma unroll
    for (int w = 0; w < kWarps; w += 4) {
      const int4 x = *reinterpret_cast<const int4*>(s.top + w);
      high = max(max(max(high, x.x), max(x.y, x.z)), x.w);
    }
    // Bins of distances from the highest key, 16 to an octave. Where more than kSorted threads have a cluster there are as many clusters,
    // or more.
    const auto bin_of = [&](int k) {
      const uint32_t far = min(static_cast<uint32_t>(high) - static_cast<uint32_t>(k), uint32_t{INT_MAX});
      return k == kEmpty ? kCoarse : min(static_cast<int>(__float_as_uint(static_cast<float>(far + 256)) >> 19) - (135 << 4), kCoarse - 1);
    };
    if (e.n_cluster > 4 * kThreads) {
      if (nearest != kEmpty) atomicAdd(s.histogram + bin_of(nearest), 1);
    } else {
      each_key([&](int, int k) {
        if (k != kEmpty) atomicAdd(s.histogram + bin_of(k), 1);
      });
    }
    __syncthreads();
    uint32_t count[8], sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const uint4 x = *reinterpret_cast<const uint4*>(s.histogram + 8 * lane + i);
      count[i] = x.x, count[i + 1] = x.y, count[i + 2] = x.z, count[i + 3] = x.w;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += count[i];
    int before = scan_warp(static_cast<int>(sum)) - static_cast<int>(sum), last = kCoarse - 1;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      before += static_cast<int>(count[i]);
      if (before > kSorted) last = min(last, 8 * lane + i);
    }
    last = __reduce_min_sync(kWarp, last);
    // The lowest key of that bin; the last one is open.
    const uint32_t far = static_cast<uint32_t>(__uint_as_float(static_cast<uint32_t>(last + 1 + (135 << 4)) << 19)) - 256;
    const int least = last == kCoarse - 1 || far > static_cast<uint32_t>(high) - static_cast<uint32_t>(kEmpty + 1)
                          ? kEmpty + 1
                          : high - static_cast<int>(far) + 1;
    sort_from(least, high, nearest >= least);
  }
  // Sorts the clusters from the key `least` on by counting, in bins of equal width, and within a bin by who comes before.
  __device__ void sort_from(int least, int high, bool has_some) {
    uint32_t *bins = s.histogram + kCoarse, *ends = bins + kFine;
    const float to_bin = static_cast<float>(kFine) / (static_cast<float>(static_cast<uint32_t>(high) - static_cast<uint32_t>(least)) + 1);
    const auto bin_of = [&](int k) {
      return min(static_cast<int>(static_cast<float>(static_cast<uint32_t>(high) - static_cast<uint32_t>(k)) * to_bin), kFine - 1);
    };
    if (has_some)
      each_key([&](int j, int k) {
        if (k < least) return;
        const int at = atomicAdd(&s.n_order, 1);
        if (at < kList) s.list[at] = order_of(k, j);
        atomicAdd(bins + bin_of(k), 1);
      });
    __syncthreads();
    const int n = s.n_order;
    if (n > kList) return sort_few(*this, high);
    {
      constexpr int kEach = kFine / 32;  // every warp sums up all bins, and writes its own
      uint32_t in_bin[kEach], all = 0;
#pragma unroll
      for (int i = 0; i < kEach; i += 4) {
        const uint4 x = *reinterpret_cast<const uint4*>(bins + kEach * lane + i);
        in_bin[i] = x.x, in_bin[i + 1] = x.y, in_bin[i + 2] = x.z, in_bin[i + 3] = x.w;
        all += x.x + x.y + x.z + x.w;
      }
      uint32_t begin = static_cast<uint32_t>(scan_warp(static_cast<int>(all))) - all;
      if (lane / (32 / kWarps) == warp)
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          ends[kEach * lane + i] = begin;
          begin += in_bin[i];
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = tid; i < n; i += kThreads) s.binned[atomicAdd(ends + bin_of(key_of(s.list[i])), 1)] = s.list[i];
    __syncthreads();
#pragma unroll 1
    for (int i = tid; i < n; i += kThreads) {
      const uint64_t mine = s.binned[i];
      const int bin = bin_of(key_of(mine)), end = static_cast<int>(ends[bin]);
      int from = bin > 0 ? static_cast<int>(ends[bin - 1]) : 0, at = from;
#pragma unroll 1
      for (; from < end; ++from) at += s.binned[from] < mine;
      place(at, mine);
    }
    end_order(n);
  }
  __device__ void place(int at, uint64_t cluster) const {
    s.order[at] = cluster;
    if (at <= kExact) s.first[at] = this->first(number_of(cluster)), s.rows[at] = this->rows(number_of(cluster));
  }
  __device__ void end_order(int n) const {
    if (tid >= n && tid <= kExact) s.order[tid] = kAll, s.first[tid] = s.rows[tid] = 0;
    __syncthreads();
  }
  // Many have the same rank: only kExact and the one behind, found by a search.
  __device__ static __noinline__ void sort_few(Moment x, int high) {
    ChooseShared& s = x.s;
    __syncthreads();
    const uint64_t end = find_cut(x, order_of(high, 0), kExact + 1, Weight::one, 1);
    if (x.tid == 0) s.n_order = 0;
    __syncthreads();
    x.each_key([&](int j, int k) {
      if (k != kEmpty && order_of(k, j) < end) s.list[atomicAdd(&s.n_order, 1)] = order_of(k, j);
    });
    __syncthreads();
    const int n = s.n_order;
    if (x.tid < n) {
      const uint64_t mine = s.list[x.tid];
      int at = 0;
      for (int o = 0; o < n; ++o) at += s.list[o] < mine;
      x.place(at, mine);
    }
    x.end_order(n);
  }

  // ---- how the rows of the first clusters are dealt out, as every warp finds by itself: in parts of 8, or of twice as many until
  // there is room. A lane knows two clusters.
  struct Deal {
    int rows[2], parts[2], before, log_size;  // before: parts of lanes before this one
    int n_exact;
  };
  __device__ Deal deal() const {
    Deal d;
    const int2 n = *reinterpret_cast<const int2*>(s.rows + 2 * lane);
    d.rows[0] = n.x, d.rows[1] = n.y;
    int sum;
    for (d.log_size = kLogRows;; ++d.log_size) {
      d.parts[0] = (n.x + (1 << d.log_size) - 1) >> d.log_size, d.parts[1] = (n.y + (1 << d.log_size) - 1) >> d.log_size;
      sum = scan_warp(d.parts[0] + d.parts[1]);
      if (__shfl_sync(kWarp, sum, 31) <= kParts) break;
    }
    d.before = sum - d.parts[0] - d.parts[1];
    d.n_exact = __popc(__ballot_sync(kWarp, n.x > 0)) + __popc(__ballot_sync(kWarp, n.y > 0));
    return d;
  }
  __device__ int parts_before(const Deal& d, int cluster) const {
    const int even = __shfl_sync(kWarp, d.before, min(cluster / 2, 31)), last = __shfl_sync(kWarp, d.parts[0], min(cluster / 2, 31)),
              all = __shfl_sync(kWarp, d.before + d.parts[0] + d.parts[1], 31);
    return cluster >= kExact ? all : cluster % 2 ? even + last : even;
  }
  __device__ int2 part(const Deal& d, int i) const {  // first row, rows
    const int owner = __popc(__ballot_sync(kWarp, d.before <= i)) - 1;
    const int2 first = *reinterpret_cast<const int2*>(s.first + 2 * owner), rows = *reinterpret_cast<const int2*>(s.rows + 2 * owner);
    const int at = i - __shfl_sync(kWarp, d.before, owner), here = __shfl_sync(kWarp, d.parts[0], owner);
    const bool second = at >= here;
    const int skip = (second ? at - here : at) << d.log_size;
    return {(second ? first.y : first.x) + skip, min(1 << d.log_size, (second ? rows.y : rows.x) - skip)};
  }

  // ---- count: this block's share of the parts from .. end; sums go to the block `to`. On the way of the first keys: what all other
  // clusters are estimated at.
  __device__ void count(const RowScorer<T, D>& q, const Deal& d, int from, int end, int block, int n_block, int to, bool with_rest) const {
    float2* mass = in_block(s.mass, to);
    int i = from + 2 * (block + warp * n_block);
    int2 x, y;
    typename RowScorer<T, D>::Rows k;
    const auto find = [&] {
      x = part(d, i), y = i + 1 < end ? part(d, i + 1) : int2{x.x, 0};
      q.load(k, this->key_row(x.x + min(lane / 4, x.y - 1)), this->key_row(y.x + min(lane / 4, max(y.y - 1, 0))));
    };
    if (i < end) find();
    if (with_rest) {
      const float sum = warp_sum(sum_estimates(4 * (tid + block * kThreads), 4 * kThreads * n_block));
      if (lane == 0) in_block(s.estimates, to)[block * kWarps + warp] = sum;
    }
#pragma unroll 1
    while (i < end) {
      Mass m[2];
#pragma unroll 1
      for (int r = lane / 4;;) {
        float score[2];
        q.score(k, score[0], score[1]);
        if (r < x.y) m[0].add({score[0] * (a.scale * kLog2e), 1});
        if (r < y.y) m[1].add({score[1] * (a.scale * kLog2e), 1});
        r += 1 << kLogRows;
        if (r - lane / 4 >= max(x.y, y.y)) break;
        q.load(k, this->key_row(x.x + min(r, x.y - 1)), this->key_row(y.x + min(r, max(y.y - 1, 0))));
      }
      m[0] = warp_mass<4>(m[0]), m[1] = warp_mass<4>(m[1]);
      if (lane < 2 && i + lane < end) mass[i + lane] = lane == 0 ? float2{m[0].top, m[0].total} : float2{m[1].top, m[1].total};
      i += 2 * kWarps * n_block;
      if (i < end) find();
    }
  }
  // Sums of estimates behind the counted clusters, in units of the first one of these per row: none is subtracted. In a fixed order.
  __device__ float sum_estimates(int from, int step) const {
    const uint64_t next = s.order[kExact];
    if (next == kAll) return 0;
    const int key = key_of(next), number = number_of(next);
    float sum = 0;
    const auto add = [&](int j, int k, int n) {
      if (k < key || (k == key && j >= number)) sum += estimate(key, k, n);
    };
#pragma unroll 2
    for (int j = from; j < e.n_cluster; j += step) {
      const int4 k = *reinterpret_cast<const int4*>(keys + j), row = *reinterpret_cast<const int4*>(begin + j);
      const int end = begin[min(j + 4, e.n_cluster)];
      add(j, k.x, row.y - row.x), add(j + 1, k.y, row.z - row.y), add(j + 2, k.z, row.w - row.z), add(j + 3, k.w, end - row.w);
    }
    return sum;
  }
  __device__ static float estimate(int key, int k, int n) {  // of n rows, against one row with the higher `key`
    const uint32_t far = min(static_cast<uint32_t>(key) - static_cast<uint32_t>(k), 200u << 16);
    return k == kEmpty ? 0 : static_cast<float>(n) * pow2(static_cast<float>(far) * -0x1p-16f);
  }

  // ---- decide, by one warp; each lane has two of the counted clusters. Those before `upto` have been counted.
  // s.n_taken = -1: more have to be counted.
  __device__ void decide(const Deal& d, int upto, int n_block, int want_rows) const {
    const int m = d.n_exact;
    float rest = 0;
    for (int i = lane; i < n_block * kWarps; i += 32) rest += s.estimates[i];
    rest = warp_sum(rest);
    Mass exact[2], behind{static_cast<float>(key_of(s.order[kExact])) * 0x1p-16f, rest};
    float top = s.open.x, most = rest > 0 ? behind.top : kNegInf, guess[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = 2 * lane + i, part = d.before + i * d.parts[0];
      guess[i] = at < m ? static_cast<float>(key_of(s.order[at])) * 0x1p-16f + __log2f(static_cast<float>(d.rows[i])) : kNegInf;
      if (at < upto) {
#pragma unroll 2
        for (int p = part; p < part + d.parts[i]; ++p) exact[i].top = fmaxf(exact[i].top, s.mass[p].x);
#pragma unroll 2
        for (int p = part; p < part + d.parts[i]; ++p) exact[i].total += s.mass[p].y * pow2(s.mass[p].x - exact[i].top);
      }
      top = fmaxf(top, exact[i].top), most = fmaxf(most, guess[i]);
    }
    top = warp_max(top), most = warp_max(most);
    const float mass[2] = {exact[0].under(top), exact[1].under(top)};
    const float estimate[2] = {guess[0] > kNegInf ? pow2(guess[0] - most) : 0, guess[1] > kNegInf ? pow2(guess[1] - most) : 0};
    float taken = mass[0] + mass[1], left = estimate[0] + estimate[1];
    int rows = d.rows[0] + d.rows[1];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float x = __shfl_up_sync(kWarp, taken, step), y = __shfl_down_sync(kWarp, left, step);
      const int n = __shfl_up_sync(kWarp, rows, step);
      if (lane >= step) taken += x, rows += n;
      if (lane + step < 32) left += y;
    }
    const float counted = __shfl_sync(kWarp, taken, 31), estimated = __shfl_sync(kWarp, left, 0);
    const int n_rows = __shfl_sync(kWarp, rows, 31), before_rows = rows - d.rows[0] - d.rows[1];
    float before = __shfl_up_sync(kWarp, taken, 1), after = __shfl_down_sync(kWarp, left, 1);
    if (lane == 0) before = 0;
    if (lane == 31) after = 0;
    const float outside = s.open.y > 0 ? s.open.y * pow2(s.open.x - top) : 0, behind_all = behind.under(most);
    // log2 of what is left over what is taken, if it ends before a lane's first, or its second
    const auto odds = [&](float rest_of, float taken_of) {
      return rest_of > 0 ? most + __log2f(rest_of) - top - __log2f(taken_of) : kNegInf;
    };
    const float against[2] = {odds(left + behind_all, outside + before),
                              odds(estimate[1] + after + behind_all, outside + before + mass[0])};
    const auto enough = [&](int i) {
      const int at = 2 * lane + i;
      if (at > min(m, upto) || at == kExact) return false;
      return (a.p < 1 && at >= a.least && -against[i] >= a.log_odds) || (i == 0 ? before_rows : before_rows + d.rows[0]) >= want_rows ||
             at == m;
    };
    const uint32_t stop0 = __ballot_sync(kWarp, enough(0)), stop1 = __ballot_sync(kWarp, enough(1));
    const int n =
        min(stop0 ? 2 * (__ffs(static_cast<int>(stop0)) - 1) : INT_MAX, stop1 ? 2 * (__ffs(static_cast<int>(stop1)) - 1) + 1 : INT_MAX);
    if (n < INT_MAX) {
      if (lane == n / 2) s.n_taken = n, s.want = 0, s.share = 1 / (1 + pow2(n % 2 ? against[1] : against[0]));
      return;
    }
    if (upto < m) {
      if (lane == 0) s.n_taken = -1;
      return;
    }
    // All are taken; what comes behind is worth what these were, compared with their estimates.
    const float worth = top + __log2f(counted) - most - __log2f(estimated);
    const float weighs = behind_all > 0 ? odds(behind_all, outside + counted) + worth : kNegInf;
    const float want = a.p == 1 ? 1 : -weighs >= a.log_odds ? 0 : a.p - (1 - a.p) * pow2(-weighs);
    if (lane != 0) return;
    s.n_taken = kExact, s.weighs = weighs, s.share = share_of(weighs, 0), s.rest = rest;
    s.want = want, s.want_rows = want_rows - n_rows;
  }
  // The share of the mass, with `more` of what is behind the counted clusters.
  __device__ static float share_of(float weighs, float more) {
    return weighs < 0 ? (1 + pow2(weighs) * more) / (1 + pow2(weighs)) : (pow2(-weighs) + more) / (pow2(-weighs) + 1);
  }
  // Behind the counted clusters, among those that are sorted: by one warp. What they are not enough for stays in s.want.
  __device__ void go_on() const {
    const int key = key_of(s.order[kExact]);
    const uint32_t want = static_cast<uint32_t>(ceilf(s.want * 0x1p31f));  // mass: in 2^-31 of the rest
    const float unit = 0x1p31f / s.rest;
    uint32_t mass = 0;
    int rows = 0;
#pragma unroll 1
    for (int i = kExact + lane; i - lane < s.n_order; i += 32) {
      const bool there = i < s.n_order;
      const uint64_t cluster = s.order[min(i, s.n_order - 1)];
      const int n = there ? this->rows(number_of(cluster)) : 0;
      const uint32_t m = there ? __float2uint_rn(estimate(key, key_of(cluster), n) * unit) : 0;
      const uint32_t upto = mass + static_cast<uint32_t>(scan_warp(static_cast<int>(m)));
      const int upto_rows = rows + scan_warp(n);
      const uint32_t stop = __ballot_sync(kWarp, there && ((a.p < 1 && upto >= want) || upto_rows >= s.want_rows));
      const int last = stop ? __ffs(static_cast<int>(stop)) - 1 : 31;
      mass = __shfl_sync(kWarp, upto, last), rows = __shfl_sync(kWarp, upto_rows, last);
      if (!stop) continue;
      __syncwarp();
      if (lane == 0) s.n_taken = i + last + 1, s.want = 0, s.share = share_of(s.weighs, fminf(static_cast<float>(mass) * 0x1p-31f, 1));
      return;
    }
  }

  // ---- the shortest stretch of the ranking from `from` on whose weights reach `want`: -> its end, or kAll
  __device__ uint32_t weight(int j, int k, Weight kind, float unit) const {
    if (kind == Weight::one) return 1;
    const int n = this->rows(j);
    return kind == Weight::rows ? static_cast<uint32_t>(n) : __float2uint_rn(estimate(key_of(s.order[kExact]), k, n) * unit);
  }
  __device__ static __noinline__ uint64_t find_cut(Moment x, uint64_t from, uint64_t want, Weight kind, float unit) {
    ChooseShared& s = x.s;
    const int tid = x.tid;
    uint64_t base = 0, until = kAll;
#pragma unroll 1
    for (int shift = kNumberBits + 10;; shift = max(shift - 11, 0)) {  // bins of 2^-6 first, the last of them open
#pragma unroll 1
      for (int i = tid; i < kBins; i += kThreads) s.histogram[i] = 0;
      if (tid == 0) s.found[0] = kAll, s.n_list = 0;
      __syncthreads();
      x.each_key([&](int j, int k) {
        const uint64_t o = order_of(k, j);
        if (k != kEmpty && o >= from && o < until)
          atomicAdd(s.histogram + min((o - from) >> shift, uint64_t{kBins - 1}), x.weight(j, k, kind, unit));
      });
      __syncthreads();
      constexpr int kEach = kBins / kThreads;
      uint64_t total, here = 0;
      for (int i = 0; i < kEach; ++i) here += s.histogram[tid * kEach + i];
      uint64_t before = base + block_scan(here, s.scan, total);
      for (int i = 0; i < kEach; ++i) {
        const uint32_t w = s.histogram[tid * kEach + i];
        if (before < want && want <= before + w) s.found[0] = static_cast<uint64_t>(tid * kEach + i), s.found[1] = before;
        before += w;
      }
      __syncthreads();
      const uint64_t bin = s.found[0];
      if (bin == kAll) return kAll;
      base = s.found[1];
      const bool open = until == kAll && bin == kBins - 1;
      from += bin << shift;
      until = open ? kAll - 1 : from + (uint64_t{1} << shift);
      if (open) shift = kNumberBits + 32;
      x.each_key([&](int j, int k) {
        const uint64_t o = order_of(k, j);
        if (k == kEmpty || o < from || o >= until) return;
        const int at = atomicAdd(&s.n_list, 1);
        if (at < kList) s.list[at] = o, s.weight[at] = x.weight(j, k, kind, unit);
      });
      __syncthreads();
      const int n = s.n_list;
      if (n > kList / 2) {  // all are compared with all
        __syncthreads();
        continue;
      }
#pragma unroll 1
      for (int i = tid; i < n; i += kThreads) {
        const uint64_t mine = s.list[i];
        uint64_t sum = base;
#pragma unroll 4
        for (int o = 0; o < n; ++o) sum += s.list[o] < mine ? s.weight[o] : 0;
        if (sum < want && want <= sum + s.weight[i]) s.found[1] = mine + 1;
      }
      __syncthreads();
      const uint64_t end = s.found[1];
      __syncthreads();
      return end;
    }
  }
  // Goes on behind the counted clusters, by estimates: marks the rest of the choice. -> the share that is reached
  __device__ static __noinline__ float extend(Moment x) {
    const SelectArgs& a = x.a;
    ChooseShared& s = x.s;
    const uint64_t from = s.order[kExact];
    const float want = s.want, weighs = s.weighs, rest = s.rest;
    const int want_rows = s.want_rows;
    float sum = 0;
    // Weights are shares of the rest in 2^-31, or rows.
    uint64_t end = kAll;
    bool too_many = true;
    if (a.p < 1) {
      end = find_cut(x, from, static_cast<uint64_t>(ceilf(want * 0x1p31f)), Weight::estimate, 0x1p31f / rest);
      int rows = 0;
      x.each_key([&](int j, int k) { rows += k != kEmpty && order_of(k, j) >= from && order_of(k, j) < end ? x.rows(j) : 0; });
      too_many = block_sum(static_cast<float>(rows), s.sum) > static_cast<float>(want_rows);  // exact: below 2^24
      __syncthreads();
    }
    if (too_many && a.budget < 1) end = find_cut(x, from, static_cast<uint64_t>(want_rows), Weight::rows, 1);
    uint32_t* to = in_block(x.chosen, 0);
    x.each_key([&](int j, int k) {
      if (k == kEmpty || order_of(k, j) >= end) return;
      if (order_of(k, j) >= from) sum += estimate(key_of(from), k, x.rows(j));
      atomicOr(to + j / 32, 1u << j % 32);
    });
    return share_of(weighs, fminf(block_sum(sum, s.sum) / rest, 1));
  }

  // One query head, with `n_block` blocks of which this is `block`; the first one decides.
  __device__ void choose(int head, int block, int n_block) {
    const int first_block = this->rank - block;
    const RowScorer<T, D> q(a.template query<T>(this->entry, this->kv_head, head), a.d);
    if (warp == kWarps - 1) {
      const Mass open = this->open_mass(head);
      if (lane == 0) s.open = {open.top, open.total};
    }
    rank_clusters(head, head < this->blocks);
    const Deal d = deal();
    // No more than are wanted.
    const int want_rows = static_cast<int>(ceil(static_cast<double>(a.budget) * (e.end_page - e.first_page) * kPage));
    const int before = scan_warp(d.rows[0] + d.rows[1]) - d.rows[0] - d.rows[1];
    const int most = __popc(__ballot_sync(kWarp, d.rows[0] > 0 && before < want_rows)) +
                     __popc(__ballot_sync(kWarp, d.rows[1] > 0 && before + d.rows[0] < want_rows));
    int from = 0, upto = most;
    if (a.p < 1 && n_block == 1) upto = min(upto, kFew);  // most heads are content with few: the others come if need be
#pragma unroll 1
    for (;;) {
      const int end = parts_before(d, upto);
      count(q, d, from, end, block, n_block, first_block, from == 0);
      if (n_block > 1) cluster_arrive_block(), cluster_wait_block();
      else __syncthreads();
      if (block > 0) return;
      if (warp == 0) {
        decide(d, upto, n_block, want_rows);
        __syncwarp();
        if (s.n_taken == kExact && s.want > 0 && s.want_rows > 0) go_on();
      }
      __syncthreads();
      if (s.n_taken >= 0) break;
      from = end, upto = most;
    }
    float share = s.share;
    if (s.want > 0 && s.want_rows > 0) share = extend(*this);
    for (int i = tid; i < s.n_taken; i += kThreads) this->mark(number_of(s.order[i]));
    if (tid == 0) this->put_share(head, share);
  }
};

}  // namespace prt::cuda::selecting
