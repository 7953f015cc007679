#include "base/log.h"

#include <atomic>
#include <mutex>

namespace prt {

namespace {
std::mutex mutex;
prt_log_fn callback = nullptr;
void* callback_user = nullptr;
std::atomic<int32_t> level_wanted{PRT_LOG_NONE};
}  // namespace

void log_set(prt_log_fn fn, void* user, int32_t max_level) {
  std::lock_guard<std::mutex> lock(mutex);
  callback = fn;
  callback_user = user;
  level_wanted = fn ? max_level : int32_t{PRT_LOG_NONE};
}

bool log_wanted(int32_t level) { return level <= level_wanted.load(std::memory_order_relaxed); }

void log_write(int32_t level, const std::string& text) {
  if (!log_wanted(level)) return;
  std::lock_guard<std::mutex> lock(mutex);
  if (callback) callback(callback_user, level, text.c_str());
}

}  // namespace prt
