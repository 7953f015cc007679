// The log callback. Silent until a caller sets one.
#pragma once
#include <string>

#include "pyruntime.h"

namespace prt {
void log_set(prt_log_fn fn, void* user, int32_t max_level);
bool log_wanted(int32_t level);
void log_write(int32_t level, const std::string& text);
}  // namespace prt
