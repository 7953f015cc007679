#include "attention/sparse.h"
#include "cpu/attend.h"
#include "cpu/dot.h"
#include "ops/cpu_table.h"

namespace prt::PRT_ISA {

namespace {

// One query head of one entry, and its part of the scratch: one number for each cluster in each array.
struct Query {
  const Select& a;
  int64_t entry, head, kv_head, d, n_slot, first_page, n_cluster;
  const float* q;
  // Estimated log of the cluster's mass; the same without the variance; what clusters are sorted by.
  float *log_mass, *plain, *rank;
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
struct RowRange {
  int64_t first, n;
};
PRT_INLINE RowRange rows_of(const Query& x, int64_t j) {
  const int32_t* range = static_cast<const int32_t*>(x.a.index.range.data) + slot_of(x, j) * 2;
  return {range[0] + (x.first_page + j / x.n_slot) * kPageTokens, range[1]};
}

// sum of e^(score - top) over some keys
struct Mass {
  float top = -__builtin_inff();
  double total = 0;
  PRT_INLINE double under(const Mass& m, float top) { return m.total > 0 ? m.total * static_cast<double>(exp1(m.top - top)) : 0; }
};

template <class W>
PRT_INLINE void add_rows(const Query& x, RowRange rows, Mass& mass) {
  const int32_t* pages = x.a.page_table.row<int32_t>(x.entry);
  for (int64_t row = rows.first, end = rows.first + rows.n; row < end;) {
    const int64_t n = min64(kPageTokens - row % kPageTokens, end - row);
    const auto* k = static_cast<const typename W::T*>(x.a.k_pages.data) +
                    ((pages[row / kPageTokens] * x.a.k_pages.shape[1] + x.kv_head) * kPageTokens + row % kPageTokens) * x.d;
    float score[kPageTokens];
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) dot_tile<DotF32<W>, 1, 4>(x.q, 0, k + i * x.d, x.d, x.d, score + i);
    for (; i < n; ++i) dot_tile<DotF32<W>, 1, 1>(x.q, 0, k + i * x.d, x.d, x.d, score + i);
    for (; i < round_up(n, kWidth); ++i) score[i] = -__builtin_inff();
    vf best = splat(-__builtin_inff()), sum_of{};
    for (i = 0; i < n; i += kWidth) best = max(best, load(score + i));
    const float here = max_of(best) * x.a.scale;
    if (here > mass.top) {
      mass.total = Mass::under(mass, here);
      mass.top = here;
    }
    for (i = 0; i < n; i += kWidth) sum_of += exp(fma(load(score + i), splat(x.a.scale), splat(-mass.top)));
    mass.total += static_cast<double>(sum(sum_of));
    row += n;
  }
}

// The rows in no closed segment.
template <class W>
PRT_INLINE Mass open_mass(const Query& x) {
  const int32_t len = static_cast<const int32_t*>(x.a.kv_len.data)[x.entry], *closed = x.a.closed.row<int32_t>(x.entry);
  Mass mass;
  add_rows<W>(x, {0, closed[0] * kPageTokens}, mass);
  add_rows<W>(x, {closed[1] * kPageTokens, len - closed[1] * kPageTokens}, mass);
  return mass;
}

PRT_INLINE float log1(float x) { return static_cast<float>(__builtin_log(static_cast<double>(x))); }

// log_mass and rank of every cluster. -> the largest log_mass
PRT_INLINE float score_clusters(const Query& x) {
  const bool moment = x.a.estimator == Estimator::moment;
  const float half_square = 0.5f * x.a.scale * x.a.scale;
  float top = -__builtin_inff();
  for (int64_t j = 0; j < x.n_cluster; ++j) {
    const int64_t at = slot_of(x, j) * x.d;
    const uint16_t *c = static_cast<const uint16_t*>(x.a.index.centroid.data) + at,
                   *v = static_cast<const uint16_t*>(x.a.index.variance.data) + at;
    vf dot{}, spread{};
    int64_t i = 0;
    for (; i + kWidth <= x.d; i += kWidth) {
      const vf q = load(x.q + i);
      dot = fma(q, Bf16::load(c + i), dot);
      if (moment) spread = fma(q * q, Bf16::load(v + i), spread);
    }
    float mean = sum(dot), wide = sum(spread);
    for (; i < x.d; ++i) {
      mean += x.q[i] * Bf16::get(c[i]);
      if (moment) wide += x.q[i] * x.q[i] * Bf16::get(v[i]);
    }
    const int64_t n = rows_of(x, j).n;
    const float log_n = log1(static_cast<float>(n > 0 ? n : 1));
    x.plain[j] = n > 0 ? mean * x.a.scale + log_n : -__builtin_inff();
    x.log_mass[j] = x.plain[j] + wide * half_square;
    x.rank[j] = (moment ? x.log_mass[j] : x.plain[j]) - log_n;  // per row: by mass, large clusters of little worth would come first
    x.order[j] = static_cast<int32_t>(j);
    x.chosen[j] = 0;
    top = top > x.log_mass[j] ? top : x.log_mass[j];
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

PRT_INLINE float share(double part, double all) { return all > 0 ? static_cast<float>(part / all) : 1.0f; }

// Clusters in the order of their estimated mass per row. What is taken is counted exactly, so a wrong estimate is corrected on the way.
template <class W>
PRT_INLINE float choose_by_moment(const Query& x, const Mass& open, float top) {
  double taken = Mass::under(open, top), rest = 0;
  for (int64_t j = 0; j < x.n_cluster; ++j) rest += static_cast<double>(exp1(x.log_mass[j] - top));
  const auto p = static_cast<double>(x.a.p);
  make_heap(x);
  for (int64_t n = x.n_cluster; n > 0 && (p == 1 || taken < p * (taken + rest)); --n) {
    const int64_t j = pop(x, n);
    const RowRange rows = rows_of(x, j);
    if (rows.n == 0) break;  // only empty ones are left
    rest -= static_cast<double>(exp1(x.log_mass[j] - top));
    if (rest < 0) rest = 0;
    Mass mass;
    add_rows<W>(x, rows, mass);
    taken += Mass::under(mass, top);
    x.chosen[j] = 1;
  }
  return share(taken, taken + rest);
}

// The published curve (Tactic, section 4.2). Positions count rows of closed segments, sorted by their cluster's rank.
constexpr double kFirst = 0.1, kSecond = 0.6;  // where the curve is sampled
constexpr double kSample = 0.01;               // share of the rows in a sample
constexpr double kHead = 0.02;                 // share of the rows in front whose mass is computed

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
    add_rows<W>(x, rows_of(x, j), mass);
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
  double total = Mass::under(open, top), taken = total;
  for (int pass = 0; pass < 2; ++pass) {
    at = 0;
    for (int64_t i = 0; i < x.n_cluster; ++i) {
      const int64_t j = cluster_at(i);
      const auto n = static_cast<double>(rows_of(x, j).n);
      if (n == 0) break;
      if (pass == 1 && x.a.p < 1 && taken >= static_cast<double>(x.a.p) * total) break;
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

// Everything but the union's clusters, as one softmax term: sum, top, total.
PRT_INLINE void estimate_rest(const Query& x, const int32_t* in_union, float* out) {
  float top = -__builtin_inff(), total = 0;
  for (int64_t j = 0; j < x.n_cluster; ++j)
    if (!in_union[j] && x.plain[j] > top) top = x.plain[j];
  __builtin_memset(out, 0, static_cast<size_t>(x.d) * sizeof(float));
  for (int64_t j = 0; j < x.n_cluster; ++j) {
    if (in_union[j] || rows_of(x, j).n == 0) continue;
    const float weight = exp1(x.plain[j] - top);
    const uint16_t* value = static_cast<const uint16_t*>(x.a.index.value.data) + slot_of(x, j) * x.d;
    total += weight;
    int64_t i = 0;
    for (; i + kWidth <= x.d; i += kWidth) store(out + i, fma(splat(weight), Bf16::load(value + i), load(out + i)));
    for (; i < x.d; ++i) out[i] += weight * Bf16::get(value[i]);
  }
  out[x.d] = top;
  out[x.d + 1] = total;
}

// The union of the group's choices goes to the first head's `chosen`; then it is written as ranges, neighbours joined.
PRT_INLINE void write_union(const Select& a, int64_t entry, int64_t kv_head, int64_t group) {
  const Query x = Query::of(a, entry, kv_head * group);
  for (int64_t g = 1; g < group; ++g) {
    const int32_t* chosen = Query::of(a, entry, kv_head * group + g).chosen;
    for (int64_t j = 0; j < x.n_cluster; ++j) x.chosen[j] |= chosen[j];
  }
  int32_t* out = a.ranges.row<int32_t>(entry) + kv_head * a.ranges.shape[2] * 2;
  int64_t n = 0, end = -1;
  const auto put = [&](RowRange rows) {
    if (rows.n == 0) return;
    if (rows.first == end) {
      out[2 * n - 1] += static_cast<int32_t>(rows.n);
    } else {
      out[2 * n] = static_cast<int32_t>(rows.first);
      out[2 * n++ + 1] = static_cast<int32_t>(rows.n);
    }
    end = rows.first + rows.n;
  };
  const int32_t len = static_cast<const int32_t*>(a.kv_len.data)[entry], *closed = a.closed.row<int32_t>(entry);
  put({0, closed[0] * kPageTokens});
  for (int64_t j = 0; j < x.n_cluster; ++j)
    if (x.chosen[j]) put(rows_of(x, j));
  put({closed[1] * kPageTokens, len - closed[1] * kPageTokens});
  a.n_range.row<int32_t>(entry)[kv_head] = static_cast<int32_t>(n);
}

template <class W>
PRT_INLINE float measure(const Query& x) {
  Mass all, held;
  add_rows<W>(x, {0, static_cast<const int32_t*>(x.a.kv_len.data)[x.entry]}, all);
  const int32_t* range = x.a.ranges.row<int32_t>(x.entry) + x.kv_head * x.a.ranges.shape[2] * 2;
  for (int32_t i = 0; i < x.a.n_range.row<int32_t>(x.entry)[x.kv_head]; ++i) add_rows<W>(x, {range[2 * i], range[2 * i + 1]}, held);
  return share(Mass::under(held, all.top), all.total);
}

}  // namespace

void select(ThreadPool& pool, const Select& a) {
  const int64_t d = a.k_pages.shape[3], h_kv = a.k_pages.shape[1], h_q = a.q.shape[1] / d, group = h_q / h_kv, n_entry = a.q.shape[0];
  with_weight(static_cast<int32_t>(a.k_pages.dtype), [&](auto format) {
    using W = decltype(format);
    pool.parallel_for(n_entry * h_q, [&](int64_t item, int32_t) {
      const Query x = Query::of(a, item / h_q, item % h_q);
      const float highest = score_clusters(x);
      const Mass open = open_mass<W>(x);
      const float top = open.top > highest ? open.top : highest;
      a.mass.row<float>(x.entry)[x.head] =
          a.estimator == Estimator::moment ? choose_by_moment<W>(x, open, top) : choose_by_fit<W>(x, open, top);
    });
    pool.parallel_for(n_entry * h_kv, [&](int64_t item, int32_t) {
      const int64_t entry = item / h_kv, kv_head = item % h_kv;
      write_union(a, entry, kv_head, group);
      const int32_t* in_union = Query::of(a, entry, kv_head * group).chosen;
      for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
        const Query x = Query::of(a, entry, h);
        if (a.tail.data) estimate_rest(x, in_union, a.tail.row<float>(entry) + h * (d + 2));
        if (a.true_mass.data) a.true_mass.row<float>(entry)[h] = measure<W>(x);
      }
    });
  });
}

}  // namespace prt::PRT_ISA
