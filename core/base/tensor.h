// A view of device memory with its shape. Rows may be strided (a column range of a wider matrix); the rest is dense.
#pragma once
#include <string>

#include "base/dtype.h"

namespace prt {

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  int32_t n_dim = 0;
  int64_t shape[4] = {0, 0, 0, 0};
  int64_t row_stride = 0;  // elements from one index of dimension 0 to the next

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  template <class T>
  T* row(int64_t i) const {
    return static_cast<T*>(data) + i * row_stride;
  }
  explicit operator bool() const { return data != nullptr; }

  int64_t row_size() const {  // elements in one index of dimension 0
    int64_t n = 1;
    for (int i = 1; i < n_dim; ++i) n *= shape[i];
    return n;
  }
  int64_t size() const { return n_dim == 0 ? 0 : shape[0] * row_size(); }
  int64_t bytes() const { return size() * dtype_size(dtype); }

  Tensor rows(int64_t begin, int64_t n) const {
    Tensor t = *this;
    t.data = static_cast<char*>(data) + begin * row_stride * dtype_size(dtype);
    t.shape[0] = n;
    return t;
  }
  Tensor cols(int64_t begin, int64_t n) const {  // of a matrix
    Tensor t = *this;
    t.data = static_cast<char*>(data) + begin * dtype_size(dtype);
    t.shape[1] = n;
    return t;
  }
};

template <class... Dims>
Tensor make_tensor(void* data, DType dtype, Dims... dims) {
  Tensor t;
  t.data = data;
  t.dtype = dtype;
  for (int64_t d : {static_cast<int64_t>(dims)...}) t.shape[t.n_dim++] = d;
  t.row_stride = t.row_size();
  return t;
}

inline std::string shape_text(const Tensor& t) {
  std::string s = "[";
  for (int i = 0; i < t.n_dim; ++i) s += (i ? "][" : "") + std::to_string(t.shape[i]);
  return s + "] " + dtype_name(t.dtype);
}

// The checks of an operation's operands: check_shape("rms_norm", "weight", a.weight, DType::f32, {d}); -1 matches any size.
inline void check_shape(const char* op, const char* operand, const Tensor& t, DType dtype, std::initializer_list<int64_t> want) {
  bool ok = t.data != nullptr && t.dtype == dtype && t.n_dim == static_cast<int32_t>(want.size());
  int i = 0;
  for (int64_t w : want) {
    if (ok && w >= 0 && t.shape[i] != w) ok = false;
    ++i;
  }
  if (ok) return;
  std::string s = "[";
  i = 0;
  for (int64_t w : want) s += (i++ ? "][" : "") + (w < 0 ? std::string("any") : std::to_string(w));
  fail(PRT_INVALID_ARGUMENT, op, ": ", operand, " is ", t.data ? shape_text(t) : std::string("missing"), ", expected ", s, "] ",
       dtype_name(dtype));
}

// The same for weights and KV pages, which are kept in any of the float formats.
inline void check_stored(const char* op, const char* operand, const Tensor& t, std::initializer_list<int64_t> want) {
  check_shape(op, operand, t, t.dtype, want);
  check(t.dtype == DType::f32 || t.dtype == DType::f16 || t.dtype == DType::bf16, op, ": ", operand, " is ", shape_text(t),
        ", expected f32, f16 or bf16");
}

}  // namespace prt
