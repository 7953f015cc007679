// Errors inside the core: throw prt::Error, or use check(); guard() in api.cc turns either into a prt_status and a text.
#pragma once
#include <exception>
#include <sstream>
#include <string>
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

// Concatenates its arguments: text("n_page is ", n) -> "n_page is 3".
template <class... Args>
std::string text(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

template <class... Args>
[[noreturn]] void fail(prt_status status, const Args&... args) {
  throw Error(status, text(args...));
}

// check(ok, "what", value, ...): the text is only built on failure.
template <class... Args>
inline void check(bool ok, const Args&... args) {
  if (!ok) [[unlikely]]
    fail(PRT_INVALID_ARGUMENT, args...);
}

}  // namespace prt
