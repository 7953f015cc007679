// Errors inside the core: throw prt::Error, or use check(); guard() in api.cc turns either into a prt_status and a text.
#pragma once
#include <cstdint>
#include <exception>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "pyruntime.h"

namespace prt {

class Error : public std::exception {
 public:
  Error(prt_status status, std::string text) : status_(status), text_(std::move(text)) {}
  prt_status status() const { return status_; }
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  prt_status status_;
  std::string text_;
};

// An argument of text(), whatever its type: the 300 messages are then calls of one function instead of code for each of their signatures.
class Piece {
 public:
  Piece(std::string_view text) : kind_(Kind::text), text_(text) {}
  Piece(const std::string& text) : Piece(std::string_view(text)) {}
  Piece(const char* text) : Piece(std::string_view(text)) {}
  Piece(char letter) : kind_(Kind::letter), letter_(letter) {}
  template <class T>
    requires std::is_arithmetic_v<T>
  Piece(T x) {
    if constexpr (std::is_floating_point_v<T>) kind_ = Kind::real, real_ = x;
    else if constexpr (std::is_signed_v<T>) kind_ = Kind::integer, integer_ = x;
    else kind_ = Kind::natural, natural_ = x;
  }
  void append_to(std::string& out) const;

 private:
  enum class Kind { text, letter, real, integer, natural } kind_;
  union {
    std::string_view text_;
    char letter_;
    double real_;  // written with six digits
    int64_t integer_;
    uint64_t natural_;
  };
};
std::string join(const Piece* pieces, size_t n);
[[noreturn]] void fail_with(prt_status status, const Piece* pieces, size_t n);

// Concatenates its arguments: text("n_page is ", n) -> "n_page is 3".
template <class... Args>
std::string text(const Args&... args) {
  const Piece pieces[] = {args...};
  return join(pieces, sizeof...(args));
}

template <class... Args>
[[noreturn]] void fail(prt_status status, const Args&... args) {
  const Piece pieces[] = {args...};
  fail_with(status, pieces, sizeof...(args));
}

// check(ok, "what", value, ...): the text is only built on failure.
template <class... Args>
inline void check(bool ok, const Args&... args) {
  if (!ok) [[unlikely]]
    fail(PRT_INVALID_ARGUMENT, args...);
}

}  // namespace prt
