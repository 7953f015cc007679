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
  using Base::a, Base::e, Base::s, Base::tid, Base::warp, Base::lane;
  enum class Weight { one, rows, estimate };
  const int32_t* keys;  // of the query head; behind the end kEmpty

  __device__ Moment(const SelectArgs& args, uint4* shared) : Base(args, shared) {}

  // f(j, keys of clusters j .. j + 3), of all that there are.
  template <class F>
  __device__ void each_keys(F&& f) const {
#pragma unroll 1
    for (int j = 4 * tid; j < e.n_cluster; j += 4 * kThreads) f(j, *reinterpret_cast<const int4*>(keys + j));
  }
  template <class F>
  __device__ void each_key(F&& f) const {  // f(j, key) of clusters that have rows
    each_keys([&](int j, int4 k) {
      if (k.x != kEmpty) f(j, k.x);
      if (k.y != kEmpty) f(j + 1, k.y);
      if (k.z != kEmpty) f(j + 2, k.z);
      if (k.w != kEmpty) f(j + 3, k.w);
    });
  }

  // ---- rank
  __device__ void rank_clusters(int head) {
    keys = this->keys_of(head);
    int nearest = kEmpty;
#pragma unroll 4
    for (int j = 4 * tid; j < e.n_cluster; j += 4 * kThreads) {
      const int4 k = *reinterpret_cast<const int4*>(keys + j);
      nearest = max(max(max(nearest, k.x), max(k.y, k.z)), k.w);
      if (this->in_shared) *reinterpret_cast<int4*>(this->key + j) = k;
    }
    if (this->in_shared) keys = this->key;
    const int most = __reduce_max_sync(kWarp, nearest);
    if (lane == 0) s.top[warp] = most;
    if (tid == 0) s.n_list = 0;
    int least = kEmpty + 1, high = kEmpty;
    if (e.n_cluster > kList) {  // Where kExact + 1 threads have a cluster there are as many clusters, and seldom many more.
      __syncthreads();
#pragma unroll
      for (int w = 0; w < kWarps; ++w) high = max(high, s.top[w]);
      const auto below = [&](uint32_t far) {
        return static_cast<int>(max(static_cast<int64_t>(high) - static_cast<int64_t>(far), int64_t{kEmpty + 1}));
      };
      uint32_t near = 0, far = 1 << 18;  // 4 in log2
      int n = __syncthreads_count(nearest >= below(far));
#pragma unroll 1
      while (n <= kExact && far < 1u << 31) {
        near = far, far *= 2;
        n = __syncthreads_count(nearest >= below(far));
      }
      if (n <= kExact) far = UINT_MAX;
#pragma unroll 1
      while (n > kExact + 32 && far - near > 1) {
        const uint32_t middle = near + (far - near) / 2;
        const int m = __syncthreads_count(nearest >= below(middle));
        if (m > kExact) far = middle, n = m;
        else near = middle;
      }
      least = below(far);
    } else {
      __syncthreads();
    }
    const auto put = [&](int j, int k) {
      if (k < least) return;
      const int at = atomicAdd(&s.n_list, 1);
      if (at < kList) s.list[at] = order_of(k, j);
    };
    if (nearest >= least) each_key(put);
    __syncthreads();
    int n = s.n_list;
    if (n > kList) {  // many of the same rank
      __syncthreads();
      const uint64_t end = find_cut(*this, order_of(high, 0), kExact + 1, Weight::one);
      if (tid == 0) s.n_list = 0;
      __syncthreads();
      each_key([&](int j, int k) {
        if (order_of(k, j) < end) s.list[atomicAdd(&s.n_list, 1)] = order_of(k, j);
      });
      __syncthreads();
      n = s.n_list;
    }
    // The place of each: how many come before.
#pragma unroll 1
    for (int i = warp; i < n; i += kWarps) {
      const uint64_t x = s.list[i];
      uint32_t place = 0;
#pragma unroll 2
      for (int o = lane; o < n; o += 32) place += s.list[o] < x;
      place = __reduce_add_sync(kWarp, place);
      if (lane == 0 && place <= kExact) {
        const int j = number_of(x);
        s.order[place] = x, s.first[place] = this->first(j), s.rows[place] = this->rows(j);
      }
    }
    for (int i = n + tid; i <= kExact; i += kThreads) s.order[i] = kAll, s.rows[i] = 0;
    __syncthreads();
  }
  __device__ int n_exact() const {
    const uint32_t low = __ballot_sync(kWarp, s.order[lane] != kAll), high = __ballot_sync(kWarp, s.order[32 + lane] != kAll);
    return __popc(low) + __popc(high);
  }

  // ---- sums of estimates behind the counted clusters, in units of the first one of these per row: none is subtracted. In a fixed order.
  __device__ float estimate(uint64_t order, int n) const {
    return static_cast<float>(n) * pow2(static_cast<float>(key_of(order) - key_of(s.order[kExact])) * 0x1p-16f);
  }
  __device__ float sum_estimates(uint64_t end) const {
    const uint64_t from = s.order[kExact];
    if (from == kAll) return 0;
    float sum = 0;
    each_key([&](int j, int k) {
      const uint64_t x = order_of(k, j);
      if (x >= from && x < end) sum += estimate(x, this->rows(j));
    });
    sum = block_sum(sum, s.sum);
    __syncthreads();
    return sum;
  }

  // ---- count. Deals the rows of clusters `from` and up out as parts of kPartRows, or of twice as many until there is room. By one warp.
  __device__ void deal(int from, bool few, int want_rows) const {
    int n[2] = {s.rows[2 * lane], s.rows[2 * lane + 1]}, upto = n_exact();
    if (a.fraction > 0) {  // as far as rows are wanted
      const int before = scan_warp(n[0] + n[1]) - n[0] - n[1];
      upto = __popc(__ballot_sync(kWarp, n[0] > 0 && before < want_rows)) + __popc(__ballot_sync(kWarp, n[1] > 0 && before + n[0] < want_rows));
    } else if (few) {
      upto = min(upto, 16);
    }
    const int base = from > 0 ? s.part_of[from] : 0;
    int mine, size = kPartRows;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (2 * lane + i < from || 2 * lane + i >= upto) n[i] = 0;
    for (;; size *= 2) {
      mine = (n[0] + size - 1) / size + (n[1] + size - 1) / size;
      if (warp_sum(mine) <= kParts / 2) break;
    }
    int at = base + scan_warp(mine) - mine;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int cluster = 2 * lane + i, row = s.first[cluster];
      if (cluster >= from) s.part_of[cluster] = at;
#pragma unroll 1
      for (int r = 0; r < n[i]; r += size) s.part[at++] = {row + r, min(size, n[i] - r)};
    }
    if (lane == 31) s.part_of[kExact] = at, s.n_part = at, s.upto = upto;
  }
  // This block's share of the parts; sums go to the block `to`.
  __device__ void count(const RowScorer<T, D>& q, int from, int block, int n_block, int to) const {
    const int n_part = s.n_part, base = from > 0 ? s.part_of[from] : 0;
    float2* mass = in_block(s.mass, to);
#pragma unroll 1
    for (int i = base + 2 * (block + warp * n_block); i < n_part; i += 2 * kWarps * n_block) {
      const int2 x = s.part[i], y = i + 1 < n_part ? s.part[i + 1] : int2{x.x, 0};
      Mass m[2];
#pragma unroll 1
      for (int r = lane / 4; r - lane / 4 < max(x.y, y.y); r += kPartRows) {
        float score[2];
        q.score(this->key_row(x.x + min(r, x.y - 1)), this->key_row(y.x + min(r, max(y.y - 1, 0))), score[0], score[1]);
        if (r < x.y) m[0].add({score[0] * (a.scale * kLog2e), 1});
        if (r < y.y) m[1].add({score[1] * (a.scale * kLog2e), 1});
      }
      m[0] = warp_mass<4>(m[0]), m[1] = warp_mass<4>(m[1]);
      if (lane == 0) mass[i] = {m[0].top, m[0].total};
      if (lane == 1 && i + 1 < n_part) mass[i + 1] = {m[1].top, m[1].total};
    }
  }

  // ---- decide, by one warp; each lane has two of the counted clusters. Those up to s.upto have been counted. `rest`: sum_estimates().
  // s.n_taken = -1: more have to be counted.
  __device__ void decide(float rest, int want_rows) const {
    const int m = n_exact(), upto = s.upto;
    Mass exact[2], behind{static_cast<float>(key_of(s.order[kExact])) * 0x1p-16f, rest};
    float top = s.open.x, most = rest > 0 ? behind.top : kNegInf, guess[2];
    int n_row[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = 2 * lane + i;
      n_row[i] = at < m ? s.rows[at] : 0;
      guess[i] = at < m ? static_cast<float>(key_of(s.order[at])) * 0x1p-16f + __log2f(static_cast<float>(n_row[i])) : kNegInf;
      if (at < upto)
        for (int part = s.part_of[at]; part < s.part_of[at + 1]; ++part) exact[i].add({s.mass[part].x, s.mass[part].y});
      top = fmaxf(top, exact[i].top), most = fmaxf(most, guess[i]);
    }
    top = warp_max(top), most = warp_max(most);
    const float mass[2] = {exact[0].under(top), exact[1].under(top)};
    const float estimate[2] = {guess[0] > kNegInf ? pow2(guess[0] - most) : 0, guess[1] > kNegInf ? pow2(guess[1] - most) : 0};
    float taken = mass[0] + mass[1], left = estimate[0] + estimate[1];
    int rows = n_row[0] + n_row[1];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float x = __shfl_up_sync(kWarp, taken, step), y = __shfl_down_sync(kWarp, left, step);
      const int n = __shfl_up_sync(kWarp, rows, step);
      if (lane >= step) taken += x, rows += n;
      if (lane + step < 32) left += y;
    }
    const float counted = __shfl_sync(kWarp, taken, 31), estimated = __shfl_sync(kWarp, left, 0);
    const int n_rows = __shfl_sync(kWarp, rows, 31);
    float before = __shfl_up_sync(kWarp, taken, 1), after = __shfl_down_sync(kWarp, left, 1);
    int before_rows = __shfl_up_sync(kWarp, rows, 1);
    if (lane == 0) before = 0, before_rows = 0;
    if (lane == 31) after = 0;
    const float outside = s.open.y > 0 ? s.open.y * pow2(s.open.x - top) : 0, behind_all = behind.under(most);
    // log2 of what is left over what is taken, if it ends before a lane's first, or its second
    const auto odds = [&](float rest_of, float taken_of) { return rest_of > 0 ? most + __log2f(rest_of) - top - __log2f(taken_of) : kNegInf; };
    const float against[2] = {odds(left + behind_all, outside + before), odds(estimate[1] + after + behind_all, outside + before + mass[0])};
    const auto enough = [&](int i) {
      if (2 * lane + i > min(m, upto) || 2 * lane + i == kExact) return false;
      if (a.fraction > 0) return (i == 0 ? before_rows : before_rows + n_row[0]) >= want_rows || 2 * lane + i == m;
      return -against[i] >= a.log_odds;
    };
    const uint32_t stop0 = __ballot_sync(kWarp, enough(0)), stop1 = __ballot_sync(kWarp, enough(1));
    const int n = min(stop0 ? 2 * (__ffs(static_cast<int>(stop0)) - 1) : INT_MAX, stop1 ? 2 * (__ffs(static_cast<int>(stop1)) - 1) + 1 : INT_MAX);
    if (n < INT_MAX) {
      if (lane == n / 2) s.n_taken = n, s.want = 0, s.share = 1 / (1 + pow2(against[n % 2]));
      return;
    }
    if (lane != 0) return;
    if (upto < m) {
      s.n_taken = -1;
      return;
    }
    // All are taken; what comes behind is worth what these were, compared with their estimates.
    s.n_taken = kExact;
    const float worth = top + __log2f(counted) - most - __log2f(estimated);
    s.weighs = behind_all > 0 ? odds(behind_all, outside + counted) + worth : kNegInf;
    s.share = 1 / (1 + pow2(s.weighs));
    s.want = a.fraction > 0 ? fmaxf(static_cast<float>(want_rows - n_rows), 0) : -s.weighs >= a.log_odds ? 0 : a.p - (1 - a.p) * pow2(-s.weighs);
  }

  // ---- the shortest stretch of the ranking from `from` on whose weights reach `want`: -> its end, or kAll
  __device__ uint32_t weight(int j, uint64_t order, Weight kind, float unit) const {
    if (kind == Weight::one) return 1;
    const int n = this->rows(j);
    return kind == Weight::rows ? static_cast<uint32_t>(n) : __float2uint_rn(estimate(order, n) * unit);
  }
  __device__ static __noinline__ uint64_t find_cut(Moment x, uint64_t from, uint64_t want, Weight kind, float unit = 1) {
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
        if (o >= from && o < until) atomicAdd(s.histogram + min((o - from) >> shift, uint64_t{kBins - 1}), x.weight(j, o, kind, unit));
      });
      __syncthreads();
      constexpr int kEach = kBins / kThreads;
      const uint4 mine = reinterpret_cast<const uint4*>(s.histogram)[tid];
      static_assert(kEach == 4);
      uint64_t total, before = base + block_scan(uint64_t{mine.x} + mine.y + mine.z + mine.w, s.scan, total);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const uint32_t w = i == 0 ? mine.x : i == 1 ? mine.y : i == 2 ? mine.z : mine.w;
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
        if (o < from || o >= until) return;
        const int at = atomicAdd(&s.n_list, 1);
        if (at < kList) s.list[at] = o, s.weight[at] = x.weight(j, o, kind, unit);
      });
      __syncthreads();
      const int n = s.n_list;
      if (n > kList) {
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
  // Goes on behind the counted clusters. -> the end of the choice
  __device__ uint64_t extend(float rest, float& share) const {
    const uint64_t from = s.order[kExact];
    const float want = s.want, weighs = s.weighs;
    // Weights are rows, or shares of the rest in 2^-31.
    const uint64_t end = a.fraction > 0 ? find_cut(*this, from, static_cast<uint64_t>(want), Weight::rows)
                                        : find_cut(*this, from, static_cast<uint64_t>(ceilf(want * 0x1p31f)), Weight::estimate, 0x1p31f / rest);
    const float more = fminf(sum_estimates(end) / rest, 1);
    share = weighs < 0 ? (1 + pow2(weighs) * more) / (1 + pow2(weighs)) : (pow2(-weighs) + more) / (pow2(-weighs) + 1);
    return end;
  }
  __device__ void mark_before(uint64_t end) const {
    uint32_t* to = in_block(this->chosen, 0);
    each_keys([&](int j, int4 k) {
      const auto is = [&](int key, int i) { return key != kEmpty && order_of(key, j + i) < end ? 1u << (j + i) % 32 : 0u; };
      const uint32_t bits = is(k.x, 0) | is(k.y, 1) | is(k.z, 2) | is(k.w, 3);
      if (bits != 0) atomicOr(to + j / 32, bits);
    });
  }

  // One query head, with `n_block` blocks of which this is `block`; the first one decides.
  __device__ void choose(int head, int block, int n_block) {
    const int first_block = this->rank - block;
    const RowScorer<T, D> q(a.template query<T>(this->entry, this->kv_head, head), a.d);
    if (warp == kWarps - 1) {
      const Mass open = this->open_mass(head);
      if (lane == 0) s.open = {open.top, open.total};
    }
    rank_clusters(head);
    const int want_rows = static_cast<int>(ceil(static_cast<double>(a.fraction) * (e.end_page - e.first_page) * kPage));
    float rest = 0;
#pragma unroll 1
    for (int from = 0;;) {
      if (warp == 0) deal(from, n_block == 1 && from == 0, want_rows);
      __syncthreads();
      count(q, from, block, n_block, first_block);
      if (from == 0) rest = sum_estimates(kAll);
      if (n_block > 1) cluster_arrive_block(), cluster_wait_block();
      else __syncthreads();
      if (block > 0) return;
      if (warp == 0) decide(rest, want_rows);
      __syncthreads();
      if (s.n_taken >= 0) break;
      from = s.upto;
    }
    const int n = s.n_taken;
    float share = s.share;
    if (s.want > 0) mark_before(extend(rest, share));
    else if (tid < n) this->mark(number_of(s.order[tid]));
    if (tid == 0) this->put_share(head, share);
  }
};

}  // namespace prt::cuda::selecting
