// One launch samples every row. A row is split over a cluster of 8 blocks, each with its part of the logits in shared memory (one block
// and global memory on a GPU without clusters); the blocks exchange maxima, sums and histograms through each other's shared memory.
//
// Nothing is sorted. A weight e^((x - top) / temperature) is an integer, a fraction of 2^62 / n_vocab, so that sums are exact and do not
// depend on the order. In the order best first, equal logits by id, every cut keeps a front part of the row, and so is a number: the mass
// kept. The token whose mass interval holds a number is found by digits: a histogram over the first digit of every token's place, then over
// the second digit of those that share the first, and so on until one token is left. The first histogram tells how far back in the row the
// answer can be; that front part is short, and one block goes on with it alone.
#include <cmath>

#include "cuda/hopper.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "ops/cuda_table.h"

namespace prt::cuda {

namespace {

constexpr int kBins = 256, kThreads = 512, kClusterParts = 8;
constexpr int kFront = 4096;  // tokens that one block takes over

struct Histogram {
  uint32_t count[kBins], mass_low[kBins], mass_high[kBins];

  __device__ void add(int bin, uint32_t n, uint64_t mass) {  // 64-bit atomics on shared memory would be loops
    atomicAdd(&count[bin], n);
    const uint32_t low = static_cast<uint32_t>(mass), before = atomicAdd(&mass_low[bin], low);
    const uint32_t high = static_cast<uint32_t>(mass >> 32) + (before + low < before ? 1 : 0);
    if (high) atomicAdd(&mass_high[bin], high);
  }
};

struct Bin {
  uint64_t mass, mass_before, count_before;
  uint32_t count, index;
};

struct alignas(16) Shared {
  Histogram histogram[2];
  uint64_t first_mass[kBins];  // of the whole row, by the first digit
  uint32_t first_count[kBins];
  uint64_t word[2];  // what this block tells the others
  uint64_t sums[32], sums_b[32];
  double parts[32];
  Bin found;
  uint32_t n_front;
  uint64_t front[kFront];  // ranks, in any order
};

struct Args {
  const float* logits;
  int64_t stride;
  const SampleRow* rows;
  int32_t* tokens;
  float* logprobs;
  int32_t* top_ids;
  float* top_logprobs;
  float* scratch;  // [n_row][n_vocab] where the part of a block does not fit its shared memory
  int32_t n_vocab, part, n_top;
  float one;  // the weight of the best token
};

// The blocks of a row.
template <int kParts>
struct Cluster {
  Shared& s;
  int turn = 0, histogram_turn = 0;

  __device__ static int rank() { return kParts == 1 ? 0 : static_cast<int>(blockIdx.x % kParts); }

  __device__ static void sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (kParts > 1) {
      asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
      return;
    }
#endif
    __syncthreads();
  }

  template <class T>
  __device__ static const T* at(const T* mine, int part) {  // the same variable in another block
    return kParts > 1 ? in_block(mine, static_cast<uint32_t>(part)) : mine;
  }

  // Every thread gets every block's word; they take turns between two places, so that one barrier is enough.
  __device__ void exchange(uint64_t word, uint64_t (&all)[kParts]) {
    if (threadIdx.x == 0) s.word[turn] = word;
    sync();
#pragma unroll
    for (int p = 0; p < kParts; ++p) all[p] = *at(&s.word[turn], p);
    turn ^= 1;
  }
  __device__ uint64_t max(uint64_t x) {
    uint64_t all[kParts];
    exchange(block_max(x, s.sums), all);
    uint64_t top = all[0];
#pragma unroll
    for (int p = 1; p < kParts; ++p) top = all[p] > top ? all[p] : top;
    return top;
  }
  __device__ uint64_t sum(uint64_t x) {
    uint64_t all[kParts], total = 0;
    exchange(block_sum(x, s.sums), all);
#pragma unroll
    for (int p = 0; p < kParts; ++p) total += all[p];
    return total;
  }
  __device__ double sum(double x) {
    uint64_t all[kParts];
    double total = 0;
    exchange(__double_as_longlong(block_sum(x, s.parts)), all);
#pragma unroll
    for (int p = 0; p < kParts; ++p) total += __longlong_as_double(all[p]);
    return total;
  }
};

// Larger is better; equal logits by id, lowest first. NaN comes after everything.
__device__ uint64_t rank_of(float x, int32_t id) {
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 is 0
  const uint32_t key = x != x ? 0 : bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t{key} << 32 | static_cast<uint32_t>(~id);
}
__device__ int32_t id_of(uint64_t rank) { return static_cast<int32_t>(~static_cast<uint32_t>(rank)); }
__device__ float logit_of(uint64_t rank) {
  const uint32_t key = static_cast<uint32_t>(rank >> 32);
  return __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key);
}

