// Decode attention: one query row per entry over paged keys, at the speed of reading them once.
//
// Work. The visible keys of an entry are cut into slices of 16 J keys (a slice lies in one page). A head block is the up to 8 NB query
// heads that share a kv head (more than that: several blocks, each reading the keys again). The slices of all (entry, head block) pairs,
// the segments, stand in one line, and CTA b takes the b-th stretch of it. Lengths are read on the device: a captured launch serves
// growing contexts.
//
// Inside a CTA the warps take slices in turn, each alone: from device memory straight into the registers that the tensor cores read,
// the next slice's loads on their way while this one is computed. No shared memory and no barrier until a stretch leaves a segment.
//   S^T [keys][heads] = K Q^T    M = 16 keys, so that the 8 columns of a tile hold the heads of a group, not the 16 rows
//   O^T [d][heads]    = V^T P^T  M = 16 of d; P^T comes from S^T by a transposition in registers
// The order of d in the first product's sum, and of the rows in the second's result, is free: it is chosen so that every thread reads
// 16 bytes of a row (K: the 4 lanes of a row 64 bytes together, V: the 8 lanes 128 bytes).
//
// Merging. The warps' (max, sum, accumulator) meet in shared memory, a warp for each head; a segment cut between CTAs goes to scratch, and
// the last warp to arrive with a head's part adds them up in the order of the CTAs.
//
// docs/kernels/attention_decode.md has the measurements, and what lost.
#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "ops/attention_cuda.h"
#include "ops/attention_merge.cuh"
#include "ops/attention_row.cuh"
#include "ops/cuda_table.h"

namespace prt::cuda {
namespace {

constexpr int kPage = static_cast<int>(kPageTokens);
// The running maximum is raised only when a score exceeds it by this many powers of two: P stays below 2^8, far from any limit.
constexpr float kSlack = 8;

struct DecodeArgs {
  DecodeOut to;               // to.rows: query heads of a head block
  const void *q, *k, *v;      // q: rows of q_stride elements
  const int32_t *kv_len, *page_table;
  int64_t q_stride, table_stride;
  int32_t n_entry, h_kv, group, window;
  int32_t n_split;            // head blocks that a group is cut into
  float scale;                // times log2(e)
};
// What Attention says of its optional operands; with an empty one the kernel is what it was without them.
struct NoScores {
  static constexpr bool kThere = false;
};
struct Scores {
  static constexpr bool kThere = true;
  float* scores;  // [n_entry][h_q][room], or null
  const int32_t* state;
  int64_t room;
  float scale;
};

// A head block of an entry, and its place [begin, end) in the line of slices.
struct Segment {
  int entry, kv_head, part, begin, end;
  int low, high;  // visible keys
};

// Where slices come from: the pages of each entry.
template <int kKeys, class More>
struct Pages {
  const DecodeArgs& a;
  const More& more;

