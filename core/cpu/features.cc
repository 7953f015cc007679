#include "cpu/features.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "base/check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace prt {

namespace {
constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512bf16", "amx"};

#if defined(__x86_64__)
// Linux hands out the 8 KB of tile registers only to processes that ask (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA).
bool amx_permitted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kReqXcompPerm = 0x1023, kXtileData = 18;
  return syscall(SYS_arch_prctl, kReqXcompPerm, kXtileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return Isa::baseline;
  unsigned lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  const bool f16c = c & bit_F16C, fma = c & bit_FMA;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return Isa::baseline;
  const unsigned b7 = b, d7 = d;
  if ((lo & 6) != 6 || !f16c || !fma || !(b7 & bit_AVX2)) return Isa::baseline;
  const unsigned need = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  if ((lo & 0xe6) != 0xe6 || (b7 & need) != need) return Isa::avx2;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & (1u << 5))) return Isa::avx512;
  const bool tiles = (d7 & (1u << 24)) && (d7 & (1u << 22));  // AMX-TILE, AMX-BF16
  if (!tiles || (lo & 0x60000) != 0x60000 || !amx_permitted()) return Isa::avx512bf16;
  return Isa::amx;
}
#else
Isa detect() { return Isa::baseline; }
#endif
}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa isa_from_name(const std::string& name) {
  for (int i = 0; i < 5; ++i)
    if (name == kNames[i]) return static_cast<Isa>(i);
  fail(PRT_INVALID_ARGUMENT, "CPU instruction set '", name, "' is unknown, expected baseline, avx2, avx512, avx512bf16 or amx");
}

Isa isa_best() {
  static const Isa machine = detect();
  return machine;
}

Isa isa_at_most(const char* name) { return name && *name ? std::min(isa_best(), isa_from_name(name)) : isa_best(); }

std::string cpu_model_name() {
  std::string name = "CPU";
  if (FILE* f = std::fopen("/proc/cpuinfo", "r")) {
    char line[256];
    while (std::fgets(line, sizeof line, f)) {
      if (std::strncmp(line, "model name", 10) != 0) continue;
      if (const char* colon = std::strchr(line, ':')) name = colon + 2;
      while (!name.empty() && (name.back() == '\n' || name.back() == ' ')) name.pop_back();
      break;
    }
    std::fclose(f);
  }
  return name;
}

}  // namespace prt