// Inclusive prefix sums.
__device__ uint64_t warp_prefix(uint64_t x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t other = __shfl_up_sync(kWarp, x, step);
    if (static_cast<int>(threadIdx.x % 32) >= step) x += other;
  }
  return x;
}
__device__ uint64_t block_prefix(uint64_t x, uint64_t* room) {
  const int warp = threadIdx.x / 32;
  x = warp_prefix(x);
  if (threadIdx.x % 32 == 31) room[warp] = x;
  __syncthreads();
  for (int w = 0; w < warp; ++w) x += room[w];
  return x;
}

// One block's part of a row, after penalties.
struct Part {
  float* x;
  int32_t begin, n;
  bool wide;  // x is aligned to 16 bytes

  template <class F>
  __device__ __forceinline__ void each(F&& f) const {  // f(logit, id)
    const int whole = wide ? n / 4 * 4 : 0;
#pragma unroll 2
    for (int i = threadIdx.x * 4; i < whole; i += kThreads * 4) {
      const float4 four = *reinterpret_cast<const float4*>(x + i);
      f(four.x, begin + i);
      f(four.y, begin + i + 1);
      f(four.z, begin + i + 2);
      f(four.w, begin + i + 3);
    }
    for (int i = whole + static_cast<int>(threadIdx.x); i < n; i += kThreads) f(x[i], begin + i);
  }
};

// The tokens that can still be drawn.
struct Front {
  const uint64_t* rank;
  int32_t n;

  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
    for (int i = threadIdx.x; i < n; i += kThreads) f(logit_of(rank[i]), id_of(rank[i]));
  }
};

struct Weights {
  float top, scale, fine, one;

  __device__ Weights(float top_, float temperature, float one_)
      : top(top_),
        scale(1.44269504f / temperature),
        fine(fminf(2048.0f / temperature, 1e30f)),  // the first digit tells apart tokens up to e^32 less likely than the best
        one(one_) {}
  __device__ uint64_t operator()(float x) const {
    const float w = x == top ? 1.0f : exp2f((x - top) * scale);
    return w > 0 ? __float2ull_rz(w * one) : 0;  // NaN: 0
  }
  // Where a token stands, best first: 16 bits of distance from the top, evenly spaced so that tokens spread over the digits; then the
  // exact order. The distance is a monotone function of the logit, so it never contradicts the order.
  __device__ uint32_t distance(float x) const { return static_cast<uint32_t>(fminf((top - x) * fine, 65535.0f)); }  // NaN: 65535
  __device__ uint64_t place(float x) const { return uint64_t{distance(x)} << 32 | static_cast<uint32_t>(~(rank_of(x, 0) >> 32)); }
};

constexpr int kPlaceDigits = 6, kDigits = 10;  // 48 bits of place, then 32 of id

__device__ bool shares(uint64_t place, uint32_t id, uint64_t bucket, uint32_t bucket_id, int digits) {
  if (digits <= kPlaceDigits) return (place ^ bucket) >> (48 - 8 * digits) == 0;
  return place == bucket && (id ^ bucket_id) >> (32 - 8 * (digits - kPlaceDigits)) == 0;
}
__device__ int digit_of(uint64_t place, uint32_t id, int digit) {
  return static_cast<int>(digit < kPlaceDigits ? place >> (40 - 8 * digit) & 255 : id >> (24 - 8 * (digit - kPlaceDigits)) & 255);
}

__device__ void clear(Histogram& h) {
  if (threadIdx.x < kBins) h.count[threadIdx.x] = h.mass_low[threadIdx.x] = h.mass_high[threadIdx.x] = 0;
}

