// Reading structures that begin with struct_size. PRT_SIZE_THROUGH(type, field) is the size of a structure whose last field that is.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstring>

#include "base/check.h"

#define PRT_SIZE_THROUGH(type, field) static_cast<uint32_t>(offsetof(type, field) + sizeof(type::field))

namespace prt {

// A caller built against an older header passes a shorter structure: its missing tail keeps the defaults. A newer caller's longer
// one is accepted only if what we do not know is zero.
template <class T>
T read_struct(const T* from, T defaults, uint32_t smallest, const char* what) {
  check(from != nullptr, what, " is NULL");
  const uint32_t size = from->struct_size;
  check(size >= smallest && size <= (1u << 16), what, ".struct_size is ", size, ", expected ", sizeof(T), ": start from the _INIT value");
  const unsigned char* bytes = reinterpret_cast<const unsigned char*>(from);
  for (uint32_t i = sizeof(T); i < size; ++i)
    if (bytes[i] != 0) fail(PRT_UNSUPPORTED, what, " uses fields that this version of the library does not have (struct_size ", size, ")");
  std::memcpy(&defaults, from, std::min<size_t>(size, sizeof(T)));
  defaults.struct_size = sizeof(T);
  return defaults;
}

// Writing one back: never more than the caller has room for.
template <class T>
void write_struct(T* to, const T& value, const char* what) {
  check(to != nullptr, what, " is NULL");
  const uint32_t size = to->struct_size;
  check(size >= sizeof(uint32_t) && size <= (1u << 16), what, ".struct_size is ", size, ", expected ", sizeof(T));
  std::memcpy(to, &value, std::min<size_t>(size, sizeof(T)));
  to->struct_size = size;
}

}  // namespace prt
