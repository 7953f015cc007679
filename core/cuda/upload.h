// Filling device memory from whatever can fill host memory: a file, a conversion. Each writer has two pinned pieces, so that one is filled
// while the other is on its way.
#pragma once
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda/device.h"

namespace prt {

class Upload {
 public:
  static constexpr int64_t kPiece = 4 << 20;  // bytes; 2 pieces for each of up to 16 threads are 128 MiB of pinned memory
  using Fill = std::function<void(char* to, int64_t offset, int64_t bytes)>;  // bytes [offset, offset + bytes) of what is written

  explicit Upload(int32_t device);
  ~Upload();
  // Any number of threads at once. The bytes are on the device when it returns.
  void write(void* dst, int64_t bytes, const Fill& fill);

 private:
  struct Lane;
  int32_t device_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Lane>> idle_;
};

}  // namespace prt