// The bin in which the running mass (or the running count) exceeds `target`; each of the first 256 threads has a bin.
__device__ Bin locate(Shared& s, uint64_t mass, uint32_t count, uint64_t target, bool by_count) {
  const uint64_t mass_to = block_prefix(mass, s.sums), count_to = block_prefix(count, s.sums_b);
  const uint64_t to = by_count ? count_to : mass_to, here = by_count ? count : mass;
  if (threadIdx.x < kBins && target < to && target >= to - here) s.found = {mass, mass_to - mass, count_to - count, count, threadIdx.x};
  __syncthreads();
  const Bin bin = s.found;
  __syncthreads();
  return bin;
}
__device__ Bin locate_first(Shared& s, uint64_t target, bool by_count) {
  const bool mine = threadIdx.x < kBins;
  return locate(s, mine ? s.first_mass[threadIdx.x] : 0, mine ? s.first_count[threadIdx.x] : 0, target, by_count);
}

// Tokens is a Part, in all blocks of the cluster, or the Front, in one of them.
template <int kParts, class Tokens>
struct Search {
  Cluster<kParts>& cluster;
  const Tokens tokens;
  const Weights weights;
  // Result: the tokens that share `digits` digits with (bucket, bucket_id) are one token, and up to it, included, there is `through`.
  uint64_t bucket = 0, through = 0;
  uint32_t bucket_id = 0;
  int digits = 0;

  // Sums the blocks' histograms into the calling thread's bin.
  __device__ void collect(uint64_t* mass, uint32_t* count) {
    Histogram& mine = cluster.s.histogram[cluster.histogram_turn];
    cluster.sync();
    if (threadIdx.x < kBins) {
      uint64_t m = 0;
      uint32_t c = 0;
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        const Histogram* h = cluster.at(&mine, p);
        m += (uint64_t{h->mass_high[threadIdx.x]} << 32) + h->mass_low[threadIdx.x];
        c += h->count[threadIdx.x];
      }
      *mass = m;
      *count = c;
    }
    cluster.histogram_turn ^= 1;  // the other one was read by all before this barrier
    clear(cluster.s.histogram[cluster.histogram_turn]);
  }

  // The first digit of every token, the same for every search. Returns this thread's share of the mass of weights of at least `floor`.
  __device__ uint64_t first(float floor) {
    Shared& s = cluster.s;
    Histogram& h = s.histogram[cluster.histogram_turn];
    uint64_t above = 0, far_mass = 0;
    uint32_t far = 0;
    tokens.each([&](float x, int32_t) {
      const uint64_t w = weights(x);
      const int bin = static_cast<int>(weights.distance(x) >> 8);
      if (static_cast<float>(w) >= floor) above += w;
      if (bin == kBins - 1) {  // many of them, usually: not through atomics
        far_mass += w;
        ++far;
      } else {
        h.add(bin, 1, w);
      }
    });
    far = warp_sum(far);
    far_mass = warp_sum(far_mass);
    if (threadIdx.x % 32 == 0 && far) h.add(kBins - 1, far, far_mass);
    uint64_t mass = 0;
    uint32_t count = 0;
    collect(&mass, &count);
    if (threadIdx.x < kBins) s.first_mass[threadIdx.x] = mass, s.first_count[threadIdx.x] = count;
    __syncthreads();
    return above;
  }

  // The token at which the running mass (or the running count) exceeds `target`.
  __device__ void find(uint64_t target, bool by_count) {
    bucket = through = 0;
    bucket_id = 0;
    for (digits = 0; digits < kDigits;) {
      uint64_t mass = 0;
      uint32_t count = 0;
      if (digits > 0) {
        Histogram& h = cluster.s.histogram[cluster.histogram_turn];
        const uint32_t first_digit = static_cast<uint32_t>(bucket >> 40);
        tokens.each([&](float x, int32_t id) {
          if (weights.distance(x) >> 8 != first_digit) return;
          const uint64_t place = weights.place(x);
          if (shares(place, id, bucket, bucket_id, digits)) h.add(digit_of(place, id, digits), 1, weights(x));
        });
        collect(&mass, &count);
      }
      const Bin bin = digits == 0 ? locate_first(cluster.s, target, by_count) : locate(cluster.s, mass, count, target, by_count);
      target -= by_count ? bin.count_before : bin.mass_before;
      through += bin.mass_before;
      if (digits < kPlaceDigits) bucket |= uint64_t{bin.index} << (40 - 8 * digits);
      else bucket_id |= bin.index << (24 - 8 * (digits - kPlaceDigits));
      ++digits;
      if (bin.count == 1 || digits == kDigits) {
        through += bin.mass;
        return;
      }
    }
  }

  // Top-k, top-p and the draw, given the mass that min-p keeps (of all, without min-p). take(id) is called by one thread.
  template <class Take>
  __device__ void draw(const SampleRow& row, bool by_k, uint64_t kept, Take&& take) {
    if (by_k) {
      find(row.top_k - 1, true);
      kept = through < kept ? through : kept;
    }
    if (row.top_p < 1.0f) {
      find(share(row.top_p, kept) - 1, false);
      kept = through;
    }
    find(static_cast<uint64_t>(static_cast<double>(row.uniform) * static_cast<double>(kept)), false);
    tokens.each([&](float x, int32_t id) {
      if (shares(weights.place(x), id, bucket, bucket_id, digits)) take(id);
    });
  }

  // top_p of the mass, as the least sum that reaches it.
  __device__ static uint64_t share(float top_p, uint64_t mass) {
    const uint64_t want = static_cast<uint64_t>(ceil(static_cast<double>(top_p) * static_cast<double>(mass)));
    return want > 0 ? want : 1;
  }
};