  // Sets entry, low and high; returns the number of slices. An entry without keys gets a masked one, so that its output is written; one
  // that is to be left alone gets none.
  __device__ int measure(Segment& s, int entry) const {
    s.entry = entry;
    if constexpr (More::kThere)
      if (more.state && more.state[entry] < 0) {
        s.low = s.high = 0;
        return 0;
      }
    s.high = a.kv_len[entry];
    s.low = a.window > 0 ? max(s.high - a.window, 0) : 0;
    return max((s.high + kKeys - 1) / kKeys - s.low / kKeys, 1);
  }
  __device__ void next(Segment& s) const {
    int n = s.end - s.begin;
    if (++s.part == a.n_split) {
      s.part = 0;
      if (++s.kv_head == a.h_kv) {
        s.kv_head = 0;
        n = measure(s, s.entry + 1);
      }
    }
    s.begin = s.end;
    s.end += n;
  }
  __device__ int key(const Segment& s, int slice) const { return (s.low / kKeys + slice - s.begin) * kKeys; }
  __device__ int page(const Segment& s, int slice) const {
    return s.high > 0 ? a.page_table[s.entry * a.table_stride + key(s, slice) / kPage] : 0;
  }
  __device__ int row(const Segment& s, int slice) const { return s.kv_head * kPage + key(s, slice) % kPage; }
};

struct Stretch {
  int begin, end, length;  // length: of a whole stretch
};

// Every warp for itself: the stretch of this CTA and the segment it starts in. False where there is nothing to do.
//
// A change of segment inside a CTA costs 2 us (queries to load, sums to merge) and a merge across CTAs as much, so stretches are fitted to
// segments where that leaves few CTAs idle: with fewer segments than CTAs each gets CTAs of its own (its place in the line is rounded up
// to whole stretches), and with equal lengths each CTA gets whole segments.
template <int kKeys, class More>
__device__ bool find_stretch(const Pages<kKeys, More>& source, int at_least, Segment& s, Stretch& stretch) {
  const DecodeArgs& a = source.a;
  const int lane = threadIdx.x % 32, per_lane = (a.n_entry + 31) / 32, n_block = a.h_kv * a.n_split, n_cta = static_cast<int>(gridDim.x);
  const int e0 = min(lane * per_lane, a.n_entry), e1 = min(e0 + per_lane, a.n_entry);
  const auto sum_all = [](int x) { return static_cast<int>(__reduce_add_sync(~0u, static_cast<uint32_t>(x))); };
  const auto up = [](int x, int by) { return (x + by - 1) / by; };
  int sum = 0, longest = 0;
  for (int e = e0; e < e1; ++e) {
    const int n = source.measure(s, e);
    sum += n;
    longest = max(longest, n);
  }
  longest = __reduce_max_sync(~0u, longest);
  int total = sum_all(sum) * n_block;
  if constexpr (More::kThere)
    if (total == 0) return false;
  const int even = up(total, n_cta), n_segment = a.n_entry * n_block;
  int length = even;
  bool own = n_segment <= n_cta;
  if (own) {
    length = up(longest, n_cta / n_segment);  // enough if all were of the longest
    if (per_lane == 1)
      for (int low = even; length - low > even / 16 + 1;) {
        const int middle = (low + length) / 2;
        (sum_all(up(sum, middle)) * n_block <= n_cta ? length : low) = middle;
      }
    own = length <= even + even / 4 || length <= at_least;
    if (!own) length = even;
  } else if (longest * n_segment == total) {
    const int whole = up(n_segment, n_cta) * longest;
    if (whole <= even + even / 8) length = whole;
  }
  length = max(length, min(longest, at_least));
  const auto place = [&](int n) { return own ? up(n, length) * length : n; };
  if (own) {
    sum = 0;
    for (int e = e0; e < e1; ++e) sum += place(source.measure(s, e));
  }
  int until = sum;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const int x = __shfl_up_sync(~0u, until, i);
    if (lane >= i) until += x;
  }
  total = __shfl_sync(~0u, until, 31) * n_block;
  if (static_cast<int64_t>(blockIdx.x) * length >= total) return false;
  const int begin = static_cast<int>(blockIdx.x) * length;

