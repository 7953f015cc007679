#include "base/check.h"

#include <charconv>

namespace prt {

void Piece::append_to(std::string& out) const {
  char digits[32];
  switch (kind_) {
    case Kind::text: out += text_; break;
    case Kind::letter: out += letter_; break;
    case Kind::real:  // as printf's %g, whatever the locale
      out.append(digits, std::to_chars(digits, digits + sizeof digits, real_, std::chars_format::general, 6).ptr);
      break;
    case Kind::integer: out += std::to_string(integer_); break;
    case Kind::natural: out += std::to_string(natural_); break;
  }
}

std::string join(const Piece* pieces, size_t n) {
  std::string out;
  for (size_t i = 0; i < n; ++i) pieces[i].append_to(out);
  return out;
}

void fail_with(prt_status status, const Piece* pieces, size_t n) { throw Error(status, join(pieces, n)); }

}  // namespace prt
