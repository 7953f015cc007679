// Prefill attention for Hopper, in the manner of FlashAttention-3: one producer warp keeps the copy engine busy, each of kGroups
// warpgroups holds 64 query rows. The softmax of one tile of keys runs on the ALUs while the tensor cores work: for the other warpgroups
// (a token passed around says whose turn it is to issue products), and on the warpgroup's own previous product with V.
// Blocks are persistent and draw items from a counter, longest first, so that causal work balances. docs/kernels/attention_prefill.md
// has the measurements.
#pragma once
#include "cuda/hopper.cuh"
#include "ops/attention_prefill.cuh"

namespace prt::cuda {

template <class T_, int kHead_, int kKeys_, int kGroups_, int kStages_, int kQStages_>
struct PrefillTile {
  using T = T_;
  static constexpr int kHead = kHead_, kKeys = kKeys_, kGroups = kGroups_, kStages = kStages_, kQStages = kQStages_;
  static constexpr bool kTurns = kHead <= 128;
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kGroupBytes = 64 * kHead * 2, kQBytes = kGroups * kGroupBytes, kKvBytes = kKeys * kHead * 2;
  static constexpr int kSmem = 1024 + kQStages * kQBytes + 2 * kStages * kKvBytes + 1024;
  // 64 K registers: the producer needs few, so that accumulators (S, O) and P fit the consumers without a spill.
  static constexpr int kProducerRegisters = kGroups == 3 ? 32 : kHead > 128 ? 24 : 40;
  static constexpr int kConsumerRegisters = kGroups == 3 ? 160 : kHead > 128 ? 240 : 232;
};

template <class C>
struct PrefillShared {
  uint64_t q_full[C::kQStages], q_empty[C::kQStages], k_full[C::kStages], k_empty[C::kStages], v_full[C::kStages], v_empty[C::kStages];
  uint64_t v_landed, item_full[2], item_empty[2];
  alignas(16) PrefillItem item[2];
};

template <class C>
__device__ __forceinline__ void prefill_produce(const CUtensorMap& q_map, const CUtensorMap& k_map, const CUtensorMap& v_map,
                                                const PrefillParams& p, PrefillShared<C>& sh, char* q_tiles, char* k_tiles, char* v_tiles) {
  constexpr int kHalves = C::kHead / 64, kPages = C::kKeys / 64;
  const int32_t lane = threadIdx.x % 32, group_tok = 64 / p.pack;
  const PrefillPlan plan(p, C::kGroups * group_tok, C::kHead * 4);
  int32_t ticket = static_cast<int32_t>(blockIdx.x);
  uint32_t k_step = 0, v_step = 0, n_cut = 0;
  for (uint32_t i = 0;; ++i) {
    PrefillItem it{};
    if (ticket < plan.n_item) it = plan.item(p, ticket, C::kKeys);
    mbar_wait(&sh.item_empty[i % 2], ~(i / 2) & 1);
    if (lane == 0) {
      sh.item[i % 2] = it;
      mbar_arrive(&sh.item_full[i % 2]);
      if (it.n_tok > 0) ticket = static_cast<int32_t>(gridDim.x + atomicAdd(&p.counters[0], 1));
    }
    if (it.n_tok == 0) break;

    const uint32_t q_stage = i % C::kQStages;
    mbar_wait(&sh.q_empty[q_stage], ~(i / C::kQStages) & 1);
    if (lane == 0) {
      mbar_expect(&sh.q_full[q_stage], static_cast<uint32_t>(C::kGroups * kHalves * group_tok * p.pack * 128));
      for (int g = 0; g < C::kGroups; ++g)
        for (int h = 0; h < kHalves; ++h)
          tma_load(q_tiles + q_stage * C::kQBytes + g * C::kGroupBytes + h * 8192, &q_map, &sh.q_full[q_stage], h * 64, it.head * p.pack,
                   it.row + g * group_tok, kCacheEvictFirst);
    }

    const int32_t kv_head = it.head / (p.n_head / p.h_kv);
    const int32_t lo = p.window > 0 ? max(0, it.position + 1 - p.window) : 0, last_page = max(0, it.kv_len - 1) / 64;
    const int32_t* pages = p.page_table + static_cast<int64_t>(it.entry) * p.max_pages;
    int32_t ids = 0, ids_at = -1;  // 32 entries of the page table, one per lane
    const auto load = [&](const CUtensorMap& map, char* tile, uint64_t* bar, int32_t n) {
      if (lane == 0) mbar_expect(bar, C::kKvBytes);
#pragma unroll
      for (int i = 0; i < kPages; ++i) {
        const int32_t page = min(max(n * kPages + i, lo / 64), last_page);  // of a page outside the visible keys nothing counts
        if (page / 32 != ids_at) {
          ids_at = page / 32;
          const int32_t mine = ids_at * 32 + lane;
          ids = mine <= last_page && mine >= lo / 64 ? pages[mine] : 0;
        }
        const int32_t row = (__shfl_sync(~0u, ids, page % 32) * p.h_kv + kv_head) * 64;
        if (lane == 0)
          for (int h = 0; h < kHalves; ++h) tma_load(tile + h * C::kKeys * 128 + i * 8192, &map, bar, h * 64, row, kCacheEvictLast);
      }
    };
    const auto load_k = [&](int32_t n) {
      const uint32_t s = k_step % C::kStages;
      mbar_wait(&sh.k_empty[s], ~(k_step / C::kStages) & 1);
      load(k_map, k_tiles + s * C::kKvBytes, &sh.k_full[s], n);
      ++k_step;
    };
    load_k(it.end - 1);
    for (int32_t n = it.end - 1; n >= it.begin; --n) {
      if (n > it.begin) load_k(n - 1);
      const uint32_t s = v_step % C::kStages;
      char* tile = v_tiles + s * C::kKvBytes;
      mbar_wait(&sh.v_empty[s], ~(v_step / C::kStages) & 1);
      const int32_t from = lo - n * C::kKeys, to = it.kv_len - n * C::kKeys;  // rows of the tile that hold keys
      if (from <= 0 && to >= C::kKeys) {
        load(v_map, tile, &sh.v_full[s], n);
      } else {  // the others may hold anything, NaN too, and their weight 0 would not silence that: they become 0
        load(v_map, tile, &sh.v_landed, n);
        mbar_wait(&sh.v_landed, n_cut++ & 1);
        for (int32_t w = lane; w < C::kKeys * 8 * kHalves; w += 32) {
          const int32_t key = w / 8 % C::kKeys;
          if (key < from || key >= to) reinterpret_cast<uint4*>(tile)[w] = uint4{};
        }
        fence_async_proxy();
        __syncwarp();
        if (lane == 0) mbar_arrive(&sh.v_full[s]);
      }
      ++v_step;
    }
    ticket = __shfl_sync(~0u, ticket, 0);
  }
  if (lane == 0 && atomicAdd(&p.counters[1], 1) == gridDim.x - 1) p.counters[0] = p.counters[1] = 0;
}

template <class C>
__device__ __forceinline__ void prefill_consume(const PrefillParams& p, PrefillShared<C>& sh, const char* q_tiles, const char* k_tiles,
                                                const char* v_tiles) {
  using T = typename C::T;
  using Scores = Wgmma<C::kKeys, T>;
  using Values = Wgmma<C::kHead, T>;
  const int32_t group = threadIdx.x / 128, lane = threadIdx.x % 32;
  const PrefillRows rows(group, p.pack);
  const uint64_t q_desc = wgmma_desc(q_tiles + group * C::kGroupBytes), k_desc = wgmma_desc(k_tiles),
                 v_desc = wgmma_desc(v_tiles, C::kKeys * 128);
  // Whose turn it is to issue products: barrier 1 + g is warpgroup g's, and the one before it arrives there.
  const auto my_turn = [&] {
    if constexpr (C::kTurns) named_sync(1 + group, 256);
  };
  const auto next_turn = [&] {
    if constexpr (C::kTurns) named_arrive(1 + (group + 1) % C::kGroups, 256);
  };
  if (group == C::kGroups - 1) next_turn();

  uint32_t step = 0;  // tiles of keys so far
  for (uint32_t i = 0;; ++i) {
    mbar_wait(&sh.item_full[i % 2], i / 2 & 1);
    const PrefillItem it = sh.item[i % 2];
    __syncwarp();
    if (lane == 0) mbar_arrive(&sh.item_empty[i % 2]);
    if (it.n_tok == 0) break;

    float o[C::kHead / 2], s[C::kKeys / 2], top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
    uint32_t w[C::kKeys / 16][4];  // the weights exp(s - top), rounded to T, as the A operand of the product with V
#pragma unroll
    for (int j = 0; j < C::kHead / 2; ++j) o[j] = 0;

    const uint32_t q_stage = i % C::kQStages;
    const auto start_scores = [&](uint32_t at) {
      const uint64_t a = q_desc + q_stage * (C::kQBytes / 16), b = k_desc + at % C::kStages * (C::kKvBytes / 16);
      mbar_wait(&sh.k_full[at % C::kStages], at / C::kStages & 1);
      wgmma_keep(s);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < C::kHead / 16; ++k) Scores::mma(s, a + k / 4 * 512 + k % 4 * 2, b + k / 4 * (C::kKeys * 8) + k % 4 * 2, k > 0);
      wgmma_commit();
    };
    const auto start_values = [&](uint32_t at) {
      const uint64_t b = v_desc + at % C::kStages * (C::kKvBytes / 16);
      mbar_wait(&sh.v_full[at % C::kStages], at / C::kStages & 1);
      wgmma_keep(o);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < C::kKeys / 16; ++k) Values::template mma<1>(o, w[k], b + k * 128, 1);
      wgmma_commit();
    };
    const auto release = [&](uint64_t* bar) {
      if (lane == 0) mbar_arrive(bar);
    };
    mbar_wait(&sh.q_full[q_stage], i / C::kQStages & 1);
    start_scores(step);
    wgmma_wait<0>();
    wgmma_keep(s);
    release(&sh.k_empty[step % C::kStages]);
    float rescale[2];
    int32_t n = it.end - 1;
    prefill_softmax<true>(s, top, total, rescale, p, rows, it.position, n-- * C::kKeys);
    prefill_round<T>(w, s);

