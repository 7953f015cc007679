#include "cpu/thread_pool.h"

#include <algorithm>
#include <chrono>
#include <set>
#include <string>

#if defined(__linux__)
#include <sched.h>

#include <cstdio>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace prt {

namespace {
void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Between two operations of a step a worker spins; after this long without work it sleeps, so that an idle session costs
// nothing. The gaps inside a step are below 20 us; waking a sleeper costs about 50 us.
constexpr std::chrono::microseconds kSpin{200};
}  // namespace

int32_t usable_cores() {
  int32_t logical = std::max(1u, std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    std::set<std::string> cores;  // hyper-threads of a core share one sibling list
    logical = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &set)) continue;
      ++logical;
      const std::string path = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list";
      char line[64] = "";
      if (FILE* f = std::fopen(path.c_str(), "r")) {
        if (!std::fgets(line, sizeof line, f)) line[0] = 0;
        std::fclose(f);
      }
      cores.insert(line[0] ? line : std::to_string(cpu));
    }
    if (!cores.empty()) return static_cast<int32_t>(cores.size());
  }
#endif
  return std::max(1, logical);
}

ThreadPool::ThreadPool(int32_t n_threads) {
  try {
    for (int32_t i = 1; i < n_threads; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (...) {  // the system refused a thread: go on with those we have
  }
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    epoch_.fetch_add(1);
  }
  wake_.notify_all();
  for (auto& w : workers_) w.join();
}

void ThreadPool::drain(int32_t thread) {
  for (;;) {
    const int64_t item = next_.fetch_add(1, std::memory_order_relaxed);
    if (item >= n_) return;
    body_(context_, item, thread);
  }
}

void ThreadPool::run(int64_t n, Body body, void* context) {
  n_ = n;
  body_ = body;
  context_ = context;
  next_.store(0, std::memory_order_relaxed);
  busy_.store(static_cast<int32_t>(workers_.size()), std::memory_order_relaxed);
  epoch_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  drain(0);
  for (int spins = 0; busy_.load(std::memory_order_acquire) != 0; ++spins) {
    pause();
    if (spins % 1024 == 1023) std::this_thread::yield();  // the machine is overloaded: let the worker have this core
  }
}

void ThreadPool::work(int32_t thread) {
  uint32_t seen = 0;
  for (;;) {
    auto start = std::chrono::steady_clock::now();
    for (int spins = 0; epoch_.load(std::memory_order_acquire) == seen;) {
      pause();
      if (++spins % 1024 == 0) std::this_thread::yield();
      if (spins % 64 == 0 && std::chrono::steady_clock::now() - start > kSpin) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return epoch_.load(std::memory_order_seq_cst) != seen; });
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      }
    }
    seen = epoch_.load(std::memory_order_acquire);
    if (stop_) return;
    drain(thread);
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace prt