  const int owner = __ffs(__ballot_sync(~0u, until * n_block > begin)) - 1;
  int e = __shfl_sync(~0u, e0, owner), at = __shfl_sync(~0u, until - sum, owner) * n_block, n = source.measure(s, e);
  for (; at + place(n) * n_block <= begin; n = source.measure(s, ++e)) at += place(n) * n_block;
  const int block = (begin - at) / place(n);
  s.kv_head = block / a.n_split, s.part = block % a.n_split;
  s.begin = at + block * place(n);
  s.end = s.begin + n;
  stretch = {begin, min(begin + length, own ? s.end : total), length};
  return true;
}

// Of a row of V, thread g reads D / 8 elements, by twos; word w holds d_of(g, w) and the one after it: rows g and g + 8 of O^T tile w.
template <int D>
__device__ __forceinline__ int d_of(int g, int w) {
  if (w < D / 64 * 4) return w / 4 * 64 + 8 * g + w % 4 * 2;
  w -= D / 64 * 4;
  if (D % 64 >= 32 && w < 2) return D / 64 * 64 + 4 * g + 2 * w;
  return D / 32 * 32 + 2 * g;
}
template <class T, int D>
__device__ __forceinline__ void load_value_row(uint32_t (&r)[D / 16], const T* row, int g) {
  constexpr int q = D / 64 * 4;
#pragma unroll
  for (int i = 0; i < D / 64; ++i) {
    const uint4 x = load_once_16(row + d_of<D>(g, 4 * i));
    r[4 * i] = x.x, r[4 * i + 1] = x.y, r[4 * i + 2] = x.z, r[4 * i + 3] = x.w;
  }
  if constexpr (D % 64 >= 32) {
    const uint2 x = load_once_8(row + d_of<D>(g, q));
    r[q] = x.x, r[q + 1] = x.y;
  }
  if constexpr (D % 32 != 0) r[D / 16 - 1] = load_once_4(row + d_of<D>(g, D / 16 - 1));
}

// Where K, V and the accumulators fill the registers, each warp keeps its Q in shared memory.
template <int D>
constexpr bool kParkQ = D > 128;
__device__ __forceinline__ void load_parked(uint32_t* r, const uint4* from) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem_addr(from)));
}

template <class T, int D, int NB, int W, int J, class More>
__global__ void __launch_bounds__(32 * W, 1)
    attention_decode_kernel(const __grid_constant__ DecodeArgs a, const __grid_constant__ More more) {
  constexpr int kKeys = 16 * J;
  extern __shared__ uint4 memory[];  // the warps' parts, then their Q
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  uint4* parked_q = memory + (W * merge_bytes<D>(a.to.rows)) / 16 + warp * NB * D + lane;
  // kv_len and page_table were copied here by the host and not written by a kernel, so that only what follows the first look-up waits
  // for the kernel before this one. `state` may be written by one.
  const Pages<kKeys, More> source{a, more};
  if constexpr (More::kThere) pdl_wait();
  Segment here;
  Stretch stretch;
  if (!find_stretch(source, 2 * W, here, stretch)) return;

  // The slice to be loaded next: its page number is asked for one slice earlier.
  Segment ahead = here;
  int to_load = stretch.begin + warp, page = 0, row = 0;
  const auto look_up = [&] {
    if (to_load >= stretch.end) return;
    while (to_load >= ahead.end) source.next(ahead);
    page = source.page(ahead, to_load);
    row = source.row(ahead, to_load);
  };
  uint32_t k[J][2][D / 8], v[J][4][D / 16];
  const auto offset = [&] { return (static_cast<int64_t>(page) * a.h_kv * kPage + row) * D; };
  const auto load_k = [&](int64_t at) {
#pragma unroll
    for (int i = 0; i < 2 * J; ++i) load_row<T, D>(k[i / 2][i % 2], static_cast<const T*>(a.k) + at + (8 * i + g) * D, c);
  };
  const auto load_v = [&](int64_t at) {
#pragma unroll
    for (int i = 0; i < 4 * J; ++i)
      load_value_row<T, D>(v[i / 4][i % 4], static_cast<const T*>(a.v) + at + (i / 2 * 8 + 2 * c + i % 2) * D, g);
  };
  look_up();
  pdl_wait();
  if (to_load < stretch.end) {
    const int64_t at = offset();
    load_k(at);
    load_v(at);
    to_load += W;
    look_up();
  }
  pdl_launch();

  for (int slice = stretch.begin + warp;; source.next(here)) {
    if constexpr (More::kThere)
      while (here.begin == here.end) source.next(here);
    const int heads = min(a.to.rows, a.group - here.part * a.to.rows), head0 = here.kv_head * a.group + here.part * a.to.rows;

    uint32_t q[NB][D / 8];
#pragma unroll
    for (int b = 0; b < NB; ++b) {
#pragma unroll
      for (int i = 0; i < D / 8; ++i) q[b][i] = 0;
      if (8 * b + g < heads) load_row<T, D>(q[b], static_cast<const T*>(a.q) + here.entry * a.q_stride + (head0 + 8 * b + g) * D, c);
      if constexpr (kParkQ<D>) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < D / 32; ++i) parked_q[(b * D / 32 + i) * 32] = {q[b][4 * i], q[b][4 * i + 1], q[b][4 * i + 2], q[b][4 * i + 3]};
        __syncwarp();
      }
    }
    float o[NB][D / 16][4] = {}, top[NB][2], total[NB][2];  // this thread's heads: 8 b + 2 c and the next; total: of its keys only
