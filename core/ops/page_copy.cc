// prt_op_run("page_copy", {k_pages, v_pages, src, dst})
#include <cstring>

#include "ops/contents.h"
#include "ops/cuda_table.h"

namespace prt {

void check_contents(const PageCopy& a) {
  const int64_t n_page = a.k_pages.shape[0];
  const int32_t *src = a.src.as<int32_t>(), *dst = a.dst.as<int32_t>();
  for (int64_t i = 0; i < a.src.shape[0]; ++i)
    check(src[i] >= 0 && src[i] < n_page && dst[i] >= 0 && dst[i] < n_page, "page_copy: page ", src[i], " -> ", dst[i], " is outside the ",
          n_page, " pages");
}

void page_copy(const Backend& backend, const PageCopy& a) {
  check_shape("page_copy", "src", a.src, DType::i32, {-1});
  check_shape("page_copy", "dst", a.dst, DType::i32, {a.src.shape[0]});
  check_stored("page_copy", "k_pages", a.k_pages, {-1, -1, kPageTokens, -1});
  const int64_t n_page = a.k_pages.shape[0], n = a.src.shape[0];
  check_shape("page_copy", "v_pages", a.v_pages, a.k_pages.dtype, {n_page, a.k_pages.shape[1], kPageTokens, a.k_pages.shape[3]});
  if (backend.cuda) return backend.cuda->page_copy(*backend.stream, a);
  check_contents(a);
  const int32_t *src = a.src.as<int32_t>(), *dst = a.dst.as<int32_t>();
  const int64_t bytes = a.k_pages.row_size() * dtype_size(a.k_pages.dtype);
  for (const Tensor* pages : {&a.k_pages, &a.v_pages})
    for (int64_t i = 0; i < n; ++i)
      std::memmove(pages->as<char>() + dst[i] * bytes, pages->as<char>() + src[i] * bytes, static_cast<size_t>(bytes));
}

}  // namespace prt