// Collects the tokens whose first digit is at most `last`, at most kFront in all, in the first block.
template <int kParts>
__device__ Front gather(Cluster<kParts>& cluster, const Part& part, const Weights& weights, uint32_t last) {
  Shared& s = cluster.s;
  part.each([&](float x, int32_t id) {
    if (weights.distance(x) >> 8 <= last) s.front[atomicAdd(&s.n_front, 1)] = rank_of(x, id);
  });
  __syncthreads();
  uint64_t all[kParts];
  cluster.exchange(s.n_front, all);
  if (threadIdx.x == 0) s.n_front = 0;
  Front front{s.front, 0};
  if (cluster.rank() == 0) {
    uint64_t mine[kFront / kThreads];
    int begin = 0;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const int n = static_cast<int>(all[p]);
      const uint64_t* theirs = cluster.at(s.front, p);
#pragma unroll
      for (int j = 0; j < kFront / kThreads; ++j) {
        const int i = static_cast<int>(threadIdx.x) + j * kThreads - begin;
        if (i >= 0 && i < n) mine[j] = theirs[i];
      }
      begin += n;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kFront / kThreads; ++j)
      if (static_cast<int>(threadIdx.x) + j * kThreads < begin) s.front[threadIdx.x + j * kThreads] = mine[j];
    front.n = begin;
    __syncthreads();
  }
  return front;
}