#pragma unroll
    for (int b = 0; b < NB; ++b) top[b][0] = top[b][1] = kNegInf, total[b][0] = total[b][1] = 0;

    for (const int stop = min(here.end, stretch.end); slice < stop; slice += W) {
      float s[NB][J][4] = {};
#pragma unroll
      for (int i = 0; i < D / 16; ++i) {
        if constexpr (kParkQ<D>)
          if (i % 2 == 0) {
#pragma unroll
            for (int b = 0; b < NB; ++b) load_parked(q[b] + 2 * i, parked_q + (b * D / 32 + i / 2) * 32);
          }
#pragma unroll
        for (int j = 0; j < J; ++j) {
          const uint32_t keys[4] = {k[j][0][2 * i], k[j][1][2 * i], k[j][0][2 * i + 1], k[j][1][2 * i + 1]};
#pragma unroll
          for (int b = 0; b < NB; ++b) mma_16816<T>(s[b][j], keys, q[b][2 * i], q[b][2 * i + 1]);
        }
      }
      const bool goes_on = to_load < stretch.end;
      const int64_t at = offset();
      if (goes_on) load_k(at);

      const int key = source.key(here, slice), low = here.low - key, high = here.high - key;
      const bool whole = low <= 0 && high >= kKeys;
      if constexpr (More::kThere)
        if (more.scores) {
          float* to = more.scores + (int64_t{here.entry} * a.h_kv * a.group + head0) * more.room + key;
#pragma unroll
          for (int b = 0; b < NB; ++b)
#pragma unroll
            for (int j = 0; j < J; ++j)
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const int n = 16 * j + 8 * (i / 2) + g, head = 8 * b + 2 * c + i % 2;
                if (head < heads && n >= low && n < high) to[head * more.room + n] = s[b][j][i] * more.scale;
              }
        }
      if (!whole) {
#pragma unroll
        for (int j = 0; j < J; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int n = 16 * j + 8 * (i / 2) + g;
            if (n < low || n >= high)
#pragma unroll
              for (int b = 0; b < NB; ++b) s[b][j][i] = kNegInf;
          }
      }
      bool rises = false;
      float highest[NB][2];
#pragma unroll
      for (int b = 0; b < NB; ++b)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          highest[b][i] = s[b][0][i];
#pragma unroll
          for (int n = 1; n < 2 * J; ++n) highest[b][i] = fmaxf(highest[b][i], s[b][n / 2][n % 2 * 2 + i]);
          highest[b][i] *= a.scale;
          rises |= highest[b][i] > top[b][i] + kSlack;
        }
      if (__any_sync(~0u, rises)) {
#pragma unroll
        for (int b = 0; b < NB; ++b)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float x = fmaxf(highest[b][i], top[b][i]);
#pragma unroll
            for (int n = 4; n < 32; n *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, n));
            const float f = pow2(top[b][i] - (x == kNegInf ? 0 : x));
            top[b][i] = x;
            total[b][i] *= f;
#pragma unroll
            for (int t = 0; t < D / 16; ++t) o[b][t][i] *= f, o[b][t][i + 2] *= f;
          }
      }
      uint32_t p[NB][J][2];
