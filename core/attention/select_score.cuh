// The first launch of `select`: the key of every cluster for every query head, its mass in the tail, and the exact mass of the rows outside
// the index. Bound by the bytes of the index; every warp is on its own, with its next tiles on their way to shared memory.
#pragma once
#include "attention/select_cuda.cuh"
#include "cuda/vec.cuh"

namespace prt::cuda::selecting {

constexpr int kScoreWarps = 16, kDeep = 2;

// Two f8 (e4m3) to two f16: exact.
__device__ __forceinline__ uint32_t f8_to_f16(uint32_t x) {
  uint32_t y;
#if __CUDA_ARCH__ >= 890
  asm("{\n.reg .b16 h;\ncvt.u16.u32 h, %1;\ncvt.rn.f16x2.e4m3x2 %0, h;\n}" : "=r"(y) : "r"(x));
#else  // exponents are 8 apart
  x = (x & 0xff) | (x & 0xff00) << 8;
  y = (x & 0x00800080) << 8 | (x & 0x007f007f) << 7;
  asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(y) : "r"(0x5c005c00));
#endif
  return y;
}
// Four f8 as f16: the first two, the others. Or, by shifts, which other units do: the first and the third, the second and the fourth, times
// 2^-8, and for the variance without a sign.
__device__ constexpr bool by_shifts(int which) { return which == 1; }  // 0: centroid, 1: variance
__device__ __forceinline__ uint2 unpack(int which, uint32_t x) {
  if (!by_shifts(which)) return {f8_to_f16(x), f8_to_f16(x >> 16)};
  uint2 y{x << 7 & 0x3f803f80, x >> 1 & 0x3f803f80};
  if (which == 0) y.x |= x << 8 & 0x80008000, y.y |= x & 0x80008000;
  return y;
}
__device__ __forceinline__ float f8_to_float(uint8_t x) {
  const uint32_t y = f8_to_f16(x);
  return __low2float(*reinterpret_cast<const __half2*>(&y));
}

// As on the CPU; in base 2 all three are log2(e) times what they are there.
__device__ __forceinline__ float spread_gain(float half_variance, float log_n) {
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(half_variance * log_n));
  return half_variance > log_n ? 2 * root - log_n : half_variance;
}

// Tiles of 32 entries, one after the other: those of an entry's clusters, then those of its rows outside the index. A lane knows an entry.
struct Tiles {
  Entry mine;
  int first_entry, end, total;

  __device__ Tiles(const SelectArgs& a, int first) : first_entry(first) {
    const int lane = threadIdx.x % 32;
    mine = {};
    if (first + lane < a.n_entry) mine = Entry(a, first + lane);
    end = scan_warp(mine.n_cluster > 0 ? cluster_tiles(mine) + mine.open_tiles() : 0);  // without clusters there is nothing to choose
    total = __shfl_sync(kWarp, end, 31);
  }
  __device__ static int cluster_tiles(const Entry& e) { return (e.n_cluster + kTile - 1) / kTile; }
};
// Goes through the tiles of a warp.
struct Cursor {
  Entry of;
  int position, entry, first, end, n_cluster_tile;  // first .. end: the positions of the entry
  int index;
  bool rows;

  __device__ void find(const Tiles& t) {  // after `position` has moved
    if (position >= t.total) return;
    if (position >= end) {
      const int i = __popc(__ballot_sync(kWarp, t.end <= position));
      end = __shfl_sync(kWarp, t.end, i);
      first = __shfl_sync(kWarp, t.end, max(i - 1, 0));
      if (i == 0) first = 0;
      of.len = __shfl_sync(kWarp, t.mine.len, i), of.first_page = __shfl_sync(kWarp, t.mine.first_page, i);
      of.end_page = __shfl_sync(kWarp, t.mine.end_page, i), of.n_cluster = __shfl_sync(kWarp, t.mine.n_cluster, i);
      entry = t.first_entry + i;
      n_cluster_tile = Tiles::cluster_tiles(of);
    }
    index = position - first;
    rows = index >= n_cluster_tile;
    if (rows) index -= n_cluster_tile;
  }
};

