// How fast can a decode step read a weight matrix? Two threads over 270 MB of bf16 rows, with the rows that a thread reads side by side
// next to each other or far apart. Behind docs/kernels/decode_linear_cpu.md. Needs a CPU with AVX-512 BF16 and AMX, and Linux.
//   g++ -O3 -std=c++20 -march=sapphirerapids -pthread bench/read_streams.cc -o read_streams && ./read_streams
#include <immintrin.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

constexpr int64_t kColumns = 576, kRows = (270 << 20) / (kColumns * 2) / 1024 * 1024, kItem = 1024, kThreads = 2, kPasses = 9;
alignas(64) static uint16_t x[kColumns];
static float sink[kThreads][4096];

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// kStreams rows, `gap` rows apart, by AVX-512 BF16 dot products.
template <int kStreams>
static void dots(const uint16_t* w, int64_t gap, float* out) {
  __m512 acc[kStreams] = {};
  for (int64_t k = 0; k < kColumns; k += 32)
    for (int s = 0; s < kStreams; ++s)
      acc[s] = _mm512_dpbf16_ps(acc[s], (__m512bh)_mm512_load_si512(x + k), (__m512bh)_mm512_loadu_si512(w + s * gap * kColumns + k));
  for (int s = 0; s < kStreams; ++s) out[s] = _mm512_reduce_add_ps(acc[s]);
}

// kTiles AMX tiles of 16 rows, the rows of a tile `gap` rows apart, the tiles `next` rows.
template <int kTiles>
static void tiles(const uint16_t* w, int64_t gap, int64_t next, float* out) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < kColumns; k += 32) {
    const uint16_t* at = w + k;
    _tile_loadd(6, x + k, 4);
    _tile_loadd(4, at, gap * kColumns * 2);
    _tile_dpbf16ps(0, 4, 6);
    if (kTiles < 4) continue;
    _tile_loadd(5, at + next * kColumns, gap * kColumns * 2);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(4, at + 2 * next * kColumns, gap * kColumns * 2);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(5, at + 3 * next * kColumns, gap * kColumns * 2);
    _tile_dpbf16ps(3, 5, 6);
  }
  _tile_stored(0, out, 4);
  _tile_stored(1, out + 16, 4);
  _tile_stored(2, out + 32, 4);
  _tile_stored(3, out + 48, 4);
}

struct Pattern {
  const char* name;
  void (*item)(const uint16_t* w, float* out);  // kItem rows
};

static const Pattern kPatterns[] = {
    {"vdpbf16ps, 8 neighbouring rows",
     [](const uint16_t* w, float* o) {
       for (int64_t r = 0; r < kItem; r += 8) dots<8>(w + r * kColumns, 1, o);
     }},
    {"vdpbf16ps, 16 neighbouring rows",
     [](const uint16_t* w, float* o) {
       for (int64_t r = 0; r < kItem; r += 16) dots<16>(w + r * kColumns, 1, o);
     }},
    {"vdpbf16ps, 4 rows far apart",
     [](const uint16_t* w, float* o) {
       for (int64_t r = 0; r < kItem / 4; ++r) dots<4>(w + r * kColumns, kItem / 4, o);
     }},
    {"vdpbf16ps, 8 rows far apart",
     [](const uint16_t* w, float* o) {
       for (int64_t r = 0; r < kItem / 8; ++r) dots<8>(w + r * kColumns, kItem / 8, o);
     }},
    {"vdpbf16ps, 16 rows far apart",
     [](const uint16_t* w, float* o) {
       for (int64_t r = 0; r < kItem / 16; ++r) dots<16>(w + r * kColumns, kItem / 16, o);
     }},
    {"AMX, 64 neighbouring rows (4 tiles)",
     [](const uint16_t* w, float* o) {
       for (int64_t r = 0; r < kItem; r += 64) tiles<4>(w + r * kColumns, 1, 16, o);
     }},
    {"AMX, 16 rows far apart (1 tile)",
     [](const uint16_t* w, float* o) {
       for (int64_t r = 0; r < kItem / 16; ++r) tiles<1>(w + r * kColumns, kItem / 16, 1, o);
     }},
    {"AMX, 16 x 4 rows far apart (4 tiles)",
     [](const uint16_t* w, float* o) {
       for (int64_t r = 0; r < kItem / 16; r += 4) tiles<4>(w + r * kColumns, kItem / 16, 1, o);
     }},
};

int main() {
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return std::puts("no AMX on this machine"), 1;
  const int64_t bytes = kRows * kColumns * 2, huge = 2 << 20;
  auto* map = static_cast<char*>(mmap(nullptr, bytes + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (map == MAP_FAILED) return std::puts("out of memory"), 1;
  map = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(map) + huge - 1) / huge * huge);
  madvise(map, bytes, MADV_HUGEPAGE);
  std::memset(map, 1, bytes);
  std::vector<double> rates[std::size(kPatterns)];
  for (int pass = 0; pass < kPasses; ++pass)  // patterns take turns, so that a slow moment hits all of them
    for (size_t p = 0; p < std::size(kPatterns); ++p) {
      std::atomic<int64_t> next{0};
      const auto start = std::chrono::steady_clock::now();
      std::vector<std::thread> threads;
      for (int64_t t = 0; t < kThreads; ++t)
        threads.emplace_back([&, t] {
          TileConfig config;
          for (int i = 0; i < 8; ++i) config.rows[i] = 16, config.row_bytes[i] = i == 4 || i == 5 ? 64 : 4;
          _tile_loadconfig(&config);
          for (int64_t r; (r = next.fetch_add(kItem)) < kRows;)
            kPatterns[p].item(reinterpret_cast<const uint16_t*>(map) + r * kColumns, sink[t]);
          _tile_release();
        });
      for (auto& t : threads) t.join();
      rates[p].push_back(bytes / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / 1e9);
    }
  std::puts("{\"matrix\": \"270 MB of bf16, 576 columns\", \"threads\": 2, \"unit\": \"GB/s\", \"patterns\": [");
  for (size_t p = 0; p < std::size(kPatterns); ++p) {
    std::sort(rates[p].begin(), rates[p].end());
    std::printf(" {\"rows\": \"%s\", \"median\": %.1f, \"best\": %.1f}%s\n", kPatterns[p].name, rates[p][kPasses / 2], rates[p].back(),
                p + 1 < std::size(kPatterns) ? "," : "\n]}");
  }
}
