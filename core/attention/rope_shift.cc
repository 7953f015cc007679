// prt_op_run("rope_shift", {k_pages, pages, cos_sin}, {})
#include "attention/choice.h"
#include "ops/cpu_table.h"
#include "ops/cuda_table.h"

namespace prt {

void check_contents(const RopeShift& a) {
  for (int64_t i = 0; i < a.pages.shape[0]; ++i) {
    const int32_t page = a.pages.as<int32_t>()[i];
    check(page >= 0 && page < a.k_pages.shape[0], "rope_shift: page ", page, " is outside the ", a.k_pages.shape[0], " pages");
  }
}

void rope_shift(const Backend& backend, const RopeShift& a) {
  const char* op = "rope_shift";
  check_stored(op, "k_pages", a.k_pages, {-1, -1, kPageTokens, -1});
  check_shape(op, "pages", a.pages, DType::i32, {-1});
  check_shape(op, "cos_sin", a.cos_sin, DType::f32, {2, a.k_pages.shape[3] / 2});
  if (backend.cuda) return backend.cuda->rope_shift(*backend.stream, a);
  check_contents(a);
  backend.cpu->rope_shift(*backend.pool, a);
}

}  // namespace prt
