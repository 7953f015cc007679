#include "base/arena.h"

#include <cstdio>
#include <cstdlib>

#if defined(_WIN32)
#include <windows.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace prt {

namespace {
constexpr int64_t kHugePage = int64_t{2} << 20;

[[maybe_unused]] int64_t meminfo(const char* key) {
  int64_t kib = 0;
  if (FILE* f = std::fopen("/proc/meminfo", "r")) {
    char line[128];
    const size_t n = std::strlen(key);
    while (std::fgets(line, sizeof line, f))
      if (std::strncmp(line, key, n) == 0 && line[n] == ':') kib = std::strtoll(line + n + 1, nullptr, 10);
    std::fclose(f);
  }
  return kib * 1024;
}

// A container's limit, where there is one: the file holds a number, or "max".
[[maybe_unused]] int64_t cgroup_number(const char* path, int64_t otherwise) {
  int64_t value = otherwise;
  if (FILE* f = std::fopen(path, "r")) {
    long long n = 0;
    if (std::fscanf(f, "%lld", &n) == 1 && n > 0) value = n;
    std::fclose(f);
  }
  return value;
}
}  // namespace

#if defined(_WIN32)
int64_t host_memory_total() {
  MEMORYSTATUSEX m{};
  m.dwLength = sizeof m;
  GlobalMemoryStatusEx(&m);
  return static_cast<int64_t>(m.ullTotalPhys);
}
int64_t host_memory_free() {
  MEMORYSTATUSEX m{};
  m.dwLength = sizeof m;
  GlobalMemoryStatusEx(&m);
  return static_cast<int64_t>(m.ullAvailPhys);
}
#else
int64_t host_memory_total() {
  int64_t total = meminfo("MemTotal");
  if (total == 0) total = int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE);
  return std::min(total, cgroup_number("/sys/fs/cgroup/memory.max", total));
}

int64_t host_memory_free() {
  int64_t available = meminfo("MemAvailable");
  if (available == 0) available = host_memory_total();
  const int64_t limit = cgroup_number("/sys/fs/cgroup/memory.max", -1);
  if (limit > 0) available = std::min(available, std::max<int64_t>(0, limit - cgroup_number("/sys/fs/cgroup/memory.current", 0)));
  return available;
}
#endif

Buffer& Buffer::operator=(Buffer&& o) noexcept {
  std::swap(data_, o.data_);
  std::swap(bytes_, o.bytes_);
  std::swap(release_, o.release_);
  std::swap(base_, o.base_);
  std::swap(extra_, o.extra_);
  return *this;
}

Buffer host_buffer(int64_t bytes, const char* what, [[maybe_unused]] bool huge) {
  check(bytes >= 0, what, ": ", bytes, " bytes is not a size");
  if (bytes == 0) return {};
  const int64_t mapped = bytes + kHugePage;
#if defined(_WIN32)
  void* base = VirtualAlloc(nullptr, static_cast<size_t>(mapped), MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
#else
  void* base = mmap(nullptr, static_cast<size_t>(mapped), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) base = nullptr;
#endif
  if (!base) fail(PRT_OUT_OF_MEMORY, what, " needs ", bytes, " bytes of host memory; ", host_memory_free(), " are free");
  char* data = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(base) + kHugePage - 1) / kHugePage * kHugePage);
#if defined(MADV_HUGEPAGE)
  if (huge && bytes >= kHugePage) madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
  const auto release = [](const Buffer& b) {
#if defined(_WIN32)
    VirtualFree(b.base(), 0, MEM_RELEASE);
#else
    munmap(b.base(), static_cast<size_t>(b.extra()));
#endif
  };
  return Buffer(data, bytes, release, base, mapped);
}

}  // namespace prt
