// Memory in one piece: measured first, taken once, handed out as views; nothing is freed before the whole.
#pragma once
#include <cstdint>

#include "base/tensor.h"

namespace prt {

// Zero-filled host memory straight from the system. Physical memory is only taken when touched: in 2 MB pages where `huge`, which
// suits what is read from end to end (weights); the KV pool, touched here and there, takes small ones.
class HostBuffer {
 public:
  HostBuffer() = default;
  HostBuffer(int64_t bytes, const char* what, bool huge = true);
  ~HostBuffer();
  HostBuffer(HostBuffer&& other) noexcept;
  HostBuffer& operator=(HostBuffer&& other) noexcept;
  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  char* data_ = nullptr;
  void* base_ = nullptr;
  int64_t bytes_ = 0, mapped_ = 0;
};

int64_t host_memory_total();
int64_t host_memory_free();  // what can be taken without swapping

// Walks over a buffer. With a null base it only measures, so that one layout function gives both the size and the views.
class Arena {
 public:
  static constexpr int64_t kAlign = 256;
  Arena() = default;
  explicit Arena(char* base) : base_(base) {}
  template <class... Dims>
  Tensor take(DType dtype, Dims... dims) {
    Tensor t = make_tensor(base_ ? base_ + used_ : nullptr, dtype, dims...);
    used_ += (t.bytes() + kAlign - 1) / kAlign * kAlign;
    return t;
  }
  int64_t used() const { return used_; }

 private:
  char* base_ = nullptr;
  int64_t used_ = 0;
};

}  // namespace prt
