// `moment`: the clusters of one query head, in the order of their keys, the first kExact of them counted exactly.
//
//   rank    sorts the first kSorted or more, from a threshold on that so many threads have a cluster above
//   count   the exact mass of the rows of the first kExact, in parts of 8, shared with the other blocks of the head
//   decide  the counted ones by what they are worth; one warp sums up what is taken from the front and what is left from the back, so
//           that nothing is subtracted: one over-estimated cluster may be all of the estimates but for 1e-10
//   go_on   behind the counted ones, by their estimates: among those that are sorted
//   extend  past these: a search for the key that the missing mass ends at
#pragma once
#include "attention/select_choose.cuh"

namespace prt::cuda::selecting {

template <class T, int D>
struct Moment : Chooser<T, D> {
  using Base = Chooser<T, D>;
  using Base::a, Base::begin, Base::e, Base::keys, Base::s, Base::tid, Base::warp, Base::lane;
  enum class Weight { one, rows, estimate };
  static constexpr int kCoarse = 256, kFine = 512, kFew = static_cast<int>(kFewClusters), kLogRows = 3;

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
    constexpr int kBatch = 8;
#pragma unroll 1
    for (int j0 = 4 * tid; __any_sync(kWarp, has_some && j0 < e.n_cluster); j0 += 4 * kBatch * kThreads) {
      uint32_t some = 0;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int j = j0 + 4 * i * kThreads;
        if (!has_some || j >= e.n_cluster) break;
        const int4 k = *reinterpret_cast<const int4*>(keys + j);
        some |= (k.x >= least ? 1u : 0) << 4 * i | (k.y >= least ? 2u : 0) << 4 * i | (k.z >= least ? 4u : 0) << 4 * i |
                (k.w >= least ? 8u : 0) << 4 * i;
      }
      const int upto = scan_warp(__popc(some));
      int at = 0;
      if (lane == 31) at = atomicAdd(&s.n_order, upto);
      at = __shfl_sync(kWarp, at, 31) + upto - __popc(some);
#pragma unroll 1
      for (; some != 0; some &= some - 1, ++at) {
        const int bit = __ffs(static_cast<int>(some)) - 1, j = j0 + (bit & ~3) * kThreads + bit % 4, k = keys[j];
        if (at < kList) s.list[at] = order_of(k, j);
        atomicAdd(bins + bin_of(k), 1);
      }
    }
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

  // ---- how the rows of the first clusters are dealt out: in parts of 8, or of twice as many until there is room. -> how many of these
  // clusters there are
  __device__ int deal() const {
    const int2 n = *reinterpret_cast<const int2*>(s.rows + 2 * lane);
    int log_size = kLogRows, n0, n1, upto;
    for (;; ++log_size) {
      n0 = (n.x + (1 << log_size) - 1) >> log_size, n1 = (n.y + (1 << log_size) - 1) >> log_size;
      upto = scan_warp(n0 + n1);
      if (__shfl_sync(kWarp, upto, 31) <= kParts) break;
    }
    constexpr int kOwn = kExact / kWarps, kLanes = 32 / kOwn;  // clusters of a warp; lanes of a cluster
    const int mine = kOwn * warp + lane / kLanes, first = s.first[mine], rows = s.rows[mine];
    const int even = __shfl_sync(kWarp, upto - n0 - n1, mine / 2), odd = __shfl_sync(kWarp, upto - n1, mine / 2);
    const int before = mine % 2 ? odd : even;
    for (int skip = lane % kLanes << log_size, at = before + lane % kLanes; skip < rows; skip += kLanes << log_size, at += kLanes)
      s.parts[at] = {first + skip, min(1 << log_size, rows - skip)};
    if (warp == 0) {
      s.first_part[2 * lane] = upto - n0 - n1, s.first_part[2 * lane + 1] = upto - n1;
      if (lane == 31) s.first_part[kExact] = upto;
    }
    const int n_exact = __popc(__ballot_sync(kWarp, n.x > 0)) + __popc(__ballot_sync(kWarp, n.y > 0));
    __syncthreads();
    return n_exact;
  }

