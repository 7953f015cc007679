// The first launch of `select`: the key of every cluster for every query head, its mass in the tail, and the exact mass of the rows outside
// the index. Bound by the bytes of the index; every warp is on its own, with its next tiles on their way to shared memory.
#pragma once
#include "attention/select_cuda.cuh"

namespace prt::cuda::selecting {

constexpr int kScoreWarps = 8;

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
__device__ __forceinline__ float f8_to_float(uint8_t x) {
  const uint32_t y = f8_to_f16(x);
  return __low2float(*reinterpret_cast<const __half2*>(&y));
}

// Tiles of 32 entries, one after the other: those of an entry's clusters, then those of its rows outside the index. A lane knows an entry.
struct Tiles {
  Entry mine;
  int first_entry, end, total;

  struct At {
    int entry, index;
    bool rows;
    Entry of;
  };
  __device__ Tiles(const SelectArgs& a, int first) : first_entry(first) {
    const int lane = threadIdx.x % 32;
    mine = {};
    if (first + lane < a.n_entry) mine = Entry(a, first + lane);
    end = mine.n_cluster > 0 ? cluster_tiles(mine) + mine.open_tiles() : 0;  // without clusters there is nothing to choose
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kWarp, end, step);
      if (lane >= step) end += other;
    }
    total = __shfl_sync(kWarp, end, 31);
  }
  __device__ static int cluster_tiles(const Entry& e) { return (e.n_cluster + kTile - 1) / kTile; }
  __device__ At at(int position) const {
    const int i = __popc(__ballot_sync(kWarp, end <= position)), before = __shfl_sync(kWarp, end, max(i - 1, 0));
    At t;
    t.of.len = __shfl_sync(kWarp, mine.len, i), t.of.first_page = __shfl_sync(kWarp, mine.first_page, i);
    t.of.end_page = __shfl_sync(kWarp, mine.end_page, i), t.of.n_cluster = __shfl_sync(kWarp, mine.n_cluster, i);
    t.entry = first_entry + i;
    t.index = position - (i > 0 ? before : 0);
    t.rows = t.index >= cluster_tiles(t.of);
    if (t.rows) t.index -= cluster_tiles(t.of);
    return t;
  }
};

template <class T, int D>
struct Scorer {
  static constexpr int kPieces = D / 16;  // of 16 bytes, a lane's share of a tile: of two rows, or of two centroids and two variances
  static constexpr int kStage = kPieces * 512 + 256, kStages = D > 64 ? 4 : 8;
  static constexpr int kPitch = (D + 8) * 2;  // bytes of a query in f16, so that 8 lanes read from different banks
  static int smem(int group) { return kScoreWarps * (D > 0 ? kStages * kStage + 2 * group * kPitch : 0); }

  const SelectArgs& a;
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  int kv_head, unit;
  char* memory;  // of this warp: its stages, then q and q^2 of the group
  float scale[2];  // of head `lane`: what a product with q, with q^2 is to be multiplied by

  __device__ explicit Scorer(const SelectArgs& args) : a(args) {
    extern __shared__ uint4 shared[];
    const int warp = threadIdx.x / 32, at = blockIdx.x * (blockDim.x / 32) + warp;
    kv_head = at % a.h_kv, unit = at / a.h_kv;
    memory = reinterpret_cast<char*>(shared) + warp * (kStages * kStage + 2 * a.group * kPitch);
    scale[0] = a.scale * kLog2e, scale[1] = a.fit ? 0 : 0.5f * a.scale * a.scale * kLog2e;
  }
  __device__ int64_t slot_of(const Entry& e, int entry, int j) const {
    const int page = a.page_of_cluster(j);
    return (int64_t{a.page_table[entry * a.table_stride + e.first_page + page]} * a.h_kv + kv_head) * a.n_slot + (j - page * a.n_slot);
  }
  __device__ const T* open_rows(const Tiles::At& t, int& n) const {
    const int row = t.of.open_row(t.index);
    n = min(kTile, t.of.len - row);
    const int64_t page = a.page_table[t.entry * a.table_stride + row / kPage];
    return static_cast<const T*>(a.k) + ((page * a.h_kv + kv_head) * kPage + row % kPage) * a.d;
  }

