// Memory in one piece: measured first, taken once, handed out as views; nothing is freed before the whole.
#pragma once
#include <cstdint>
#include <utility>

#include "base/tensor.h"

namespace prt {

// One piece of memory of some kind, given back when it goes out of scope. cuda/device.h makes those of a GPU.
class Buffer {
 public:
  using Release = void (*)(const Buffer&);
  Buffer() = default;
  Buffer(char* data, int64_t bytes, Release release, void* base = nullptr, int64_t extra = 0)
      : data_(data), bytes_(bytes), release_(release), base_(base), extra_(extra) {}
  ~Buffer() {
    if (release_) release_(*this);
  }
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept;
  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  void* base() const { return base_; }       // these two are for the release function alone
  int64_t extra() const { return extra_; }

 private:
  char* data_ = nullptr;
  int64_t bytes_ = 0;
  Release release_ = nullptr;
  void* base_ = nullptr;
  int64_t extra_ = 0;
};

// Zero-filled host memory straight from the system. Physical memory is only taken when touched: in 2 MB pages where `huge`, which
// suits what is read from end to end (weights); the KV pool, touched here and there, takes small ones.
Buffer host_buffer(int64_t bytes, const char* what, bool huge = true);

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
  void skip(int64_t bytes) { used_ += (bytes + kAlign - 1) / kAlign * kAlign; }
  Arena here() const { return Arena(base_ ? base_ + used_ : nullptr); }  // from the next free byte on

 private:
  char* base_ = nullptr;
  int64_t used_ = 0;
};

}  // namespace prt
