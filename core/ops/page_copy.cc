// Bookkeeping of a few pages: the same on every CPU, so it has no instruction-set twins.
#include "ops/ops.h"

namespace prt {

void page_copy(const Backend&, const PageCopy& a) {
  check_shape("page_copy", "src", a.src, DType::i32, {-1});
  check_shape("page_copy", "dst", a.dst, DType::i32, {a.src.shape[0]});
  for (const Tensor* pages : {&a.k_pages, &a.v_pages}) {
    const int64_t bytes = pages->row_size() * dtype_size(pages->dtype);
    for (int64_t i = 0; i < a.src.shape[0]; ++i) {
      const int64_t src = a.src.as<int32_t>()[i], dst = a.dst.as<int32_t>()[i];
      check(src >= 0 && src < pages->shape[0] && dst >= 0 && dst < pages->shape[0], "page_copy: page ", src, " -> ", dst,
            " is outside the ", pages->shape[0], " pages");
      std::memcpy(pages->as<char>() + dst * bytes, pages->as<char>() + src * bytes, static_cast<size_t>(bytes));
    }
  }
}

}  // namespace prt