    const auto advance = [&](auto masked) {
      my_turn();
      start_scores(step + 1);
      start_values(step);
      next_turn();
      wgmma_wait<1>();
      wgmma_keep(s);
      release(&sh.k_empty[(step + 1) % C::kStages]);
      prefill_softmax<decltype(masked)::value>(s, top, total, rescale, p, rows, it.position, n * C::kKeys);
      wgmma_wait<0>();
      wgmma_keep(o);
      release(&sh.v_empty[step % C::kStages]);
      prefill_round<T>(w, s);
#pragma unroll
      for (int j = 0; j < C::kHead / 2; ++j) o[j] *= rescale[j / 2 % 2];
      ++step, --n;
    };
    // Tiles whose keys are all visible to all rows need no mask.
    const int32_t clear_end = (it.position + 1) / C::kKeys;
    const int32_t clear_begin = p.window > 0 ? max(0, it.position + it.n_tok - p.window + C::kKeys - 1) / C::kKeys : 0;
    while (n >= it.begin && n >= clear_end) advance(std::true_type{});
    while (n >= it.begin && n >= clear_begin) advance(std::false_type{});
    while (n >= it.begin) advance(std::true_type{});
    release(&sh.q_empty[q_stage]);
    start_values(step);
    wgmma_wait<0>();
    wgmma_keep(o);
    release(&sh.v_empty[step++ % C::kStages]);

