#include "base/arena.h"

#include <cstdio>
#include <cstdlib>
#include <utility>

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

HostBuffer::HostBuffer(int64_t bytes, const char* what, [[maybe_unused]] bool huge) : bytes_(bytes) {
  check(bytes >= 0, what, ": ", bytes, " bytes is not a size");
  if (bytes == 0) return;
  mapped_ = bytes + kHugePage;
#if defined(_WIN32)
  base_ = VirtualAlloc(nullptr, static_cast<size_t>(mapped_), MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
#else
  base_ = mmap(nullptr, static_cast<size_t>(mapped_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base_ == MAP_FAILED) base_ = nullptr;
#endif
  if (!base_) fail(PRT_OUT_OF_MEMORY, what, " needs ", bytes, " bytes of host memory; ", host_memory_free(), " are free");
  data_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(base_) + kHugePage - 1) / kHugePage * kHugePage);
#if defined(MADV_HUGEPAGE)
  if (huge && bytes >= kHugePage) madvise(data_, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
}

HostBuffer::~HostBuffer() {
  if (!base_) return;
#if defined(_WIN32)
  VirtualFree(base_, 0, MEM_RELEASE);
#else
  munmap(base_, static_cast<size_t>(mapped_));
#endif
}

HostBuffer::HostBuffer(HostBuffer&& o) noexcept { *this = std::move(o); }

HostBuffer& HostBuffer::operator=(HostBuffer&& o) noexcept {
  std::swap(data_, o.data_);
  std::swap(base_, o.base_);
  std::swap(bytes_, o.bytes_);
  std::swap(mapped_, o.mapped_);
  return *this;
}

}  // namespace prt
