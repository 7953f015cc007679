// prt_op_run("uncluster", {k_pages, v_pages, order, src, dst}, {})
#include <cstring>

#include "attention/sparse.h"
#include "ops/cuda_table.h"

namespace prt {

int64_t uncluster_scratch_bytes(int64_t n_page, int64_t d) { return n_page * kPageTokens * d * 4; }

void check_contents(const Uncluster& a) {
  const int64_t n_page = a.k_pages.shape[0], h_kv = a.k_pages.shape[1], rows = a.src.shape[0] * kPageTokens;
  for (const Tensor* list : {&a.src, &a.dst})
    for (int64_t i = 0; i < list->shape[0]; ++i) {
      const int32_t page = list->as<int32_t>()[i];
      check(page >= 0 && page < n_page, "uncluster: page ", page, " is outside the ", n_page, " pages");
    }
  for (int64_t i = 0; i < a.src.shape[0]; ++i)
    for (int64_t r = 0; r < h_kv * kPageTokens; ++r) {
      const uint16_t was = a.order.row<uint16_t>(a.src.as<int32_t>()[i])[r];
      check(was < rows, "uncluster: order of page ", a.src.as<int32_t>()[i], " names row ", was, ", the segment has ", rows);
    }
}

void uncluster(const Backend& backend, const Uncluster& a) {
  const char* op = "uncluster";
  check_stored(op, "k_pages", a.k_pages, {-1, -1, kPageTokens, -1});
  const int64_t n_page = a.k_pages.shape[0], h_kv = a.k_pages.shape[1], d = a.k_pages.shape[3];
  check_shape(op, "v_pages", a.v_pages, a.k_pages.dtype, {n_page, h_kv, kPageTokens, d});
  check_shape(op, "order", a.order, DType::u16, {n_page, h_kv, kPageTokens});
  check_shape(op, "src", a.src, DType::i32, {-1});
  check_shape(op, "dst", a.dst, DType::i32, {-1});
  const int64_t n = a.src.shape[0], m = a.dst.shape[0];
  check(m <= n && n <= kMaxSegmentPages, op, ": ", n, " pages go into ", m, ", expected no more than these, of at most ", kMaxSegmentPages);
  const int64_t need = uncluster_scratch_bytes(n, d);
  check(a.scratch.bytes() >= need, op, ": scratch has ", a.scratch.bytes(), " bytes, ", need, " are needed");
  if (backend.cuda) return backend.cuda->uncluster(*backend.stream, a);
  check_contents(a);
  const int32_t *src = a.src.as<int32_t>(), *dst = a.dst.as<int32_t>();
  const auto bytes = static_cast<size_t>(d * dtype_size(a.k_pages.dtype)), head = bytes * kPageTokens;
  char* copy = a.scratch.as<char>();
  for (const Tensor* pages : {&a.k_pages, &a.v_pages})
    for (int64_t h = 0; h < h_kv; ++h) {
      const auto at = [&](int32_t page) { return pages->as<char>() + static_cast<size_t>(page * h_kv + h) * head; };
      for (int64_t i = 0; i < n; ++i) std::memcpy(copy + static_cast<size_t>(i) * head, at(src[i]), head);
      for (int64_t r = 0; r < n * kPageTokens; ++r) {
        const int64_t was = a.order.row<uint16_t>(src[r / kPageTokens])[h * kPageTokens + r % kPageTokens];
        if (was / kPageTokens < m)
          std::memcpy(at(dst[was / kPageTokens]) + static_cast<size_t>(was % kPageTokens) * bytes, copy + static_cast<size_t>(r) * bytes,
                      bytes);
      }
    }
}

}  // namespace prt