#pragma unroll
      for (int b = 0; b < NB; ++b) {
        const float base[2] = {top[b][0] == kNegInf ? 0 : top[b][0], top[b][1] == kNegInf ? 0 : top[b][1]};
#pragma unroll
        for (int j = 0; j < J; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            s[b][j][i] = pow2(s[b][j][i] * a.scale - base[i % 2]);
            total[b][i % 2] += s[b][j][i];
          }
          p[b][j][0] = transpose_8x8(pack2<T>(s[b][j][0], s[b][j][1]));
          p[b][j][1] = transpose_8x8(pack2<T>(s[b][j][2], s[b][j][3]));
        }
      }
      if (!whole) {  // rows outside may hold anything, and 0 NaN is NaN
#pragma unroll
        for (int i = 0; i < 4 * J; ++i) {
          const int n = i / 2 * 8 + 2 * c + i % 2;
          if (n < low || n >= high)
#pragma unroll
            for (int w = 0; w < D / 16; ++w) v[i / 4][i % 4][w] = 0;
        }
      }
#pragma unroll
      for (int t = 0; t < D / 16; ++t)
#pragma unroll
        for (int j = 0; j < J; ++j) {
          const uint32_t values[4] = {__byte_perm(v[j][0][t], v[j][1][t], 0x5410), __byte_perm(v[j][0][t], v[j][1][t], 0x7632),
                                      __byte_perm(v[j][2][t], v[j][3][t], 0x5410), __byte_perm(v[j][2][t], v[j][3][t], 0x7632)};
#pragma unroll
          for (int b = 0; b < NB; ++b) mma_16816<T>(o[b][t], values, p[b][j][0], p[b][j][1]);
        }
      if (goes_on) {
        load_v(at);
        to_load += W;
        look_up();
      }
    }

    uint8_t* parts = reinterpret_cast<uint8_t*>(memory);
    float* values = reinterpret_cast<float*>(parts + warp * merge_bytes<D>(a.to.rows));
    float2* sums = reinterpret_cast<float2*>(values + a.to.rows * kPad<D> * 4);
#pragma unroll
    for (int b = 0; b < NB; ++b)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int n = 4; n < 32; n *= 2) total[b][i] += __shfl_xor_sync(~0u, total[b][i], n);
        const int head = 8 * b + 2 * c + i;
        if (head >= heads) continue;
        float* to = values + head * kPad<D> * 4;
#pragma unroll
        for (int t = 0; t < D / 16; t += 2)  // what two tiles hold lies side by side
          if (t + 1 < D / 16)
            *reinterpret_cast<float4*>(to + d_of<D>(g, t)) = {o[b][t][i], o[b][t][i + 2], o[b][t + 1][i], o[b][t + 1][i + 2]};
          else *reinterpret_cast<float2*>(to + d_of<D>(g, t)) = {o[b][t][i], o[b][t][i + 2]};
        if (g == 0) sums[head] = {top[b][i], total[b][i]};
      }
    __syncthreads();
    merge<T, D, W, D == 128 ? 16 : 4, More::kThere>(
        a.to, {here.entry, head0, heads, here.begin / stretch.length, (here.end - 1) / stretch.length}, parts, merge_bytes<D>(a.to.rows));
    __syncthreads();
    if (here.end >= stretch.end) break;
  }
}

// Query heads of a head block: at the common sizes a group of up to 16 stays together.
int64_t block_rows(int64_t group, int64_t d) {
  const int64_t most = d == 64 || d == 128 ? 16 : 8, blocks = (group + most - 1) / most;
  return (group + blocks - 1) / blocks;
}

