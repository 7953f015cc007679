// Sampling without a full sort: the tokens that can matter are few, so they are selected first and only they are sorted.
#include "cpu/softmax.h"
#include "ops/cpu_table.h"

namespace prt::PRT_ISA {

namespace {

struct Candidate {
  float logit;
  int32_t id;
};

// Descending by logit; equal logits by id, so that the order never depends on how it was reached.
PRT_INLINE bool before(const Candidate& a, const Candidate& b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }

void sift_down(Candidate* heap, int64_t i, int64_t n) {  // heap[0] is the worst of the kept ones
  for (;;) {
    int64_t worst = i;
    for (int64_t child = 2 * i + 1; child <= 2 * i + 2; ++child)
      if (child < n && before(heap[worst], heap[child])) worst = child;
    if (worst == i) return;
    const Candidate t = heap[i];
    heap[i] = heap[worst];
    heap[worst] = t;
    i = worst;
  }
}

// The k best tokens with logit >= floor, best first, into out; returns how many there are.
int64_t select_top(const float* logits, int64_t n, int64_t k, float floor, Candidate* out) {
  int64_t m = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Candidate c{logits[i], static_cast<int32_t>(i)};
    if (!(c.logit >= floor)) continue;
    if (m < k) {
      out[m++] = c;
      if (m == k)
        for (int64_t j = m / 2; j-- > 0;) sift_down(out, j, m);
    } else if (before(c, out[0])) {
      out[0] = c;
      sift_down(out, 0, m);
    }
  }
  if (m < k)
    for (int64_t j = m / 2; j-- > 0;) sift_down(out, j, m);
  for (int64_t end = m - 1; end > 0; --end) {  // heap sort: the worst goes last
    const Candidate t = out[0];
    out[0] = out[end];
    out[end] = t;
    sift_down(out, 0, end);
  }
  return m;
}

int32_t argmax(const float* logits, int64_t n) {
  const float top = row_max(logits, n);
  for (int64_t i = 0; i < n; ++i)
    if (logits[i] == top) return static_cast<int32_t>(i);
  return 0;  // all NaN
}

// Candidates are best first. Cuts them by min_p, then by top_p of what is left, and draws with u.
int32_t draw(const Candidate* c, int64_t m, const SampleRow& row, float* weight, double total_of_all, bool exhaustive, bool* enough) {
  const float top = c[0].logit, scale = 1.0f / row.temperature;
  double total = 0;
  int64_t kept = 0;
  for (; kept < m; ++kept) {
    weight[kept] = exp(splat((c[kept].logit - top) * scale))[0];
    if (kept > 0 && weight[kept] < row.min_p) break;
    total += static_cast<double>(weight[kept]);
  }
  if (kept < m) exhaustive = true;  // min_p ended the list
  const double mass = exhaustive ? total : total_of_all;
  const double want = static_cast<double>(row.top_p) * mass;
  double running = 0;
  int64_t n = 0;
  if (row.top_p >= 1.0f) {
    n = kept;
    running = total;
  } else {
    while (n < kept && (n == 0 || running < want)) running += static_cast<double>(weight[n++]);
  }
  *enough = exhaustive || (row.top_p < 1.0f && running >= want);
  if (!*enough) return 0;
  double left = static_cast<double>(row.uniform) * running;
  for (int64_t i = 0; i < n; ++i) {
    left -= static_cast<double>(weight[i]);
    if (left < 0) return c[i].id;
  }
  return c[n - 1].id;
}

// scratch: n candidates, then n weights
int32_t sample_row(const float* logits, int64_t n, const SampleRow& row, Candidate* c, float* weight) {
  if (row.temperature <= 0) return argmax(logits, n);
  const float top = row_max(logits, n), scale = 1.0f / row.temperature;
  if (!(top > -__builtin_inff() && top < __builtin_inff())) return argmax(logits, n);
  const bool cut = (row.top_k > 0 && row.top_k < n) || row.top_p < 1.0f || row.min_p > 0;
  if (!cut) {  // inverse of the cumulative distribution in id order
    double left = static_cast<double>(row.uniform) * sum_exp(logits, n, top, scale);
    int32_t last = 0;
    for (int64_t block = 0; block < n; block += 1024) {
      const int64_t end = min64(n, block + 1024);
      const double mass = sum_exp(logits + block, end - block, top, scale);
      if (left >= mass && end < n) {
        left -= mass;
        continue;
      }
      for (int64_t i = block; i < end; ++i) {
        const float w = exp(splat((logits[i] - top) * scale))[0];
        if (w <= 0) continue;
        last = static_cast<int32_t>(i);
        left -= static_cast<double>(w);
        if (left < 0) return last;
      }
    }
    return last ? last : argmax(logits, n);
  }
  // A token below min_p times the best can't be chosen, so it need not be a candidate: log min_p below the top, scaled.
  const float floor =
      row.min_p > 0 ? top + row.temperature * static_cast<float>(__builtin_log(static_cast<double>(row.min_p))) - 1e-3f : -__builtin_inff();
  const bool by_k = row.top_k > 0 && row.top_k < n;
  const double total = by_k || row.min_p > 0 || row.top_p >= 1.0f ? 0 : sum_exp(logits, n, top, scale);
  // top_p rarely needs more than 256 tokens; widen until it is reached. Not after min_p: top_p is a share of all that it left.
  for (int64_t k = by_k ? row.top_k : row.min_p > 0 ? n : 256;; k *= 8) {
    k = min64(k, n);
    const int64_t m = select_top(logits, n, k, floor, c);
    bool enough = false;
    const int32_t id = draw(c, m, row, weight, total, by_k || m < k || k == n, &enough);
    if (enough) return id;
  }
}

}  // namespace

