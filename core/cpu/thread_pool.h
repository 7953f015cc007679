// parallel_for over a fixed set of threads that live as long as their session.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace prt {

int32_t usable_cores();  // physical cores that this process may run on

// One caller at a time (the session's lock sees to that). Work items are handed out one by one from a shared counter, so a
// thread that lost its core does not hold up the rest; results must not depend on which thread ran an item.
class ThreadPool {
 public:
  using Body = void (*)(void* context, int64_t item, int32_t thread);

  explicit ThreadPool(int32_t n_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int32_t size() const { return static_cast<int32_t>(workers_.size()) + 1; }

  // Calls fn(item, thread) for item in [0, n), thread in [0, size()). fn must not throw.
  template <class F>
  void parallel_for(int64_t n, F&& fn) {
    if (n <= 1 || workers_.empty()) {
      for (int64_t i = 0; i < n; ++i) fn(i, 0);
      return;
    }
    run(n, [](void* context, int64_t item, int32_t thread) { (*static_cast<F*>(context))(item, thread); }, &fn);
  }

 private:
  void run(int64_t n, Body body, void* context);
  void work(int32_t thread);
  void drain(int32_t thread);

  std::vector<std::thread> workers_;
  Body body_ = nullptr;
  void* context_ = nullptr;
  int64_t n_ = 0;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<int32_t> busy_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int32_t> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace prt