  // ---- a tile on its way to a stage. Every lane copies what it will read itself. What is past the end is the last one again.
  __device__ void fetch(const Tiles::At& t, int stage) const {
    const uint32_t to = smem_addr(memory + stage * kStage) + lane * 16;
    if (t.rows) {
      int n;
      const T* row = open_rows(t, n);
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int x = 0; x < D / 32; ++x) cp_async_16(to + (i * D / 32 + x) * 512, row + min(8 * i + g, n - 1) * D + 32 * x + 8 * c);
      return;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t slot = slot_of(t.of, t.entry, min(kTile * t.index + 8 * i + g, t.of.n_cluster - 1));
#pragma unroll
      for (int x = 0; x < D / 64; ++x) {
        cp_async_16(to + (i * D / 64 + x) * 512, a.centroid + slot * D + 64 * x + 16 * c);
        cp_async_16(to + ((2 + i) * D / 64 + x) * 512, a.variance + slot * D + 64 * x + 16 * c);
      }
      cp_async_4(smem_addr(memory + stage * kStage) + kPieces * 512 + (32 * i + lane) * 4, &a.range[slot].y);
    }
  }
  __device__ uint4 piece(int stage, int i) const { return reinterpret_cast<const uint4*>(memory + stage * kStage)[32 * i + lane]; }
  __device__ f16* query(int square, int head) const {
    return reinterpret_cast<f16*>(memory + kStages * kStage + (square * a.group + head) * kPitch);
  }
  __device__ void load_queries(int entry) {
    __syncwarp();
#pragma unroll 1
    for (int head = 0; head < a.group; ++head) {
      constexpr int kEach = D / 32;
      float x[kEach > 0 ? kEach : 1], most = 0;
      const T* q = a.query<T>(entry, kv_head, head) + kEach * lane;
#pragma unroll
      for (int i = 0; i < kEach; ++i) x[i] = to_float(q[i]), most = fmaxf(most, fabsf(x[i]));
      most = warp_max(most);
      // Over a power of two above all elements: the squares must not leave the range of f16.
      const uint32_t exponent = min(max((__float_as_uint(most) >> 23) + 1, 67u), 187u);
      const float up = __uint_as_float(exponent << 23), down = __uint_as_float((254 - exponent) << 23);
#pragma unroll
      for (int i = 0; i < kEach; i += 2) {
        const float y0 = x[i] * down, y1 = x[i + 1] * down;
        reinterpret_cast<uint32_t*>(query(0, head) + kEach * lane)[i / 2] = pack2<f16>(y0, y1);
        reinterpret_cast<uint32_t*>(query(1, head) + kEach * lane)[i / 2] = pack2<f16>(y0 * y0, y1 * y1);
      }
      if (lane == head % 32) scale[0] = a.scale * kLog2e * up, scale[1] = a.fit ? 0 : 0.5f * (a.scale * up) * (a.scale * up) * kLog2e;
    }
    __syncwarp();
  }

  // ---- results
  __device__ void put_cluster(const Tiles::At& t, int head, int j, int n, float m, float wide) const {
    const float rank = m + wide;
    const bool there = j < t.of.n_cluster;
    a.keys[a.head(t.entry, kv_head, head) * a.room + j] = there && n > 0 ? max(__float2int_rn(rank * 0x1p16f), kEmpty + 1) : kEmpty;
    if (a.tail && there)
      a.tail_of(t.entry, kv_head, head)[j] = (m + kTailSpread * wide + __log2f(static_cast<float>(n))) * kLn2;  // log2(0) is -inf
  }
  __device__ void put_open(const Tiles::At& t, int head, Mass m) const {
    float2& to = a.open[a.head(t.entry, kv_head, head) * a.n_unit + t.index % a.n_unit];
    if (t.index >= a.n_unit) m.add({to.x, to.y});  // this warp's tile before
    to = {m.top, m.total};
  }

  __device__ void score_clusters(const Tiles::At& t, int stage) const {
    const int* rows = reinterpret_cast<const int*>(memory + stage * kStage + kPieces * 512);
    const int n[2] = {rows[lane], rows[32 + lane]};
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
            const uint32_t a0 = y ? k0.z : k0.x, a1 = y ? k1.z : k1.x, b0 = y ? k0.w : k0.y, b1 = y ? k1.w : k1.y;
            mma_16816<f16>(sum[v], {f8_to_f16(a0), f8_to_f16(a1), f8_to_f16(a0 >> 16), f8_to_f16(a1 >> 16)}, q.x, q.y);
            mma_16816<f16>(sum[v], {f8_to_f16(b0), f8_to_f16(b1), f8_to_f16(b0 >> 16), f8_to_f16(b1 >> 16)}, q.z, q.w);
          }
        }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int head = b + 2 * c + e;
        const float m = __shfl_sync(kWarp, scale[0], head % 32), wide = __shfl_sync(kWarp, scale[1], head % 32);
        if (head >= a.group) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i)
          put_cluster(t, head, kTile * t.index + 8 * i + g, n[i], sum[0][2 * i + e] * m, sum[1][2 * i + e] * wide);
      }
    }
  }
  __device__ void score_rows(const Tiles::At& t, int stage) const {
    const int n = min(kTile, t.of.len - t.of.open_row(t.index));
#pragma unroll 1
    for (int b = 0; b < a.group; b += 8) {
      const T* q = a.query<T>(t.entry, kv_head, min(b + g, a.group - 1)) + 8 * c;
      float sum[4] = {};
#pragma unroll
      for (int x = 0; x < D / 32; ++x) {
        const uint4 k0 = piece(stage, x), k1 = piece(stage, D / 32 + x), y = *reinterpret_cast<const uint4*>(q + 32 * x);
        mma_16816<T>(sum, {k0.x, k1.x, k0.y, k1.y}, y.x, y.y);
        mma_16816<T>(sum, {k0.z, k1.z, k0.w, k1.w}, y.z, y.w);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        Mass m{g < n ? sum[e] * (a.scale * kLog2e) : kNegInf, g < n ? 1.0f : 0.0f};
        if (g + 8 < n) m.add({sum[2 + e] * (a.scale * kLog2e), 1});
        m = warp_mass<4>(m);
        if (g == 0 && b + 2 * c + e < a.group) put_open(t, b + 2 * c + e, m);
      }
    }
  }
  // Any type and d_head; the lanes of a row share its dimensions.
  __device__ void score_plainly(const Tiles::At& t) const {
    int n = kTile;
    const T* rows = t.rows ? open_rows(t, n) : nullptr;
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
      for (int i = 0; i < 2; ++i) {
        const int j = kTile * t.index + 8 * i + g;
        const int64_t slot = slot_of(t.of, t.entry, min(j, t.of.n_cluster - 1));
        float m = 0, wide = 0;
        for (int x = c; x < a.d; x += 4) {
          const float y = to_float(q[x]);
          m = fmaf(y, f8_to_float(a.centroid[slot * a.d + x]), m), wide = fmaf(y * y, f8_to_float(a.variance[slot * a.d + x]), wide);
        }
        m = warp_sum<4>(m), wide = warp_sum<4>(wide);
        if (c == 0) put_cluster(t, head, j, a.range[slot].y, m * scale[0], wide * scale[1]);
      }
    }
  }

  __device__ void run() {
    pdl_launch();
    const Tiles tiles(a, blockIdx.y * 32);
    bool waited = false;  // the index changes between steps only: it may be read before the kernels ahead of this one are done
    const auto wait = [&] {
      if (!waited) pdl_wait();
      waited = true;
    };
    if constexpr (D > 0) {
      const auto next = [&](int position, int stage) {
        if (position < tiles.total) {
          const Tiles::At t = tiles.at(position);
          if (t.rows) wait();
          fetch(t, stage);
        }
        cp_async_commit();
      };
#pragma unroll 1
      for (int i = 0; i < kStages; ++i) next(unit + i * a.n_unit, i);
      int stage = 0, entry = -1;
#pragma unroll 1
      for (int position = unit; position < tiles.total; position += a.n_unit, stage = stage + 1 == kStages ? 0 : stage + 1) {
        const Tiles::At t = tiles.at(position);
        wait();
        if (t.entry != entry) load_queries(entry = t.entry);
        cp_async_wait<kStages - 1>();
        if (t.rows) score_rows(t, stage);
        else score_clusters(t, stage);
        next(position + kStages * a.n_unit, stage);
      }
    } else {
      wait();
#pragma unroll 1
      for (int position = unit; position < tiles.total; position += a.n_unit) score_plainly(tiles.at(position));
    }
    wait();  // a kernel that nobody waits in would let the next one start too early
  }
};

template <class T, int D>
__global__ void __launch_bounds__(kScoreWarps * 32, 1) score_kernel(const __grid_constant__ SelectArgs a) {
  Scorer<T, D>(a).run();
}

}  // namespace prt::cuda::selecting
