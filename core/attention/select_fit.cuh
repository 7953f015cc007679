// `fit` (Tactic, section 4.2), as published and for comparison only, so that it is written plainly: the whole list is sorted, by one block
// per query head. Positions count rows of closed segments in the order of their clusters' keys.
#pragma once
#include "attention/select_choose.cuh"

namespace prt::cuda::selecting {

template <class T>
struct Fit : Chooser<T, 0> {
  using Base = Chooser<T, 0>;
  using Base::a, Base::e, Base::s, Base::tid, Base::warp, Base::lane;
  static constexpr double kFirst = 0.1, kSecond = 0.6;  // where the curve is sampled
  static constexpr double kSample = 0.01;  // share of the rows in a sample
  static constexpr double kHead = 0.02;  // share of the rows in front whose mass is computed
  uint64_t* list;
  float* mass;  // of the clusters in the list that are counted, under s.open.x

  __device__ Fit(const SelectArgs& args, uint4* shared) : Base(args, shared) {}

  __device__ double* sums() const { return reinterpret_cast<double*>(s.histogram); }
  __device__ int rows_at(int i) const { return list[i] == kAll ? 0 : this->rows(number_of(list[i])); }
  // Each thread goes through a stretch of the list: f(place in the list, rows before, rows) of every cluster that has some.
  template <class F>
  __device__ void walk(F&& f) const {
    const int each = (e.n_cluster + kThreads - 1) / kThreads, first = min(tid * each, e.n_cluster), end = min(first + each, e.n_cluster);
    uint64_t rows = 0, total;
    for (int i = first; i < end; ++i) rows += static_cast<uint64_t>(rows_at(i));
    uint64_t at = block_scan(rows, s.scan, total);
    for (int i = first; i < end; ++i) {
      const int n = rows_at(i);
      if (n > 0) f(i, static_cast<double>(at), n);
      at += static_cast<uint64_t>(n);
    }
    __syncthreads();
  }
  // -> the sum of all threads' x in a fixed order; `before`: of the threads before this one
  __device__ double sum_up(double x, double& before) const {
    sums()[tid] = x;
    __syncthreads();
    double total = 0;
    for (int i = 0; i < kThreads; ++i) {
      if (i == tid) before = total;
      total += sums()[i];
    }
    __syncthreads();
    return total;
  }
  __device__ void sort(const int32_t* key) const {
    for (int j = tid; j < e.n_cluster; j += kThreads) list[j] = key[j] == kEmpty ? kAll : order_of(key[j], j);
    __syncthreads();
    const auto exchange = [&](int i, int other) {
      if (other <= i || other >= e.n_cluster) return;
      const uint64_t x = list[i], y = list[other];
      if (x > y) list[i] = y, list[other] = x;
    };
    for (int run = 2; run < 2 * e.n_cluster; run *= 2) {  // bitonic, upwards everywhere: what is past the end counts as the largest
      for (int i = tid; i < e.n_cluster; i += kThreads) exchange(i, i ^ (run - 1));
      __syncthreads();
      for (int step = run / 4; step > 0; step /= 2) {
        for (int i = tid; i < e.n_cluster; i += kThreads) exchange(i, i ^ step);
        __syncthreads();
      }
    }
  }

  __device__ void choose(int head) {
    const int64_t at_head = a.head(this->entry, this->kv_head, head) * a.room;
    list = a.sorted + at_head, mass = a.sorted_mass + at_head;
    sort(this->keys_of(head));
    if (warp == 0) {
      const Mass open = this->open_mass(head);
      if (lane == 0) s.open = {open.top, open.total};
    }
    const double rows = (e.end_page - e.first_page) * kPage, where[2] = {kFirst * rows, kSecond * rows}, half = kSample * rows / 2;
    const auto in_sample = [&](int x, double at, int n) { return at < where[x] + half && at + n > where[x] - half; };
    // What is counted: the log2 of its mass.
    walk([&](int i, double at, int n) { mass[i] = at < kHead * rows || in_sample(0, at, n) || in_sample(1, at, n) ? 1 : 0; });
    const RowScorer<T, 0> q(a.template query<T>(this->entry, this->kv_head, head), a.d);
    float top = kNegInf;
    for (int i = warp; i < e.n_cluster; i += kWarps) {
      if (list[i] == kAll || mass[i] == 0) continue;
      const int first = this->first(number_of(list[i])), n = rows_at(i);
      Mass m;
      for (int r = lane / 4; r - lane / 4 < n; r += kTile) {
        float s0, s1;
        q.score(this->key_row(first + min(r, n - 1)), this->key_row(first + min(r + 8, n - 1)), s0, s1);
        if (r < n) m.add({s0 * (a.scale * kLog2e), 1});
        if (r + 8 < n) m.add({s1 * (a.scale * kLog2e), 1});
      }
      m = warp_mass<4>(m);
      const float log_mass = m.top + __log2f(m.total);
      if (lane == 0) mass[i] = log_mass;
      top = fmaxf(top, log_mass);
    }
    __syncthreads();
    top = fmaxf(block_max(top, s.sum), s.open.x);
    __syncthreads();
    const auto counted = [&](int i) { return static_cast<double>(pow2(mass[i] - top)); };

    double sampled[2] = {0, 0}, n_sampled[2] = {0, 0}, mean[2], unused;
    walk([&](int i, double at, int n) {
#pragma unroll
      for (int x = 0; x < 2; ++x)
        if (in_sample(x, at, n)) sampled[x] += counted(i), n_sampled[x] += n;
    });
    for (int x = 0; x < 2; ++x) {
      const double sum = sum_up(sampled[x], unused), n = sum_up(n_sampled[x], unused);
      mean[x] = n > 0 ? sum / n : 0;
    }
    const double slope = (mean[0] - mean[1]) / (1 / where[0] - 1 / where[1]), level = mean[0] - slope / where[0];
    const auto mass_of = [&](int i, double at, int n) {  // a / x + b behind the head
      return at < kHead * rows ? counted(i) : fmax(slope * log((at + n) / at) + level * n, 0.0);
    };
    const double outside = s.open.y > 0 ? static_cast<double>(s.open.y * pow2(s.open.x - top)) : 0;
    double mine = 0, before = 0;
    walk([&](int i, double at, int n) { mine += mass_of(i, at, n); });
    const double total = outside + sum_up(mine, before);
    if (tid == 0) s.n_taken = INT_MAX;
    __syncthreads();
    double taken = outside + before;
    walk([&](int i, double at, int n) {
      if (at >= static_cast<double>(a.budget) * rows || (a.p < 1 && taken >= static_cast<double>(a.p) * total)) atomicMin(&s.n_taken, i);
      taken += mass_of(i, at, n);
    });
    const int n_taken = s.n_taken;
    double got = 0;
    walk([&](int i, double at, int n) {
      if (i >= n_taken) return;
      got += mass_of(i, at, n);
      this->mark(number_of(list[i]));
    });
    got = outside + sum_up(got, unused);
    if (tid == 0) this->put_share(head, total > 0 ? static_cast<float>(fmin(got / total, 1.0)) : 1);
  }
};

}  // namespace prt::cuda::selecting
