// What this CPU can do, found at run time. Levels are ordered: each contains the ones before it.
#pragma once
#include <string>

namespace prt {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3, amx = 4 };

const char* isa_name(Isa isa);
Isa isa_from_name(const std::string& name);  // fails by name on anything unknown
Isa isa_best();                       // of this machine
Isa isa_at_most(const char* name);    // the best that is not above `name`; NULL: isa_best()
std::string cpu_model_name();

}  // namespace prt