    prefill_store<T>(o, total, p, rows, it);
  }
  if (group == 0) my_turn();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    attention_prefill_wgmma(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                            const __grid_constant__ CUtensorMap v_map, const __grid_constant__ PrefillParams p) {
#ifdef PRT_SM90A
  extern __shared__ char raw[];
  char* const tiles = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(raw) + 1023) / 1024 * 1024);  // the swizzle's period
  char* const k_tiles = tiles + C::kQStages * C::kQBytes;
  char* const v_tiles = k_tiles + C::kStages * C::kKvBytes;
  PrefillShared<C>& sh = *reinterpret_cast<PrefillShared<C>*>(v_tiles + C::kStages * C::kKvBytes);
  static_assert(sizeof(PrefillShared<C>) <= 1024);
  if (threadIdx.x == 0) {
    const auto init = [](uint64_t* bars, int n, uint32_t arrivals) {
      for (int i = 0; i < n; ++i) mbar_init(&bars[i], arrivals);
    };
    constexpr int kWarps = 4 * C::kGroups;
    init(sh.q_full, C::kQStages, 1), init(sh.q_empty, C::kQStages, kWarps);
    init(sh.k_full, C::kStages, 1), init(sh.k_empty, C::kStages, kWarps);
    init(sh.v_full, C::kStages, 1), init(sh.v_empty, C::kStages, kWarps);
    init(&sh.v_landed, 1, 1);
    init(sh.item_full, 2, 1), init(sh.item_empty, 2, kWarps);
    mbar_init_fence();
    tma_prefetch_map(&q_map), tma_prefetch_map(&k_map), tma_prefetch_map(&v_map);
  }
  __syncthreads();
  pdl_wait();
  pdl_launch();
  if (threadIdx.x / 128 == C::kGroups) {
    registers_down_to<C::kProducerRegisters>();
    if (threadIdx.x % 128 < 32) prefill_produce<C>(q_map, k_map, v_map, p, sh, tiles, k_tiles, v_tiles);
  } else {
    registers_up_to<C::kConsumerRegisters>();
    prefill_consume<C>(p, sh, tiles, k_tiles, v_tiles);
  }
#endif
}

}  // namespace prt::cuda