void sample(ThreadPool& pool, const Sample& a) {
  const int64_t n = a.logits.shape[1], n_top = a.top_ids.data ? a.top_ids.shape[1] : 0;
  pool.parallel_for(a.logits.shape[0], [&](int64_t r, int32_t thread) {
    float* logits = a.logits.row<float>(r);
    Candidate* candidates = reinterpret_cast<Candidate*>(static_cast<float*>(a.scratch.data) + thread * sample_scratch_floats(n));
    float *weights = reinterpret_cast<float*>(candidates) + 2 * n,
          *saved = weights + n;  // saved: at most one value per bias and per token seen
    const SampleRow& row = a.rows[r];
    const bool want_logprob = a.logprobs.data != nullptr;
    const float norm = want_logprob || n_top > 0 ? log_sum_exp(logits, n) : 0.0f;
    if (n_top > 0) {
      const int64_t m = select_top(logits, n, n_top, -__builtin_inff(), candidates);
      for (int64_t i = 0; i < n_top; ++i) {
        a.top_ids.row<int32_t>(r)[i] = i < m ? candidates[i].id : -1;
        a.top_logprobs.row<float>(r)[i] = i < m ? candidates[i].logit - norm : -__builtin_inff();
      }
    }
    // The logits that the parameters change are few: keep their values and put them back.
    for (int64_t i = 0; i < row.n_bias; ++i) {
      saved[i] = logits[row.bias_ids[i]];
      logits[row.bias_ids[i]] += row.bias_values[i];
    }
    for (int64_t i = 0; i < row.n_seen; ++i) {
      float& x = logits[row.seen[i].id];
      saved[row.n_bias + i] = x;
      x = x > 0 ? x / row.repetition_penalty : x * row.repetition_penalty;
      const int32_t times = row.seen[i].n_generated;
      if (times > 0) x -= static_cast<float>(times) * row.frequency_penalty + row.presence_penalty;
    }
    const int32_t token = sample_row(logits, n, row, candidates, weights);
    for (int64_t i = row.n_seen; i-- > 0;) logits[row.seen[i].id] = saved[row.n_bias + i];
    for (int64_t i = row.n_bias; i-- > 0;) logits[row.bias_ids[i]] = saved[i];
    static_cast<int32_t*>(a.tokens.data)[r] = token;
    if (want_logprob) static_cast<float*>(a.logprobs.data)[r] = logits[token] - norm;
  });
}

}  // namespace prt::PRT_ISA
