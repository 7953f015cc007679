#include "attention/mass_cpu.h"
#include "ops/cpu_table.h"

namespace prt::PRT_ISA {

namespace {

// One query head of one entry, and its part of the scratch: one number for each cluster in each array.
struct Query {
  const Select& a;
  int64_t entry, head, kv_head, d, n_slot, first_page, n_cluster;
  const float* q;
  // Estimated log of the cluster's mass; the same as it goes to the tail; what clusters are sorted by.
  float *log_mass, *rest, *rank;
  int32_t *order, *chosen;
  PRT_INLINE Query of(const Select& a, int64_t entry, int64_t head) {
    const int64_t d = a.k_pages.shape[3], h_q = a.q.shape[1] / d, n_slot = a.index.centroid.shape[2];
    const int32_t* closed = a.closed.row<int32_t>(entry);
    const int64_t room = a.page_table.shape[1] * n_slot;
    float* base = static_cast<float*>(a.scratch.data) + (entry * h_q + head) * 5 * room;
    return {a,
            entry,
            head,
            head / (h_q / a.k_pages.shape[1]),
            d,
            n_slot,
            closed[0],
            (closed[1] - closed[0]) * n_slot,
            a.q.row<float>(entry) + head * d,
            base,
            base + room,
            base + 2 * room,
            reinterpret_cast<int32_t*>(base + 3 * room),
            reinterpret_cast<int32_t*>(base + 4 * room)};
  }
};

PRT_INLINE int64_t slot_of(const Query& x, int64_t j) {  // cluster j of the entry, in the arrays of the index
  const int64_t page = x.a.page_table.row<int32_t>(x.entry)[x.first_page + j / x.n_slot];
  return (page * x.a.k_pages.shape[1] + x.kv_head) * x.n_slot + j % x.n_slot;
}
PRT_INLINE RowRange rows_of(const Query& x, int64_t j) {
  const int32_t* range = static_cast<const int32_t*>(x.a.index.range.data) + slot_of(x, j) * 2;
  return {range[0] + (x.first_page + j / x.n_slot) * kPageTokens, range[1]};
}

PRT_INLINE HeadKeys keys_of(const Query& x) { return {x.a.k_pages, x.a.page_table.row<int32_t>(x.entry), x.kv_head, x.d, x.q, x.a.scale}; }

// The rows in no closed segment.
template <class W>
PRT_INLINE Mass open_mass(const Query& x) {
  const int32_t len = static_cast<const int32_t*>(x.a.kv_len.data)[x.entry], *closed = x.a.closed.row<int32_t>(x.entry);
  Mass mass;
  add_rows<W>(keys_of(x), {0, closed[0] * kPageTokens}, mass);
  add_rows<W>(keys_of(x), {closed[1] * kPageTokens, len - closed[1] * kPageTokens}, mass);
  return mass;
}

// The logarithm of a number of rows; most are small.
struct LogTable {
  float small[kPageTokens];
  PRT_INLINE float log1(int64_t n) { return static_cast<float>(__builtin_log(static_cast<double>(n))); }
  PRT_INLINE void fill(LogTable& t) {
    for (int64_t n = 1; n < kPageTokens; ++n) t.small[n] = log1(n);
  }
  PRT_INLINE float at(const LogTable& t, int64_t n) { return n < kPageTokens ? t.small[n] : log1(n); }
};

// What the spread of n scores adds to the logarithm of their mean weight: half their variance, the lognormal's mean, as long as n of them
// can have it. Past log n the largest of n is less than that mean, and is the sum: sparse.h.
PRT_INLINE float spread_gain(float half_variance, float log_n) {
  return half_variance > log_n ? 2 * __builtin_sqrtf(half_variance * log_n) - log_n : half_variance;
}

// log_mass and rank of every cluster. -> the largest log_mass
PRT_INLINE float score_clusters(const Query& x, const LogTable& logs) {
  const bool moment = x.a.estimator == Estimator::moment;
  const float half_square = 0.5f * x.a.scale * x.a.scale;
  float top = -__builtin_inff(), square[kMaxHead], mean[kPageTokens], wide[kPageTokens] = {};
  for (int64_t i = 0; i < x.d; ++i) square[i] = x.q[i] * x.q[i];
  for (int64_t j = 0; j < x.n_cluster; j += x.n_slot) {  // a page at a time
    const int64_t at = slot_of(x, j);
    const uint8_t *c = static_cast<const uint8_t*>(x.a.index.centroid.data) + at * x.d,
                  *v = static_cast<const uint8_t*>(x.a.index.variance.data) + at * x.d;
    const int32_t* range = static_cast<const int32_t*>(x.a.index.range.data) + at * 2;
    int64_t s = 0;
    for (; s + 4 <= x.n_slot; s += 4) {
      dot_tile<DotF32<F8>, 1, 4>(x.q, 0, c + s * x.d, x.d, x.d, mean + s);
      if (moment) dot_tile<DotF32<F8>, 1, 4>(square, 0, v + s * x.d, x.d, x.d, wide + s);
    }
    for (; s < x.n_slot; ++s) {
      dot_tile<DotF32<F8>, 1, 1>(x.q, 0, c + s * x.d, x.d, x.d, mean + s);
      if (moment) dot_tile<DotF32<F8>, 1, 1>(square, 0, v + s * x.d, x.d, x.d, wide + s);
    }
    for (s = 0; s < x.n_slot; ++s) {
      const int64_t n = range[2 * s + 1];
      const float log_n = n > 0 ? LogTable::at(logs, n) : -__builtin_inff(), m = mean[s] * x.a.scale;
      const float spread = spread_gain(wide[s] * half_square, n > 0 ? log_n : 0);
      x.rank[j + s] = m + spread;  // per row: by mass, large clusters of little worth would come first
      x.rest[j + s] = m + kTailSpread * spread + log_n;
      x.log_mass[j + s] = x.rank[j + s] + log_n;
      if (n == 0) x.rank[j + s] = -__builtin_inff();
      x.order[j + s] = static_cast<int32_t>(j + s);
      x.chosen[j + s] = 0;
      top = top > x.log_mass[j + s] ? top : x.log_mass[j + s];
    }
  }
  return top;
}

// A heap with the highest rank in order[0]; the lower number wins ties.
PRT_INLINE bool before(const Query& x, int32_t a, int32_t b) { return x.rank[a] > x.rank[b] || (x.rank[a] == x.rank[b] && a < b); }
PRT_INLINE void sift(const Query& x, int64_t at, int64_t n) {
  for (int64_t child; (child = 2 * at + 1) < n; at = child) {
    if (child + 1 < n && before(x, x.order[child + 1], x.order[child])) ++child;
    if (!before(x, x.order[child], x.order[at])) return;
    const int32_t other = x.order[at];
    x.order[at] = x.order[child];
    x.order[child] = other;
  }
}
PRT_INLINE void make_heap(const Query& x) {
  for (int64_t i = x.n_cluster / 2; i-- > 0;) sift(x, i, x.n_cluster);
}
// Takes the highest of the n that are left; it moves to order[n - 1].
PRT_INLINE int64_t pop(const Query& x, int64_t n) {
  const int32_t first = x.order[0];
  x.order[0] = x.order[n - 1];
  x.order[n - 1] = first;
  sift(x, 0, n - 1);
  return first;
}

// The cut is at the share p of the mass, or at the share `budget` of the clustered rows, whichever comes first.
struct Cut {
  double p, n_row;
  int64_t least;  // clusters, for the mass
  PRT_INLINE Cut of(const Query& x) {
    const float p = x.a.estimator == Estimator::moment ? aimed_share(x.a.p) : x.a.p;
    return {static_cast<double>(p), static_cast<double>(x.a.budget) * static_cast<double>(x.n_cluster / x.n_slot * kPageTokens),
            least_clusters(x.a.p)};
  }
  PRT_INLINE bool reached(const Cut& c, double mass, double all, double rows) { return rows >= c.n_row || (c.p < 1 && mass >= c.p * all); }
};

// A cluster whose mass has been computed.
struct Counted {
  int64_t cluster;
  double n, mass;
};
PRT_INLINE bool worth_more(const Counted& a, const Counted& b) {  // per row; no two are equal in place, so that the order is one
  return a.mass * b.n > b.mass * a.n || (a.mass * b.n == b.mass * a.n && a.cluster < b.cluster);
}
struct Candidates {
  Counted by_worth[kExactClusters];
  int64_t n = 0;
  double exact = 0, estimated = 0;  // their sums
  double rest = 0;  // the estimates of the others
  bool all = false;  // there are no others, or only empty ones
};
// Counts the next of the ranking until there are n.
template <class W>
PRT_INLINE void count_clusters(const Query& x, float top, int64_t n, Candidates& c) {
  while (c.n < n && !c.all) {
    const int64_t j = pop(x, x.n_cluster - c.n);
    const RowRange here = rows_of(x, j);
    c.all = here.n == 0;
    if (c.all) break;
    Mass mass;
    add_rows<W>(keys_of(x), here, mass);
    const Counted counted{j, static_cast<double>(here.n), Mass::under(mass, top)};
    const auto estimate = static_cast<double>(exp1(x.log_mass[j] - top));
    c.rest = c.rest > estimate ? c.rest - estimate : 0;
    c.exact += counted.mass;
    c.estimated += estimate;
    int64_t at = c.n++;
    for (; at > 0 && worth_more(counted, c.by_worth[at - 1]); --at) c.by_worth[at] = c.by_worth[at - 1];
    c.by_worth[at] = counted;
    c.all = c.n == x.n_cluster;
  }
}
// All that are counted are taken, and others by their estimates, times what the counted ones were worth compared with theirs.
PRT_INLINE float take_more(const Query& x, const Cut& cut, float top, double worth, double taken, const Candidates& c) {
  double rest = c.rest, rows = 0;
  for (int64_t i = 0; i < c.n; ++i) {
    x.chosen[c.by_worth[i].cluster] = 1;
    rows += c.by_worth[i].n;
  }
  for (int64_t i = c.n; i < x.n_cluster && !Cut::reached(cut, taken, taken + worth * rest, rows); ++i) {
    const int64_t j = pop(x, x.n_cluster - i);
    const RowRange here = rows_of(x, j);
    if (here.n == 0) break;
    const auto mass = static_cast<double>(exp1(x.log_mass[j] - top));
    rest = rest > mass ? rest - mass : 0;
    rows += static_cast<double>(here.n);
    taken += worth * mass;
    x.chosen[j] = 1;
  }
  return share(taken, taken + worth * rest);
}

// The clusters with the highest estimates per row are counted, kFewClusters of them and, if these are not enough, kExactClusters; what they
// are then worth decides which of them are taken, the others' estimates what there is besides. What is counted and not taken has its exact
// mass in the tail.
template <class W>
PRT_INLINE float choose_by_moment(const Query& x, const Mass& open, float top) {
  const Cut cut = Cut::of(x);
  const double outside = Mass::under(open, top);
  Candidates c;
  // In double: one cluster can be over-estimated by 17 nats and more, and what is left once it is taken must not be its rounding error.
  for (int64_t j = 0; j < x.n_cluster; ++j) c.rest += static_cast<double>(exp1(x.log_mass[j] - top));
  c.all = x.n_cluster == 0;
  make_heap(x);
  for (int64_t stage = kFewClusters;; stage = kExactClusters) {
    count_clusters<W>(x, top, stage, c);
    const double worth = c.n == kExactClusters && c.estimated > 0 ? c.exact / c.estimated : 1;
    const double total = outside + c.exact + (c.all ? 0 : worth * c.rest);
    double taken = outside, rows = 0;
    int64_t n = 0;
    const auto enough = [&] { return Cut::reached(cut, n < cut.least ? -1 : taken, total, rows); };
    while (n < c.n && !enough()) {
      taken += c.by_worth[n].mass;
      rows += c.by_worth[n].n;
      ++n;
    }
    if (n == c.n && !c.all && !enough()) {
      if (stage < kExactClusters) continue;
      return take_more(x, cut, top, worth, taken, c);
    }
    for (int64_t i = 0; i < n; ++i) x.chosen[c.by_worth[i].cluster] = 1;
    for (int64_t i = n; i < c.n; ++i) x.rest[c.by_worth[i].cluster] = static_cast<float>(__builtin_log(c.by_worth[i].mass)) + top;
    return share(taken, total);
  }
}

// The published curve (Tactic, section 4.2). Positions count rows of closed segments, sorted by their cluster's rank.
constexpr double kFirst = 0.1, kSecond = 0.6;  // where the curve is sampled
constexpr double kSample = 0.01;  // share of the rows in a sample
constexpr double kHead = 0.02;  // share of the rows in front whose mass is computed

template <class W>
PRT_INLINE float choose_by_fit(const Query& x, const Mass& open, float top) {
  make_heap(x);
  for (int64_t n = x.n_cluster; n > 0; --n) pop(x, n);  // now sorted, the highest rank last
  const auto cluster_at = [&](int64_t i) { return static_cast<int64_t>(x.order[x.n_cluster - 1 - i]); };
  double n_row = 0, sampled[2] = {0, 0}, n_sampled[2] = {0, 0};
  for (int64_t j = 0; j < x.n_cluster; ++j) n_row += static_cast<double>(rows_of(x, j).n);
  const double where[2] = {kFirst * n_row, kSecond * n_row}, half = kSample * n_row / 2;
  const auto exact = [&](int64_t j) {
    Mass mass;
    add_rows<W>(keys_of(x), rows_of(x, j), mass);
    return Mass::under(mass, top);
  };
  double at = 0;
  for (int64_t i = 0; i < x.n_cluster; ++i) {
    const int64_t j = cluster_at(i);
    const auto n = static_cast<double>(rows_of(x, j).n);
    for (int s = 0; s < 2; ++s)
      if (n > 0 && at < where[s] + half && at + n > where[s] - half) {
        sampled[s] += exact(j);
        n_sampled[s] += n;
      }
    at += n;
  }
  const double m1 = n_sampled[0] > 0 ? sampled[0] / n_sampled[0] : 0, m2 = n_sampled[1] > 0 ? sampled[1] / n_sampled[1] : 0;
  const double slope = n_row > 0 ? (m1 - m2) / (1 / where[0] - 1 / where[1]) : 0, level = n_row > 0 ? m1 - slope / where[0] : 0;
  // a / x + b between two positions
  const auto curve = [&](double x0, double x1) {
    const double area = slope * __builtin_log(x1 / x0) + level * (x1 - x0);
    return area > 0 ? area : 0;
  };
  const Cut cut = Cut::of(x);
  double total = Mass::under(open, top), taken = total;
  for (int pass = 0; pass < 2; ++pass) {
    at = 0;
    for (int64_t i = 0; i < x.n_cluster; ++i) {
      const int64_t j = cluster_at(i);
      const auto n = static_cast<double>(rows_of(x, j).n);
      if (n == 0) break;
      if (pass == 1 && Cut::reached(cut, taken, total, at)) break;
      const bool head = at < kHead * n_row;
      if (pass == 0 && head) x.log_mass[j] = static_cast<float>(exact(j));
      const double mass = head ? static_cast<double>(x.log_mass[j]) : curve(at, at + n);
      (pass == 0 ? total : taken) += mass;
      if (pass == 1) x.chosen[j] = 1;
      at += n;
    }
  }
  return share(taken, total);
}

// Where the entry's choice goes; -1: it is left alone.
PRT_INLINE int64_t place_of(const Select& a, int64_t entry) {
  return a.state.data ? static_cast<const int32_t*>(a.state.data)[entry] : entry;
}

// The union of the group's choices goes to the first head's `chosen`; then it is written as ranges, neighbours joined.
PRT_INLINE void write_union(const Select& a, int64_t entry, int64_t kv_head, int64_t group) {
  const int64_t place = place_of(a, entry);
  const Query x = Query::of(a, entry, kv_head * group);
  for (int64_t g = 1; g < group; ++g) {
    const int32_t* chosen = Query::of(a, entry, kv_head * group + g).chosen;
    for (int64_t j = 0; j < x.n_cluster; ++j) x.chosen[j] |= chosen[j];
  }
  int32_t* out = a.ranges.row<int32_t>(place) + kv_head * a.ranges.shape[2] * 2;
  int64_t n = 0, end = -1, total = 0;
  const auto put = [&](RowRange rows) {
    if (rows.n == 0) return;
    if (rows.first != end) out[2 * n++] = static_cast<int32_t>(rows.first);
    end = rows.first + rows.n;
    total += rows.n;
    out[2 * n - 1] = static_cast<int32_t>(total);
  };
  const int32_t len = static_cast<const int32_t*>(a.kv_len.data)[entry], *closed = a.closed.row<int32_t>(entry);
  put({0, closed[0] * kPageTokens});
  for (int64_t j = 0; j < x.n_cluster; ++j)
    if (x.chosen[j]) put(rows_of(x, j));
  put({closed[1] * kPageTokens, len - closed[1] * kPageTokens});
  a.n_range.row<int32_t>(place)[kv_head] = static_cast<int32_t>(n);
}

PRT_INLINE void count(const Select& a, int64_t entry, int64_t kv_head, int64_t group) {
  AttentionCounters& c = static_cast<AttentionCounters*>(a.counters.data)[kv_head];
  const int64_t place = place_of(a, entry);
  const int32_t *closed = a.closed.row<int32_t>(entry), n = a.n_range.row<int32_t>(place)[kv_head],
                *range = a.ranges.row<int32_t>(place) + kv_head * a.ranges.shape[2] * 2;
  const int64_t context = static_cast<const int32_t*>(a.kv_len.data)[entry], exact = context - (closed[1] - closed[0]) * kPageTokens;
  count_step(c, context, exact, n > 0 ? range[2 * n - 1] : 0);
  c.n_choice += a.made.data != nullptr;
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    ++c.n_mass;
    c.mass += in_parts(a.mass.row<float>(entry)[h], 0x1p32f);
    if (a.true_mass.data) count_true(c, a.true_mass.row<float>(entry)[h], a.p);
  }
}

}  // namespace