template <int kParts>
__device__ __forceinline__ void sample_row(const Args& a, const bool resident) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  Cluster<kParts> cluster{s};
  const int64_t r = blockIdx.x / kParts;
  const int32_t n = a.n_vocab, begin = cluster.rank() * a.part, tid = threadIdx.x;
  const float* logits = a.logits + r * a.stride;
  Part part{nullptr, begin, ::max(0, ::min(a.part, n - begin)), a.stride % 4 == 0 && reinterpret_cast<uintptr_t>(a.logits) % 16 == 0};
  for (Histogram& h : s.histogram) clear(h);
  if (tid == 0) s.n_front = 0;
  pdl_wait();
  pdl_launch();
  if (resident) {
    part.x = reinterpret_cast<float*>(memory + sizeof(Shared));
    const int whole = part.wide ? part.n / 4 * 4 : 0;
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(part.x));
    for (int i = tid * 4; i < whole; i += kThreads * 4)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + 4 * i), "l"(logits + begin + i) : "memory");
    for (int i = whole + tid; i < part.n; i += kThreads)
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to + 4 * i), "l"(logits + begin + i) : "memory");
    part.wide = true;
  }
  const SampleRow row = a.rows[r];
  const bool changed = row.n_bias > 0 || row.n_seen > 0;
  if (resident) {
    asm volatile("cp.async.wait_all;" ::: "memory");
  } else if (changed) {
    part.wide = part.wide && n % 4 == 0 && reinterpret_cast<uintptr_t>(a.scratch) % 16 == 0;
    part.x = a.scratch + r * n + begin;
    for (int i = tid; i < part.n; i += kThreads) part.x[i] = logits[begin + i];
  } else {
    part.x = const_cast<float*>(logits) + begin;  // only read
  }
  __syncthreads();

  const auto best_of_thread = [&] {
    float most = -INFINITY;
    int32_t at = begin + ::min(tid, ::max(part.n - 1, 0));
    part.each([&](float x, int32_t id) {
      if (x > most) most = x, at = id;
    });
    return part.n > 0 ? rank_of(part.x[at - begin], at) : 0;
  };
  uint64_t mine = best_of_thread(), best = cluster.max(mine);

  float norm = 0;
  if (a.logprobs || a.n_top > 0) {
    const float top = logit_of(best);
    float sum = 0;
    part.each([&](float x, int32_t) { sum += expf(x - top); });
    norm = top + static_cast<float>(log(cluster.sum(static_cast<double>(sum))));
  }
  if (a.n_top > 0) {
    const auto put = [&](int64_t j, uint64_t rank) {
      const bool some = rank >> 32 != 0;  // not NaN
      a.top_ids[r * a.n_top + j] = some ? id_of(rank) : -1;
      a.top_logprobs[r * a.n_top + j] = some ? logit_of(rank) - norm : -INFINITY;
    };
    const Weights weights(logit_of(best), 1, a.one);
    Search<kParts, Part>{cluster, part, weights}.first(0);
    const Bin last = locate_first(s, a.n_top - 1, true);
    if (last.count_before + last.count <= kFront) {
      const Front front = gather(cluster, part, weights, last.index);
      for (int i = tid; i < front.n; i += kThreads) {
        int better = 0;
        for (int j = 0; j < front.n; ++j) better += front.rank[j] > front.rank[i];
        if (better < a.n_top) put(better, front.rank[i]);
      }
    } else {  // many, or equal ones: one after the other
      uint64_t next = best;
      for (int64_t j = 0; j < a.n_top; ++j) {
        if (cluster.rank() == 0 && tid == 0) put(j, next);
        if (mine == next) {
          mine = 0;
          part.each([&](float x, int32_t id) {
            const uint64_t rank = rank_of(x, id);
            if (rank < next && rank > mine) mine = rank;
          });
        }
        next = cluster.max(mine);
      }
    }
  }
  const auto take = [&](int32_t id) {
    a.tokens[r] = id;
    if (a.logprobs) a.logprobs[r] = logits[id] - norm;
  };

  if (changed) {  // each id is in a list once
    for (int i = tid; i < row.n_bias; i += kThreads) {
      const int at = row.bias_ids[i] - begin;
      if (at >= 0 && at < part.n) part.x[at] += row.bias_values[i];
    }
    __syncthreads();
    for (int i = tid; i < row.n_seen; i += kThreads) {
      const SeenToken seen = row.seen[i];
      const int at = seen.id - begin;
      if (at < 0 || at >= part.n) continue;
      float x = part.x[at];
      x = x > 0 ? x / row.repetition_penalty : x * row.repetition_penalty;
      if (seen.n_generated > 0) x -= static_cast<float>(seen.n_generated) * row.frequency_penalty + row.presence_penalty;
      part.x[at] = x;
    }
    __syncthreads();
    best = cluster.max(best_of_thread());
  }

  const float top = logit_of(best);
  if (row.temperature <= 0 || !(fabsf(top) < INFINITY)) {
    if (cluster.rank() == 0 && tid == 0) take(id_of(best));
  } else {
    const Weights weights(top, row.temperature, a.one);
    bool by_k = row.top_k > 0 && row.top_k < n;
    if (!by_k && row.top_p >= 1.0f && !(row.min_p > 0)) {  // the inverse of the cumulative distribution in the order of ids
      const int run = ((part.n + kThreads - 1) / kThreads) | 1;  // tokens of a thread; odd, so that a warp's threads read different banks
      const int from = ::min(tid * run, part.n), end = ::min(from + run, part.n);
      uint64_t mass = 0;
#pragma unroll 4
      for (int i = from; i < end; ++i) mass += weights(part.x[i]);
      const uint64_t to = block_prefix(mass, s.sums);
      if (tid == kThreads - 1) s.found.mass = to;
      __syncthreads();
      uint64_t all[kParts], total = 0, before = 0;
      cluster.exchange(s.found.mass, all);
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        if (p < cluster.rank()) before += all[p];
        total += all[p];
      }
      const uint64_t target = static_cast<uint64_t>(static_cast<double>(row.uniform) * static_cast<double>(total)) - before;  // or wraps
      const bool here = target < to && target >= to - mass;
      if (__syncthreads_or(here)) {  // a warp goes through the run of that thread
        if (here) {
          s.found.mass_before = target - (to - mass);
          s.found.index = from;
          s.found.count = end - from;
        }
        __syncthreads();
        uint64_t passed = 0;
        for (int i = tid; tid < 32 && i - tid < static_cast<int>(s.found.count); i += 32) {
          const int at = static_cast<int>(s.found.index) + i;
          const uint64_t w = i < static_cast<int>(s.found.count) ? weights(part.x[at]) : 0;
          const uint64_t through = passed + warp_prefix(w), wanted = s.found.mass_before;
          if (wanted < through && wanted >= through - w) take(begin + at);
          passed = __shfl_sync(kWarp, through, 31);
        }
      }
    } else {
      Search<kParts, Part> search{cluster, part, weights};
      const uint64_t kept = cluster.sum(search.first(row.min_p * a.one));
      Bin last{0, 0, 0, static_cast<uint32_t>(n), kBins - 1};  // nothing after it can be drawn or decides what can
      if (row.min_p > 0) last = locate_first(s, kept - 1, false);
      if (by_k) {
        const Bin bin = locate_first(s, row.top_k - 1, true);
        by_k = bin.index <= last.index;  // else min-p keeps fewer
        if (by_k) last = bin;
      }
      if (row.top_p < 1.0f && !by_k) {
        const Bin bin = locate_first(s, search.share(row.top_p, kept) - 1, false);
        if (bin.index < last.index) last = bin;
      }
      if (last.count_before + last.count <= kFront) {
        const Front front = gather(cluster, part, weights, last.index);
        if (cluster.rank() == 0) {
          Cluster<1> alone{s, 0, cluster.histogram_turn};
          Search<1, Front>{alone, front, weights}.draw(row, by_k, kept, take);
        }
      } else {
        search.draw(row, by_k, kept, take);
      }
    }
  }
  cluster.sync();  // a block's shared memory stays until all have read it
}