  // ---- count: this block's share of the parts from .. end; sums go to the block `to`. On the way of the first keys: what all other
  // clusters are estimated at.
  __device__ void count(const RowScorer<T, D>& q, int from, int end, int block, int n_block, int to, bool with_rest) const {
    float2* mass = in_block(s.mass, to);
    int i = from + 2 * (block + warp * n_block);
    int2 x, y;
    typename RowScorer<T, D>::Rows k;
    const auto find = [&] {
      if (i >= end) return;
      x = s.parts[i], y = i + 1 < end ? s.parts[i + 1] : int2{x.x, 0};
      q.load(k, this->key_row(x.x + min(lane / 4, x.y - 1)), this->key_row(y.x + min(lane / 4, max(y.y - 1, 0))));
    };
    find();
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
      const bool second = lane % 4 >= 2;  // all lanes of a row have its score
      const int at = i + second;
      i += 2 * kWarps * n_block;
      find();  // the next are on their way while these are summed up
      const Mass sum = warp_mass<4>(second ? m[1] : m[0]);
      if (lane < 4 && lane % 2 == 0 && at < end) mass[at] = {sum.top, sum.total};
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

  // ---- decide: which of the counted clusters are taken, those that are worth most per row first.
  // By all: the first m clusters by value. Neighbouring lanes share a cluster.
  __device__ void put_in_order(int m) const {
    constexpr int kLanes = kThreads / kExact, kEach = kExact / kLanes;  // a lane compares with kEach others
    const int at = tid / kLanes, part = tid % kLanes, begin = s.first_part[at], end = s.first_part[at + 1];
    Mass mass;
#pragma unroll 1
    for (int p = begin + part; p < end && at < m; p += kLanes) mass.add({s.mass[p].x, s.mass[p].y});
    float top = mass.top;
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) top = fmaxf(top, __shfl_xor_sync(kWarp, top, step));
    const float total = warp_sum<kLanes>(mass.under(top));
    const Counted mine{total > 0 ? top + __log2f(total) : kNegInf, s.rows[at], number_of(s.order[at])};
    const float value = at < m ? mine.log_mass - __log2f(static_cast<float>(mine.rows)) : kNegInf;
    if (part == 0) s.value[at] = value;
    __syncthreads();
    int place = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const float other = s.value[kEach * part + i];
      const int cluster = number_of(s.order[kEach * part + i]);
      place += kEach * part + i < m && (other > value || (other == value && cluster < mine.cluster));
    }
    place += part < kFew / kEach ? place << 16 : 0;  // of the few; of all
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) place += __shfl_xor_sync(kWarp, place, step);
    if (part == 0 && at < min(m, kFew)) s.counted[0][place >> 16] = mine;
    if (part == 0 && at < m) s.counted[1][place & 0xffff] = mine;
    __syncthreads();
  }
  // By one warp, of the first kFew or of all; each lane has two of them.
  __device__ void decide(int n_exact, bool few, int n_block, int want_rows) const {
    const int m = few ? min(n_exact, kFew) : n_exact;
    const Counted* counted = s.counted[few ? 0 : 1];
    Decision& to = s.decision[few ? 0 : 1];
    float rest = 0;
    for (int i = lane; i < n_block * kWarps; i += 32) rest += s.estimates[i];
    rest = warp_sum(rest);
    const Mass behind{static_cast<float>(key_of(s.order[kExact])) * 0x1p-16f, rest};
    float top = s.open.x, most = rest > 0 ? behind.top : kNegInf, guess[2];
    Counted mine[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = 2 * lane + i;
      guess[i] = at < n_exact ? static_cast<float>(key_of(s.order[at])) * 0x1p-16f + __log2f(static_cast<float>(s.rows[at])) : kNegInf;
      mine[i] = at < m ? counted[at] : Counted{kNegInf, 0, 0};
      top = fmaxf(top, mine[i].log_mass), most = fmaxf(most, guess[i]);
    }
    top = warp_max(top), most = warp_max(most);
    float others = 0, estimated = 0, mass[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      (2 * lane + i < m ? estimated : others) += guess[i] > kNegInf ? pow2(guess[i] - most) : 0;
      mass[i] = mine[i].log_mass > kNegInf ? pow2(mine[i].log_mass - top) : 0;
    }
    others = warp_sum(others) + behind.under(most), estimated = warp_sum(estimated);
    float taken = mass[0] + mass[1], left = taken;
    int rows = mine[0].rows + mine[1].rows;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float x = __shfl_up_sync(kWarp, taken, step), y = __shfl_down_sync(kWarp, left, step);
      const int n = __shfl_up_sync(kWarp, rows, step);
      if (lane >= step) taken += x, rows += n;
      if (lane + step < 32) left += y;
    }
    const float all_taken = __shfl_sync(kWarp, taken, 31);
    const int n_rows = __shfl_sync(kWarp, rows, 31), before_rows = rows - mine[0].rows - mine[1].rows;
    float before = __shfl_up_sync(kWarp, taken, 1), after = __shfl_down_sync(kWarp, left, 1);
    if (lane == 0) before = 0;
    if (lane == 31) after = 0;
    const float outside = s.open.y > 0 ? s.open.y * pow2(s.open.x - top) : 0;
    // What is not counted: where all are that can be, it is worth what these were, compared with their estimates.
    const float worth = m == kExact ? top + __log2f(all_taken) - most - __log2f(estimated) : 0;
    const float log_others = others > 0 ? most + __log2f(others) + worth : kNegInf, high = fmaxf(top, log_others);
    // log2 of what is left over what is taken, if it ends before a lane's first, or its second
    const auto odds = [&](float left_of, float taken_of) {
      const float all = left_of * pow2(top - high) + (others > 0 ? pow2(log_others - high) : 0);
      return all > 0 ? high + __log2f(all) - top - __log2f(taken_of) : kNegInf;
    };
    const float against[2] = {odds(left, outside + before), odds(mass[1] + after, outside + before + mass[0])};
    const bool all = m == n_exact && (m < kExact || s.order[kExact] == kAll);
    const auto enough = [&](int i) {
      const int at = 2 * lane + i;
      if (at > m) return false;
      return (a.p < 1 && at >= a.least && -against[i] >= a.log_odds) || (all && at == m) ||
             (i == 0 ? before_rows : before_rows + mine[0].rows) >= want_rows;
    };
    const uint32_t stop0 = __ballot_sync(kWarp, enough(0)), stop1 = __ballot_sync(kWarp, enough(1));
    const int n =
        min(stop0 ? 2 * (__ffs(static_cast<int>(stop0)) - 1) : INT_MAX, stop1 ? 2 * (__ffs(static_cast<int>(stop1)) - 1) + 1 : INT_MAX);
    if (n < INT_MAX) {
      if (lane == n / 2) to = {n, 1 / (1 + pow2(n % 2 ? against[1] : against[0])), 0, 0, 0};
    } else if (m < n_exact) {
      if (lane == 0) to.n_taken = -1;
    } else {
      const float weighs = others > 0 ? odds(0, outside + all_taken) : kNegInf;
      const float want = a.p == 1 ? 1 : -weighs >= a.log_odds ? 0 : a.aim - (1 - a.aim) * pow2(-weighs);
      if (lane == 0) s.rest = rest, to = {kExact, share_of(weighs, 0), want, weighs, want_rows - n_rows};
    }
  }
  // The share of the mass, with `more` of what is behind the counted clusters.
  __device__ static float share_of(float weighs, float more) {
    return weighs < 0 ? (1 + pow2(weighs) * more) / (1 + pow2(weighs)) : (pow2(-weighs) + more) / (pow2(-weighs) + 1);
  }
  // Behind the counted clusters, among those that are sorted. What they are not enough for stays in `want`.
  __device__ void go_on() const {
    const Decision& so_far = s.decision[1];
    const int key = key_of(s.order[kExact]), want_rows = so_far.want_rows, each = (s.n_order - kExact + kThreads - 1) / kThreads,
              from = kExact + each * tid, upto = min(from + each, s.n_order);
    const uint32_t want = static_cast<uint32_t>(ceilf(so_far.want * 0x1p31f));  // mass: in 2^-31 of the rest
    const float unit = 0x1p31f / s.rest;
    const auto weight = [&](int i) {
      const uint64_t cluster = s.order[i];
      const int n = this->rows(number_of(cluster));
      return int2{static_cast<int>(__float2uint_rn(estimate(key, key_of(cluster), n) * unit)), n};
    };
    int2 sum{0, 0}, total;
    for (int i = from; i < upto; ++i) {
      const int2 w = weight(i);
      sum.x += w.x, sum.y += w.y;
    }
    sum = block_scan(sum, s.sums, total);
    for (int i = from; i < upto; ++i) {
      const int2 w = weight(i), with{sum.x + w.x, sum.y + w.y};
      const auto reached = [&](int2 x) { return (a.p < 1 && static_cast<uint32_t>(x.x) >= want) || x.y >= want_rows; };
      if (!reached(sum) && reached(with)) {
        Decision& to = s.decision[1];
        to.n_taken = i + 1, to.want = 0,
        to.share = share_of(to.weighs, fminf(static_cast<float>(static_cast<uint32_t>(with.x)) * 0x1p-31f, 1));
      }
      sum = with;
    }
    __syncthreads();
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
    const auto [n_taken, share, want, weighs, want_rows] = s.decision[1];
    const float rest = s.rest;
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
    const int n_exact = deal();
    const int want_rows = static_cast<int>(ceil(static_cast<double>(a.budget) * (e.end_page - e.first_page) * kPage));
    int from = 0, upto = a.p < 1 && n_block == 1 ? kFew : kExact, which;  // most heads are content with few: the others come if need be
#pragma unroll 1
    for (;;) {
      const int end = s.first_part[min(upto, n_exact)];
      count(q, from, end, block, n_block, first_block, from == 0);
      if (n_block > 1) cluster_arrive_block(), cluster_wait_block();
      else __syncthreads();
      if (block > 0) return;
      put_in_order(min(upto, n_exact));
      if (warp == 0 && from == 0) decide(n_exact, true, n_block, want_rows);
      if (warp == 1 && upto == kExact) decide(n_exact, false, n_block, want_rows);
      __syncthreads();
      which = s.decision[0].n_taken < 0;
      if (which == 0 || upto == kExact) break;
      from = end, upto = kExact;
    }
    const Decision& decision = s.decision[which];
    const auto goes_on = [&] { return decision.want > 0 && decision.want_rows > 0; };
    if (goes_on()) go_on();
    const int n_taken = decision.n_taken, n_counted = which == 0 ? min(n_exact, kFew) : n_exact;
    float share = decision.share;
    if (goes_on()) share = extend(*this);
    for (int i = tid; i < n_taken; i += kThreads) this->mark(i < kExact ? s.counted[which][i].cluster : number_of(s.order[i]));
    if (a.tail && tid >= n_taken && tid < n_counted) {  // known better than estimated
      const Counted& x = s.counted[which][tid];
      a.tail_of(a.place(this->entry), this->kv_head, head)[x.cluster] = x.log_mass * kLn2;
    }
    if (tid == 0) this->put_share(head, share);
  }
};

}  // namespace prt::cuda::selecting