DecodeArgs decode_args(const CudaStream& stream, const Attention& a) {
  const int64_t d = a.k_pages.shape[3], h_kv = a.k_pages.shape[1], group = a.q.shape[1] / d / h_kv, rows = block_rows(group, d);
  DecodeArgs args{};
  args.to = {a.out.data,
             a.scratch.as<float>(),
             stream.counters,
             a.out.row_stride,
             static_cast<int32_t>(rows),
             a.log_total.as<float>(),
             static_cast<int32_t>(a.q.shape[1] / d)};
  args.q = a.q.data, args.k = a.k_pages.data, args.v = a.v_pages.data;
  args.kv_len = a.kv_len.as<int32_t>(), args.page_table = a.page_table.as<int32_t>();
  args.q_stride = a.q.row_stride, args.table_stride = a.page_table.row_stride;
  args.n_entry = static_cast<int32_t>(a.kv_len.shape[0]), args.h_kv = static_cast<int32_t>(h_kv), args.group = static_cast<int32_t>(group);
  args.n_split = static_cast<int32_t>((group + rows - 1) / rows);
  args.window = static_cast<int32_t>(std::min<int64_t>(a.window, 1 << 30)), args.scale = a.scale * 1.44269504f;
  return args;
}

template <class T, int D, int NB, int W, int J, class More>
void run(const CudaStream& stream, const DecodeArgs& a, const More& more) {
  const int64_t smem = W * (merge_bytes<D>(a.to.rows) + (kParkQ<D> ? 16 * NB * D : 0));
  prefer_l1(attention_decode_kernel<T, D, NB, W, J, More>);
  launch(stream, attention_decode_kernel<T, D, NB, W, J, More>, dim3(static_cast<uint32_t>(stream.n_sm)), dim3(32 * W), smem, a, more);
}

// d_head -> warps and keys of a slice: 60 to 128 KB of keys and values on their way per SM. At d_head 128, 12 warps take 1 to 4 % longer
// than 8, 16 (which spill) 3 to 17 %, and 8 with slices of 32 keys 1 to 5 %.
template <class T, class More>
void decode(const CudaStream& stream, const DecodeArgs& a, int64_t d, const More& more) {
  switch (d) {
    case 64: return a.to.rows > 8 ? run<T, 64, 2, 8, 1>(stream, a, more) : run<T, 64, 1, 12, 2>(stream, a, more);
    case 80: return run<T, 80, 1, 12, 1>(stream, a, more);
    case 96: return run<T, 96, 1, 12, 1>(stream, a, more);
    case 128: return a.to.rows > 8 ? run<T, 128, 2, 8, 1>(stream, a, more) : run<T, 128, 1, 8, 1>(stream, a, more);
    case 256: return run<T, 256, 1, 8, 1>(stream, a, more);
  }
}

}  // namespace

int64_t attention_scratch_bytes(const CudaStream& stream, int64_t n_decode, int64_t h_q, int64_t h_kv, int64_t d_head) {
  return n_decode == 0 ? 0 : 2 * stream.n_sm * block_rows(h_q / h_kv, d_head) * (d_head + 2) * 4;
}

void attention_decode(const CudaStream& stream, const Attention& a) {
  const int64_t d = a.k_pages.shape[3];
  const DType type = a.k_pages.dtype;
  const auto aligned = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.row_stride % 8 == 0; };
  const bool fast = type != DType::f32 && (d == 64 || d == 80 || d == 96 || d == 128 || d == 256) && aligned(a.q) && aligned(a.out) &&
                    aligned(a.k_pages) && aligned(a.v_pages);
  if (a.kv_len.shape[0] == 0) return;
  if (!fast) return attention_any(stream, a);
  const DecodeArgs args = decode_args(stream, a);
  const auto with = [&](const auto& more) {
    if (type == DType::bf16) decode<bf16>(stream, args, d, more);
    else decode<f16>(stream, args, d, more);
  };
  if (a.scores || a.state) with(Scores{a.scores.as<float>(), a.state.as<int32_t>(), a.scores ? a.scores.shape[2] : 0, a.scale});
  else with(NoScores{});
}

}  // namespace prt::cuda
