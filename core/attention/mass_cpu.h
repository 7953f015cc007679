// The softmax mass of some keys, what ranges of rows hold of it, and the counters: shared by the CPU twins of `select` and `count_rows`.
#pragma once
#include "attention/sparse.h"
#include "cpu/attend.h"
#include "cpu/dot.h"

namespace prt::PRT_ISA {

struct RowRange {
  int64_t first, n;
};

// The keys of one entry and kv head, and the query of one of its heads.
struct HeadKeys {
  const Tensor& k_pages;
  const int32_t* pages;  // of the page table
  int64_t kv_head, d;
  const float* q;
  float scale;
};

// sum of e^(score - top) over some keys
struct Mass {
  float top = -__builtin_inff();
  double total = 0;
  PRT_INLINE double under(const Mass& m, float top) { return m.total > 0 ? m.total * static_cast<double>(exp1(m.top - top)) : 0; }
};

// A function of its own: it is called from a dozen places, and was half of what compiling `select` took.
template <class W>
static __attribute__((noinline)) void add_rows(const HeadKeys& x, RowRange rows, Mass& mass) {
  for (int64_t row = rows.first, end = rows.first + rows.n; row < end;) {
    const int64_t n = min64(kPageTokens - row % kPageTokens, end - row);
    const auto* k = static_cast<const typename W::T*>(x.k_pages.data) +
                    ((x.pages[row / kPageTokens] * x.k_pages.shape[1] + x.kv_head) * kPageTokens + row % kPageTokens) * x.d;
    float score[kPageTokens];
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) dot_tile<DotF32<W>, 1, 4>(x.q, 0, k + i * x.d, x.d, x.d, score + i);
    for (; i < n; ++i) dot_tile<DotF32<W>, 1, 1>(x.q, 0, k + i * x.d, x.d, x.d, score + i);
    for (; i < round_up(n, kWidth); ++i) score[i] = -__builtin_inff();
    vf best = splat(-__builtin_inff()), sum_of{};
    for (i = 0; i < n; i += kWidth) best = max(best, load(score + i));
    const float here = max_of(best) * x.scale;
    if (here > mass.top) {
      mass.total = Mass::under(mass, here);
      mass.top = here;
    }
    for (i = 0; i < n; i += kWidth) sum_of += exp(fma(load(score + i), splat(x.scale), splat(-mass.top)));
    mass.total += static_cast<double>(sum(sum_of));
    row += n;
  }
}

PRT_INLINE float share(double part, double all) { return all > 0 ? static_cast<float>(part / all) : 1.0f; }

// The share of the mass of the first kv_len rows that n ranges hold.
template <class W>
PRT_INLINE float held_share(const HeadKeys& x, int64_t kv_len, const int32_t* range, int64_t n) {
  Mass all, held;
  add_rows<W>(x, {0, kv_len}, all);
  for (int64_t i = 0; i < n; ++i) add_rows<W>(x, {range[2 * i], range[2 * i + 1] - (i > 0 ? range[2 * i - 1] : 0)}, held);
  return share(Mass::under(held, all.top), all.total);
}

PRT_INLINE void count_step(AttentionCounters& c, int64_t context, int64_t exact, int64_t attended) {
  ++c.n_step;
  c.n_context += context;
  c.n_exact += exact;
  c.n_selected += attended - exact;
}
// A share in `unit` parts of one. Rows that hold NaN or infinities, which a loaded file may, have shares that are none: they count as 0.
PRT_INLINE int64_t in_parts(float share, float unit) { return share > 0 ? static_cast<int64_t>((share < 1 ? share : 1) * unit) : 0; }
PRT_INLINE void count_true(AttentionCounters& c, float share, float p) {
  ++c.n_true;
  c.true_mass += in_parts(share, 0x1p32f);
  c.n_reached += share >= p;
  ++c.histogram[min64(in_parts(share, PRT_MASS_BINS), PRT_MASS_BINS - 1)];
}

}  // namespace prt::PRT_ISA
