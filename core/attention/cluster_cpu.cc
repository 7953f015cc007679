#include "attention/cluster.h"

#include "attention/sparse.h"
#include "cpu/attend.h"
#include "ops/cpu_table.h"

namespace prt::PRT_ISA {

namespace {

struct ClusterWork {
  int64_t n, k, k_pad, d;
  float *keys, *centroids, *transposed, *sums, *scores, *bias;
  int32_t *cluster_of, *count, *first;
  PRT_INLINE ClusterWork at(float* base, int64_t n, int64_t k, int64_t d) {
    ClusterWork w{n, k, round_up(k, 16), d, base, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    w.centroids = w.keys + n * d;
    w.sums = w.centroids + k * d;
    w.transposed = w.sums + k * d;
    w.scores = w.transposed + d * w.k_pad;
    w.bias = w.scores + kPageTokens * w.k_pad;
    w.cluster_of = reinterpret_cast<int32_t*>(w.bias + w.k_pad);
    w.count = w.cluster_of + n;
    w.first = w.count + w.k_pad;
    return w;
  }
};

PRT_INLINE uint64_t next_random(uint64_t& state) {  // splitmix64
  uint64_t z = state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// k different rows; cluster_of is the deck that they are drawn from.
PRT_INLINE void draw_centroids(const ClusterWork& w, uint64_t seed) {
  for (int64_t i = 0; i < w.n; ++i) w.cluster_of[i] = static_cast<int32_t>(i);
  for (int64_t j = 0; j < w.k; ++j) {
    const int64_t i = j + static_cast<int64_t>(next_random(seed) % static_cast<uint64_t>(w.n - j));
    const int32_t row = w.cluster_of[i];
    w.cluster_of[i] = w.cluster_of[j];
    __builtin_memcpy(w.centroids + j * w.d, w.keys + row * w.d, static_cast<size_t>(w.d) * sizeof(float));
  }
}

// The nearest centroid is the one with the largest key.c - |c|^2 / 2; the lowest number wins ties. -> some key changed its cluster
PRT_INLINE bool assign(const ClusterWork& w) {
  for (int64_t j = 0; j < w.k_pad; ++j) {
    float square = 0;
    for (int64_t i = 0; i < w.d; ++i) {
      const float c = j < w.k ? w.centroids[j * w.d + i] : 0;
      w.transposed[i * w.k_pad + j] = c;
      square += c * c;
    }
    w.bias[j] = j < w.k ? square * -0.5f : -__builtin_inff();
  }
  bool changed = false;
  for (int64_t row = 0; row < w.n; row += kPageTokens) {
    product(kPageTokens, w.k_pad, w.keys + row * w.d, w.d, w.transposed, w.k_pad, w.d, w.scores, w.k_pad, false);
    for (int64_t r = 0; r < kPageTokens; ++r) {
      vf best = splat(-__builtin_inff());
      vi at{}, here{};
      for (int i = 0; i < kWidth; ++i) here[i] = i;
      for (int64_t j = 0; j < w.k_pad; j += kWidth, here += kWidth) {
        const vf s = load(w.scores + r * w.k_pad + j) + load(w.bias + j);
        const vi better = s > best;
        best = better ? s : best;
        at = better ? here : at;
      }
      int32_t nearest = at[0];
      float top = best[0];
      for (int i = 1; i < kWidth; ++i)
        if (best[i] > top || (best[i] == top && at[i] < nearest)) {
          top = best[i];
          nearest = at[i];
        }
      changed |= w.cluster_of[row + r] != nearest;
      w.cluster_of[row + r] = nearest;
    }
  }
  return changed;
}

// sums[j] = sum of the rows of x in cluster j
PRT_INLINE void add_up(const ClusterWork& w, const float* x) {
  __builtin_memset(w.sums, 0, static_cast<size_t>(w.k * w.d) * sizeof(float));
  __builtin_memset(w.count, 0, static_cast<size_t>(w.k) * sizeof(int32_t));
  for (int64_t r = 0; r < w.n; ++r) {
    float* sum = w.sums + w.cluster_of[r] * w.d;
    ++w.count[w.cluster_of[r]];
    for (int64_t i = 0; i < w.d; ++i) sum[i] += x[r * w.d + i];
  }
}

PRT_INLINE void k_means(const ClusterWork& w, int64_t iterations, uint64_t seed) {
  draw_centroids(w, seed);
  for (int64_t i = 0; i < w.n; ++i) w.cluster_of[i] = -1;
  for (int64_t it = 0; it < iterations && assign(w); ++it) {
    add_up(w, w.keys);
    for (int64_t j = 0; j < w.k; ++j)
      if (w.count[j] > 0)
        for (int64_t i = 0; i < w.d; ++i) w.centroids[j * w.d + i] = w.sums[j * w.d + i] / static_cast<float>(w.count[j]);
  }
}

// One segment and kv head of the operation.
struct Segment {
  const Cluster& a;
  const int32_t* pages;
  int64_t kv_head;
  PRT_INLINE int64_t row_at(const Segment& s, int64_t row) {  // of k_pages, counted in rows
    return (s.pages[row / kPageTokens] * s.a.k_pages.shape[1] + s.kv_head) * kPageTokens + row % kPageTokens;
  }
  PRT_INLINE int64_t slot_at(const Segment& s, int64_t cluster) {
    const int64_t n_slot = s.a.index.centroid.shape[2];
    return (s.pages[cluster / n_slot] * s.a.k_pages.shape[1] + s.kv_head) * n_slot + cluster % n_slot;
  }
};

template <class W>
PRT_INLINE void load_rows(const Segment& s, const Tensor& pages, const ClusterWork& w) {
  for (int64_t r = 0; r < w.n; ++r) {
    const auto* from = static_cast<const typename W::T*>(pages.data) + Segment::row_at(s, r) * w.d;
    for (int64_t i = 0; i < w.d; ++i) w.keys[r * w.d + i] = W::get(from[i]);
  }
}

// Rows change places; w.keys serves as the copy to take them from.
template <class W>
PRT_INLINE void permute(const Segment& s, const Tensor& pages, const ClusterWork& w) {
  using T = typename W::T;
  T *to = static_cast<T*>(pages.data), *copy = reinterpret_cast<T*>(w.keys);
  const size_t bytes = static_cast<size_t>(w.d) * sizeof(T);
  for (int64_t r = 0; r < w.n; ++r) __builtin_memcpy(copy + r * w.d, to + Segment::row_at(s, r) * w.d, bytes);
  __builtin_memset(w.count, 0, static_cast<size_t>(w.k) * sizeof(int32_t));
  for (int64_t r = 0; r < w.n; ++r) {
    const int32_t j = w.cluster_of[r];
    __builtin_memcpy(to + Segment::row_at(s, w.first[j] + w.count[j]++) * w.d, copy + r * w.d, bytes);
  }
}

PRT_INLINE void put_mean(const Segment& s, const ClusterWork& w, const Tensor& to) {
  for (int64_t j = 0; j < w.k; ++j) {
    uint8_t* out = static_cast<uint8_t*>(to.data) + Segment::slot_at(s, j) * w.d;
    for (int64_t i = 0; i < w.d; ++i) out[i] = F8::put(w.count[j] > 0 ? w.sums[j * w.d + i] / static_cast<float>(w.count[j]) : 0);
  }
}

template <class W>
PRT_INLINE void cluster_segment(const Segment& s, const ClusterWork& w, uint64_t seed) {
  const Cluster& a = s.a;
  const int64_t n_slot = a.index.centroid.shape[2];
  load_rows<W>(s, a.k_pages, w);
  k_means(w, a.iterations, seed);

  add_up(w, w.keys);
  put_mean(s, w, a.index.centroid);
  __builtin_memset(w.sums, 0, static_cast<size_t>(w.k * w.d) * sizeof(float));
  for (int64_t r = 0; r < w.n; ++r)
    for (int64_t i = 0, j = w.cluster_of[r]; i < w.d; ++i) {
      const float off = w.keys[r * w.d + i] - w.centroids[j * w.d + i];
      w.sums[j * w.d + i] += off * off;
    }
  put_mean(s, w, a.index.variance);
  for (int64_t j = 0, first = 0; j < w.k; ++j) {
    int32_t* range = static_cast<int32_t*>(a.index.range.data) + Segment::slot_at(s, j) * 2;
    range[0] = static_cast<int32_t>(first - j / n_slot * kPageTokens);
    range[1] = w.count[j];
    w.first[j] = static_cast<int32_t>(first);
    first += w.count[j];
  }

  permute<W>(s, a.k_pages, w);
  load_rows<W>(s, a.v_pages, w);
  add_up(w, w.keys);
  put_mean(s, w, a.index.value);
  permute<W>(s, a.v_pages, w);
  __builtin_memset(w.count, 0, static_cast<size_t>(w.k) * sizeof(int32_t));
  for (int64_t r = 0; r < w.n; ++r) {
    const int32_t j = w.cluster_of[r];
    static_cast<uint16_t*>(a.index.order.data)[Segment::row_at(s, w.first[j] + w.count[j]++)] = static_cast<uint16_t>(r);
  }
}

}  // namespace

void cluster(ThreadPool& pool, const Cluster& a) {
  const int64_t h_kv = a.k_pages.shape[1], d = a.k_pages.shape[3], n_page = a.pages.shape[1];
  const int64_t n = n_page * kPageTokens, k = n_page * a.index.centroid.shape[2], per_thread = cluster_thread_floats(n, k, d);
  with_weight(static_cast<int32_t>(a.k_pages.dtype), [&](auto format) {
    pool.parallel_for(a.pages.shape[0] * h_kv, [&](int64_t item, int32_t thread) {
      const Segment s{a, a.pages.row<int32_t>(item / h_kv), item % h_kv};
      // Not the page ids: the same tokens get the same clusters wherever they are kept.
      const uint64_t seed = a.seed + 0x632be59bd9b4e019u * static_cast<uint64_t>(s.kv_head);
      cluster_segment<decltype(format)>(s, ClusterWork::at(static_cast<float*>(a.scratch.data) + thread * per_thread, n, k, d), seed);
    });
  });
}

}  // namespace prt::PRT_ISA