template <class T, int D>
struct Scorer {
  // A stage holds, for each lane, what it will read itself: of a tile 2 centroids and 2 variances, or 2 rows, and 2 ranges.
  static constexpr int kPieces = D / 16, kStage = kPieces * 512 + 512, kStages = D > 64 ? kDeep : 2 * kDeep;
  static constexpr int kPitch = (D + 8) * 2;  // bytes of a query, so that 8 lanes read from different banks
  static int smem(int group) { return D > 0 ? kStages * kStage + 3 * group * kPitch : 0; }  // of a warp

  const SelectArgs& a;
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  int kv_head, unit;
  int place;  // of the entry in hand
  char* memory;  // of this warp: its stages, then q and q^2 of the group in f16, and q
  float scale[2];  // of head `lane`: what a product with q, with q^2 is to be multiplied by

  __device__ explicit Scorer(const SelectArgs& args) : a(args) {
    extern __shared__ uint4 shared[];
    const int warp = threadIdx.x / 32, at = blockIdx.x * (blockDim.x / 32) + warp;
    kv_head = at % a.h_kv, unit = at / a.h_kv;
    memory = reinterpret_cast<char*>(shared) + warp * (kStages * kStage + 3 * a.group * kPitch);
    scale[0] = a.scale * kLog2e, scale[1] = a.fit ? 0 : 0.5f * a.scale * a.scale * kLog2e;
  }
  __device__ int page_at(const Cursor& t, int page) const { return a.page_table[t.entry * a.table_stride + page]; }
  __device__ int64_t slot_of(int page, int j) const {
    return (int64_t{page} * a.h_kv + kv_head) * a.n_slot + (j - a.page_of_cluster(j) * a.n_slot);
  }
  __device__ const T* open_rows(const Cursor& t, int page) const {
    return static_cast<const T*>(a.k) + ((int64_t{page} * a.h_kv + kv_head) * kPage + t.of.open_row(t.index) % kPage) * a.d;
  }

