#include "attention/choice.h"
#include "cpu/attend.h"
#include "cpu/softmax.h"
#include "ops/cpu_table.h"

namespace prt::PRT_ISA {

namespace {

// Floats in the order of these integers; NaN is above all.
PRT_INLINE uint32_t key_of(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

// Where a descending order is cut, without sorting it: what is above `key` is taken, and of what equals it the first `ties`.
struct Cut {
  uint32_t key;
  int64_t ties;
};

// The shortest prefix of x[begin..end) in descending order whose weights reach `target`: three passes of 11, 11 and 10 bits, each over a
// histogram of weights. Ties in ascending order of the index. Everything, if the weights do not reach it.
template <class F>
PRT_INLINE Cut find_cut(const float* x, int64_t begin, int64_t end, double target, F&& weight) {
  uint32_t found = 0, mask = 0;
  double left = target, sums[2048];
  constexpr int kShifts[] = {21, 10, 0};
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = kShifts[pass];
    const uint32_t n_bin = shift == 0 ? 1024 : 2048;
    for (uint32_t b = 0; b < n_bin; ++b) sums[b] = 0;
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t key = key_of(x[i]);
      if ((key & mask) == found) sums[(key >> shift) & (n_bin - 1)] += weight(i);
    }
    uint32_t bin = n_bin - 1;
    while (bin > 0 && sums[bin] < left) left -= sums[bin--];
    found |= bin << shift;
    mask |= (n_bin - 1) << shift;
  }
  Cut cut{found, 0};
  for (int64_t i = begin; i < end && left > 0; ++i)
    if (key_of(x[i]) == found) {
      left -= weight(i);
      ++cut.ties;
    }
  return cut;
}

template <class F>
PRT_INLINE void take(const float* x, int64_t begin, int64_t end, Cut cut, F&& chosen) {
  for (int64_t i = begin; i < end; ++i) {
    const uint32_t key = key_of(x[i]);
    if (key > cut.key || (key == cut.key && cut.ties-- > 0)) chosen(i);
  }
}

// One entry and kv head. worth and chosen have room for a number per unit.
struct Choice {
  const TopRows& a;
  int64_t entry, kv_head, place, kv_len, begin, end, first, n;  // rows [begin, end) and units [first, n) can be chosen
  float *worth, *chosen;
  PRT_INLINE Choice of(const TopRows& a, int64_t entry, int64_t kv_head) {
    const int64_t h_kv = a.ranges.shape[1], room = a.scores.data ? a.scores.shape[2] : 0;
    Choice x{a,
             entry,
             kv_head,
             a.state.data ? static_cast<const int32_t*>(a.state.data)[entry] : entry,
             static_cast<const int32_t*>(a.kv_len.data)[entry],
             0,
             0,
             0,
             0,
             nullptr,
             nullptr};
    x.end = window_begin(x.kv_len, a.sinks, a.window, a.unit);
    x.begin = min64(a.sinks, x.end);
    x.first = x.begin / a.unit;
    x.n = (x.end + a.unit - 1) / a.unit;
    x.worth = static_cast<float*>(a.scratch.data) + (entry * h_kv + kv_head) * 2 * room;
    x.chosen = x.worth + room;
    return x;
  }
};

PRT_INLINE const float* scores_of(const Choice& x, int64_t head) { return x.a.scores.row<float>(x.entry) + head * x.a.scores.shape[2]; }
PRT_INLINE float total_of(const Choice& x, int64_t head) { return x.a.log_total.row<float>(x.entry)[head]; }

PRT_INLINE void vote(const Choice& x) {
  const int64_t h_kv = x.a.ranges.shape[1], group = x.a.h_q / h_kv, n = x.n, padded = round_up(n, kWidth);
  const bool all = x.a.vote == Vote::layer;
  const int64_t from = all ? 0 : x.kv_head * group, to = x.a.vote == Vote::first ? from + 1 : all ? x.a.h_q : from + group;
  float part[kWidth];
  for (int64_t i = 0; i < padded; i += kWidth) {
    vf worth = splat(x.a.vote == Vote::max ? -__builtin_inff() : 0);
    const int64_t m = min64(kWidth, n - i);
    for (int64_t h = from; h < to; ++h) {
      const float* s = scores_of(x, h) + i;
      for (int64_t j = 0; j < kWidth; ++j) part[j] = j < m ? s[j] : 0;
      const vf score = load(part);
      if (x.a.vote == Vote::first) worth = score;
      else if (x.a.vote == Vote::max) worth = max(worth, score - total_of(x, h));
      else worth += exp(score - total_of(x, h));
    }
    store(part, worth);
    for (int64_t j = 0; j < m; ++j) x.worth[i + j] = part[j];
  }
  if (x.a.pool <= 1) return;
  const int64_t half = x.a.pool / 2;  // `chosen` is free until now
  for (int64_t i = x.first; i < n; ++i) {
    float best = x.worth[i];
    for (int64_t j = max64(0, i - half); j < min64(n, i + half + 1); ++j) best = x.worth[j] > best ? x.worth[j] : best;
    x.chosen[i] = best;
  }
  for (int64_t i = x.first; i < n; ++i) x.worth[i] = x.chosen[i];
}

PRT_INLINE void choose(const Choice& x) {
  const TopRows& a = x.a;
  const auto mark = [&](int64_t i) { x.chosen[i] = 1; };
  if (a.p > 0) {
    const int64_t group = a.h_q / a.ranges.shape[1];
    for (int64_t i = x.first; i < x.n; ++i) x.chosen[i] = 0;
    for (int64_t h = x.kv_head * group; h < (x.kv_head + 1) * group; ++h) {
      const float* s = scores_of(x, h);
      const float total = total_of(x, h);
      const auto share = [&](int64_t i) { return static_cast<double>(exp1(s[i] - total)); };
      double target = static_cast<double>(a.p);
      if (a.p >= 1) target = 2;  // everything, whatever rounding makes of the sum
      for (int64_t i = 0; i < x.begin; ++i) target -= share(i);
      for (int64_t i = x.end; i < x.kv_len; ++i) target -= share(i);
      if (target > 0) take(s, x.first, x.n, find_cut(s, x.first, x.n, target, share), mark);
    }
    return;
  }
  vote(x);
  for (int64_t i = x.first; i < x.n; ++i) x.chosen[i] = 0;
  const int64_t k = a.fraction > 0 ? static_cast<int64_t>(a.fraction * static_cast<float>(x.kv_len) + 0.5f) : a.k;
  const int64_t n_unit = (k + a.unit - 1) / a.unit;
  if (n_unit > 0)
    take(x.worth, x.first, x.n, find_cut(x.worth, x.first, x.n, static_cast<double>(n_unit), [](int64_t) { return 1.0; }), mark);
}

// How much of the new choice the one before had, among the rows that both could choose.
PRT_INLINE void count_overlap(const Choice& x, AttentionCounters& c) {
  const TopRows& a = x.a;
  ++c.n_choice;
  if (!a.scores.data || !a.made.data) return;
  const int64_t made = static_cast<const int32_t*>(a.made.data)[x.place];
  if (made <= 0 || made >= x.kv_len) return;
  const int64_t end = min64(window_begin(made, a.sinks, a.window, a.unit), x.end);
  const int32_t n = a.n_range.row<int32_t>(x.place)[x.kv_head], *range = a.ranges.row<int32_t>(x.place) + x.kv_head * a.ranges.shape[2] * 2;
  for (int64_t row = x.begin; row < end; ++row) c.n_compared += x.chosen[row / a.unit] != 0;
  for (int32_t i = 0; i < n; ++i) {
    const int64_t first = range[2 * i], past = first + range[2 * i + 1] - (i > 0 ? range[2 * i - 1] : 0);
    for (int64_t row = max64(first, x.begin); row < min64(past, end); ++row) c.n_overlap += x.chosen[row / a.unit] != 0;
  }
}

PRT_INLINE void write_ranges(const Choice& x) {
  const TopRows& a = x.a;
  int32_t* out = a.ranges.row<int32_t>(x.place) + x.kv_head * a.ranges.shape[2] * 2;
  int64_t n = 0, end = -1, total = 0;
  const auto put = [&](int64_t first, int64_t past) {
    if (past <= first) return;
    if (first != end) out[2 * n++] = static_cast<int32_t>(first);
    end = past;
    total += past - first;
    out[2 * n - 1] = static_cast<int32_t>(total);
  };
  put(0, x.begin);
  if (a.scores.data)
    for (int64_t i = x.first; i < x.n; ++i)
      if (x.chosen[i] != 0) put(max64(i * a.unit, x.begin), min64((i + 1) * a.unit, x.end));
  put(x.end, x.kv_len);
  a.n_range.row<int32_t>(x.place)[x.kv_head] = static_cast<int32_t>(n);
}

}  // namespace

void top_rows(ThreadPool& pool, const TopRows& a) {
  const int64_t n_entry = a.kv_len.shape[0], h_kv = a.ranges.shape[1];
  pool.parallel_for(n_entry * h_kv, [&](int64_t item, int32_t) {
    const Choice x = Choice::of(a, item / h_kv, item % h_kv);
    if (x.place >= 0 && a.scores.data) choose(x);
  });
  for (int64_t item = 0; item < n_entry * h_kv; ++item) {
    const Choice x = Choice::of(a, item / h_kv, item % h_kv);
    if (x.place < 0) continue;
    if (a.counters.data) count_overlap(x, static_cast<AttentionCounters*>(a.counters.data)[x.kv_head]);
    write_ranges(x);
    if (a.made.data && x.kv_head == h_kv - 1) static_cast<int32_t*>(a.made.data)[x.place] = static_cast<int32_t>(x.kv_len);
  }
}

}  // namespace prt::PRT_ISA