// Every GPU needs one of the two forms; the other is left empty, which halves the time to compile.
template <int kParts>
__global__ void __launch_bounds__(kThreads) sample_kernel(const Args a, const bool resident) {
#if defined(__CUDA_ARCH__)
  if constexpr ((kParts > 1) == (__CUDA_ARCH__ >= 900)) sample_row<kParts>(a, resident);
#endif
}

struct Split {
  int32_t parts, part;
  bool resident;
  int64_t smem;
};

Split split(const CudaStream& s, int64_t n_vocab) {
  Split p;
  p.parts = s.arch >= 90 ? kClusterParts : 1;
  p.part = static_cast<int32_t>(((n_vocab + p.parts - 1) / p.parts + 3) / 4 * 4);
  p.smem = static_cast<int64_t>(sizeof(Shared)) + 4 * int64_t{p.part};
  p.resident = p.smem <= s.smem_per_block;
  if (!p.resident) p.smem = sizeof(Shared);
  return p;
}

}  // namespace

int64_t sample_scratch_bytes(const CudaStream& s, int64_t n_row, int64_t n_vocab) {
  return split(s, n_vocab).resident ? 0 : 4 * n_row * n_vocab;
}

void sample(const CudaStream& s, const Sample& a) {
  const int64_t n_row = a.logits.shape[0], n_vocab = a.logits.shape[1];
  const Split p = split(s, n_vocab);
  int bits = 0;
  while (int64_t{1} << bits < n_vocab) ++bits;
  const Args args{a.logits.as<float>(),
                  a.logits.row_stride,
                  a.rows,
                  a.tokens.as<int32_t>(),
                  a.logprobs.as<float>(),
                  a.top_ids.as<int32_t>(),
                  a.top_logprobs.as<float>(),
                  a.scratch.as<float>(),
                  static_cast<int32_t>(n_vocab),
                  p.part,
                  static_cast<int32_t>(a.top_ids ? a.top_ids.shape[1] : 0),
                  std::ldexp(1.0f, 62 - bits)};
  if (p.parts == 1) launch(s, sample_kernel<1>, dim3(n_row), kThreads, p.smem, args, p.resident);
  else launch_clusters(s, sample_kernel<kClusterParts>, dim3(n_row * kClusterParts), kThreads, p.smem, kClusterParts, args, p.resident);
}

}  // namespace prt::cuda