void select(ThreadPool& pool, const Select& a) {
  const int64_t d = a.k_pages.shape[3], h_kv = a.k_pages.shape[1], h_q = a.q.shape[1] / d, group = h_q / h_kv, n_entry = a.q.shape[0];
  LogTable logs;
  LogTable::fill(logs);
  with_weight(static_cast<int32_t>(a.k_pages.dtype), [&](auto format) {
    using W = decltype(format);
    pool.parallel_for(n_entry * h_q, [&](int64_t item, int32_t) {
      if (place_of(a, item / h_q) < 0) return;
      const Query x = Query::of(a, item / h_q, item % h_q);
      const float highest = score_clusters(x, logs);
      const Mass open = open_mass<W>(x);
      const float top = open.top > highest ? open.top : highest;
      a.mass.row<float>(x.entry)[x.head] =
          a.estimator == Estimator::moment ? choose_by_moment<W>(x, open, top) : choose_by_fit<W>(x, open, top);
    });
    pool.parallel_for(n_entry * h_kv, [&](int64_t item, int32_t) {
      const int64_t entry = item / h_kv, kv_head = item % h_kv, place = place_of(a, entry);
      if (place < 0) return;
      write_union(a, entry, kv_head, group);
      const int32_t* in_union = Query::of(a, entry, kv_head * group).chosen;
      for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
        const Query x = Query::of(a, entry, h);
        float* tail = a.tail.data ? a.tail.row<float>(place) + h * a.tail.shape[2] : nullptr;
        for (int64_t j = 0; tail && j < x.n_cluster; ++j) tail[j] = in_union[j] ? -__builtin_inff() : x.rest[j];
        if (a.true_mass.data)
          a.true_mass.row<float>(entry)[h] =
              held_share<W>(keys_of(x), static_cast<const int32_t*>(a.kv_len.data)[entry],
                            a.ranges.row<int32_t>(place) + kv_head * a.ranges.shape[2] * 2, a.n_range.row<int32_t>(place)[kv_head]);
      }
    });
  });
  for (int64_t i = 0; i < n_entry * h_kv; ++i) {
    const int64_t entry = i / h_kv, place = place_of(a, entry);
    if (place < 0) continue;
    if (a.counters.data) count(a, entry, i % h_kv, group);
    if (a.made.data) static_cast<int32_t*>(a.made.data)[place] = static_cast<const int32_t*>(a.kv_len.data)[entry];
  }
}

}  // namespace prt::PRT_ISA