  // ---- a tile on its way to a stage. What is past the end is the last one again.
  __device__ int cluster_of(const Cursor& t, int i) const { return min(kTile * t.index + 8 * i + g, t.of.n_cluster - 1); }
  __device__ void find_pages(const Cursor& t, int (&page)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      page[i] = page_at(t, t.rows ? t.of.open_row(t.index) / kPage : t.of.first_page + a.page_of_cluster(cluster_of(t, i)));
  }
  __device__ void fetch(const Cursor& t, const int (&page)[2], int stage) const {
    const uint32_t at = smem_addr(memory + stage * kStage), to = at + lane * 16;
    if (t.rows) {
      const T* row = open_rows(t, page[0]) + 8 * c;
      const int last = t.of.len - t.of.open_row(t.index) - 1;
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int x = 0; x < D / 32; ++x) cp_async_16(to + (i * D / 32 + x) * 512, row + min(8 * i + g, last) * D + 32 * x);
      return;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t slot = slot_of(page[i], cluster_of(t, i));
#pragma unroll
      for (int x = 0; x < D / 64; ++x) {
        cp_async_16(to + (i * D / 64 + x) * 512, a.centroid + slot * D + 64 * x + 16 * c);
        cp_async_16(to + ((2 + i) * D / 64 + x) * 512, a.variance + slot * D + 64 * x + 16 * c);
      }
      cp_async_8(at + kPieces * 512 + (32 * i + lane) * 8, a.range + slot);
    }
  }
  __device__ uint4 piece(int stage, int i) const { return reinterpret_cast<const uint4*>(memory + stage * kStage)[32 * i + lane]; }
  __device__ char* query(int which, int head) const { return memory + kStages * kStage + (which * a.group + head) * kPitch; }
  template <int N>
  __device__ void put_query(int which, int head,
                            const float (&y)[N]) const {  // N neighbours of each lane, in the order that unpack() gives
    uint32_t* to = reinterpret_cast<uint32_t*>(query(which, head) + 2 * N * lane);
    if constexpr (N == 4) {
      to[0] = by_shifts(which) ? pack2<f16>(y[0], y[2]) : pack2<f16>(y[0], y[1]);
      to[1] = by_shifts(which) ? pack2<f16>(y[1], y[3]) : pack2<f16>(y[2], y[3]);
    } else if constexpr (N == 2) {
      const float other = __shfl_xor_sync(kWarp, lane % 2 == 0 ? y[1] : y[0], 1);
      *to = !by_shifts(which) ? pack2<f16>(y[0], y[1]) : lane % 2 == 0 ? pack2<f16>(y[0], other) : pack2<f16>(other, y[1]);
    }
  }
  __device__ void load_queries(int entry) {
    constexpr int kEach = D / 32, kBatch = 4;  // dimensions of a lane; heads whose queries are on their way together
    using Words = Pack<(kEach > 0 ? kEach : 2), T>;
    __syncwarp();
#pragma unroll 1
    for (int head0 = 0; head0 < a.group; head0 += kBatch) {
      Words raw[kBatch];
      float most = 0;
#pragma unroll
      for (int h = 0; h < kBatch; ++h)
        raw[h] = *reinterpret_cast<const Words*>(a.query<T>(entry, kv_head, min(head0 + h, a.group - 1)) + kEach * lane);
#pragma unroll
      for (int h = 0; h < kBatch; ++h)
#pragma unroll
        for (int i = 0; i < kEach; ++i) most = fmaxf(most, fabsf(to_float(raw[h].part[0].v[i])));
      most = warp_max(most);
      // Over a power of two above all elements: the squares must not leave the range of f16.
      const uint32_t exponent = min(max((__float_as_uint(most) >> 23) + 1, 67u), 187u);
      const float up = __uint_as_float(exponent << 23), down = __uint_as_float((254 - exponent) << 23);
      if (lane >= head0 && lane < head0 + kBatch)
        scale[0] = a.scale * kLog2e * up * (by_shifts(0) ? 256 : 1),
        scale[1] = 0.5f * (a.scale * up) * (a.scale * up) * kLog2e * (by_shifts(1) ? 256 : 1);
#pragma unroll
      for (int h = 0; h < kBatch; ++h) {
        if (head0 + h >= a.group) break;
        float y[kEach > 0 ? kEach : 1];
#pragma unroll
        for (int i = 0; i < kEach; ++i) y[i] = to_float(raw[h].part[0].v[i]) * down;
        put_query(0, head0 + h, y);
#pragma unroll
        for (int i = 0; i < kEach; ++i) y[i] *= y[i];
        put_query(1, head0 + h, y);
        *reinterpret_cast<Words*>(query(2, head0 + h) + 2 * kEach * lane) = raw[h];
      }
    }
    __syncwarp();
  }

  // ---- results
  struct Places {  // of a tile's clusters
    int32_t* key;
    float* tail;
    int n;  // of them there are so many
  };
  __device__ Places places(const Cursor& t) const {
    return {a.keys + a.head(t.entry, kv_head, 0) * a.room + kTile * t.index, a.tail_of(place, kv_head, 0) + kTile * t.index,
            t.of.n_cluster - kTile * t.index};
  }
  __device__ void put_cluster(const Places& to, int head, int i, int n_row, float log_n, float m, float wide) const {
    const bool there = i < to.n;
    const float spread = spread_gain(wide, fmaxf(log_n, 0));
    to.key[int64_t{head} * a.room + i] = there && n_row > 0 ? max(__float2int_rn((m + spread) * 0x1p16f), kEmpty + 1) : kEmpty;
    if (a.tail && there) to.tail[head * a.tail_row + i] = (m + kTailSpread * spread + log_n) * kLn2;  // log2(0) is -inf
  }
  __device__ void put_first_row(const Cursor& t, int j, int2 range) const {
    int32_t* to = a.begin + (int64_t{t.entry} * a.h_kv + kv_head) * (a.room + kTile);
    const int row = range.x + (t.of.first_page + a.page_of_cluster(j)) * kPage;
    if (j < t.of.n_cluster) to[j] = row;
    if (j == t.of.n_cluster - 1) to[j + 1] = row + range.y;
  }
  __device__ void put_open(const Cursor& t, int head, Mass m) const {
    float2& to = a.open[a.head(t.entry, kv_head, head) * a.n_unit + t.index % a.n_unit];
    if (t.index >= a.n_unit) m.add({to.x, to.y});  // this warp's tile before
    to = {m.top, m.total};
  }

  __device__ void score_clusters(const Cursor& t, int stage) const {
    const int2* ranges = reinterpret_cast<const int2*>(memory + stage * kStage + kPieces * 512);
    const int2 range[2] = {ranges[lane], ranges[32 + lane]};
    const float log_n[2] = {__log2f(static_cast<float>(range[0].y)), __log2f(static_cast<float>(range[1].y))};
    if (c < 2) put_first_row(t, kTile * t.index + 8 * c + g, c == 0 ? range[0] : range[1]);
    const Places to = places(t);
#pragma unroll 1
    for (int b = 0; b < a.group; b += 8) {
      const int column = min(b + g, a.group - 1);
      float sum[2][4] = {};  // of the mean, of the variance
#pragma unroll
      for (int v = 0; v < 2; ++v)
#pragma unroll
        for (int x = 0; x < D / 64; ++x) {
          const uint4 k0 = piece(stage, 2 * v * D / 64 + x), k1 = piece(stage, (2 * v + 1) * D / 64 + x);
#pragma unroll
          for (int y = 0; y < 2; ++y) {
            const uint4 q = reinterpret_cast<const uint4*>(query(v, column))[8 * x + 2 * c + y];
            const uint2 a0 = unpack(v, y ? k0.z : k0.x), a1 = unpack(v, y ? k1.z : k1.x), b0 = unpack(v, y ? k0.w : k0.y),
                        b1 = unpack(v, y ? k1.w : k1.y);
            mma_16816<f16>(sum[v], {a0.x, a1.x, a0.y, a1.y}, q.x, q.y);
            mma_16816<f16>(sum[v], {b0.x, b1.x, b0.y, b1.y}, q.z, q.w);
          }
        }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int head = b + 2 * c + e;
        const float m = __shfl_sync(kWarp, scale[0], head % 32), wide = __shfl_sync(kWarp, scale[1], head % 32);
        if (head >= a.group) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) put_cluster(to, head, 8 * i + g, range[i].y, log_n[i], sum[0][2 * i + e] * m, sum[1][2 * i + e] * wide);
      }
    }
  }
  __device__ void score_rows(const Cursor& t, int stage) const {
    const int n = min(kTile, t.of.len - t.of.open_row(t.index));
#pragma unroll 1
    for (int b = 0; b < a.group; b += 8) {
      const uint4* q = reinterpret_cast<const uint4*>(query(2, min(b + g, a.group - 1))) + c;
      float sum[4] = {};
#pragma unroll
      for (int x = 0; x < D / 32; ++x) {
        const uint4 k0 = piece(stage, x), k1 = piece(stage, D / 32 + x), y = q[4 * x];
        mma_16816<T>(sum, {k0.x, k1.x, k0.y, k1.y}, y.x, y.y);
        mma_16816<T>(sum, {k0.z, k1.z, k0.w, k1.w}, y.z, y.w);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float s0 = g < n ? sum[e] * (a.scale * kLog2e) : kNegInf, s1 = g + 8 < n ? sum[2 + e] * (a.scale * kLog2e) : kNegInf;
        float top = fmaxf(s0, s1), total;
#pragma unroll
        for (int step = 4; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(kWarp, top, step));
        total = pow2(s0 - top) + pow2(s1 - top);
#pragma unroll
        for (int step = 4; step < 32; step *= 2) total += __shfl_xor_sync(kWarp, total, step);
        if (g == 0 && b + 2 * c + e < a.group) put_open(t, b + 2 * c + e, {top, total});
      }
    }
  }
  // Any type and d_head; the lanes of a row share its dimensions.
  __device__ void score_plainly(const Cursor& t) const {
    const int n = t.rows ? min(kTile, t.of.len - t.of.open_row(t.index)) : kTile;
    const T* rows = t.rows ? open_rows(t, page_at(t, t.of.open_row(t.index) / kPage)) : nullptr;
    const Places to = places(t);
#pragma unroll 1
    for (int head = 0; head < a.group; ++head) {
      const T* q = a.query<T>(t.entry, kv_head, head);
      if (t.rows) {
        float s[2];
        RowScorer<T, 0>(q, a.d).score(rows + min(g, n - 1) * a.d, rows + min(g + 8, n - 1) * a.d, s[0], s[1]);
        Mass m{g < n ? s[0] * scale[0] : kNegInf, g < n ? 1.0f : 0.0f};
        if (g + 8 < n) m.add({s[1] * scale[0], 1});
        m = warp_mass<4>(m);
        if (lane == 0) put_open(t, head, m);
        continue;
      }
#pragma unroll 1
      for (int i = g; i < kTile; i += 8) {
        const int j = kTile * t.index + i, at = min(j, t.of.n_cluster - 1);
        const int64_t slot = slot_of(page_at(t, t.of.first_page + a.page_of_cluster(at)), at);
        float m = 0, wide = 0;
        for (int x = c; x < a.d; x += 4) {
          const float y = to_float(q[x]);
          m = fmaf(y, f8_to_float(a.centroid[slot * a.d + x]), m), wide = fmaf(y * y, f8_to_float(a.variance[slot * a.d + x]), wide);
        }
        m = warp_sum<4>(m), wide = warp_sum<4>(wide);
        if (c != 0) continue;
        const int2 range = a.range[slot];
        put_cluster(to, head, i, range.y, __log2f(static_cast<float>(range.y)), m * scale[0], wide * scale[1]);
        if (head == 0) put_first_row(t, j, range);
      }
    }
  }

  __device__ void run() {
    pdl_launch();
    if (a.state) pdl_wait();  // a kernel may have written it
    const Tiles tiles(a, blockIdx.y * 32);
    Cursor now{};
    now.position = unit;
    if constexpr (D > 0) {
      bool waited = false;  // the index changes between steps only: it may be read before the kernels ahead of this one are done
      const auto wait = [&] {
        if (!waited) pdl_wait();
        waited = true;
      };
      Cursor next = now;  // the tile to be fetched; its pages are on their way
      next.find(tiles);
      int page[2], stage = 0, entry = -1;
      if (next.position < tiles.total) find_pages(next, page);
      now.position -= kStages * a.n_unit;
#pragma unroll 1
      for (; now.position < tiles.total; now.position += a.n_unit) {
        if (now.position >= 0) {
          now.find(tiles);
          wait();
          if (now.entry != entry) place = a.place(now.entry), load_queries(entry = now.entry);
          cp_async_wait<kStages - 1>();
          if (now.rows) score_rows(now, stage);
          else score_clusters(now, stage);
        }
        if (next.position < tiles.total) {
          if (next.rows) wait();
          fetch(next, page, stage);
        }
        cp_async_commit();
        next.position += a.n_unit;
        next.find(tiles);
        if (next.position < tiles.total) find_pages(next, page);
        if (++stage == kStages) stage = 0;
      }
      wait();  // a kernel that nobody waits in would let the next one start too early
    } else {
      pdl_wait();
#pragma unroll 1
      for (; now.position < tiles.total; now.position += a.n_unit) {
        now.find(tiles);
        place = a.place(now.entry);
        score_plainly(now);
      }
    }
  }
};

template <class T, int D>
__global__ void __launch_bounds__(kScoreWarps * 32, 1) score_kernel(const __grid_constant__ SelectArgs a) {
  Scorer<T, D>(a).run();
}

}  // namespace prt::cuda::selecting
