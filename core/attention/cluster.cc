// prt_op_run("cluster", {k_pages, v_pages, pages, centroid, variance, value, range, order}, {iterations, seed})
#include "attention/cluster.h"

#include <algorithm>
#include <vector>

#include "attention/sparse.h"
#include "ops/cpu_table.h"
#include "ops/cuda_table.h"

namespace prt {

void check_index(const char* op, const ClusterIndex& x, int64_t n_page, int64_t h_kv, int64_t d) {
  check_shape(op, "centroid", x.centroid, DType::f8, {n_page, h_kv, -1, d});
  const int64_t n_slot = x.centroid.shape[2];
  check(n_slot >= 1 && n_slot <= kPageTokens, op, ": centroid has ", n_slot, " clusters per page, expected 1..", kPageTokens);
  check_shape(op, "variance", x.variance, DType::f8, {n_page, h_kv, n_slot, d});
  check_shape(op, "range", x.range, DType::i32, {n_page, h_kv, n_slot, 2});
}

void check_contents(const Cluster& a) {
  std::vector<int32_t> pages(a.pages.as<int32_t>(), a.pages.as<int32_t>() + a.pages.size());
  std::sort(pages.begin(), pages.end());
  for (size_t i = 0; i < pages.size(); ++i) {
    check(pages[i] >= 0 && pages[i] < a.k_pages.shape[0], "cluster: page ", pages[i], " is outside the ", a.k_pages.shape[0], " pages");
    check(i == 0 || pages[i] != pages[i - 1], "cluster: page ", pages[i], " is listed twice");
  }
}

int64_t cluster_scratch_bytes(const Backend& backend, int64_t n_page, int64_t n_slot, int64_t d) {
  if (backend.cuda) return backend.cuda->cluster_scratch_bytes(*backend.stream, n_page, n_slot, d);
  return 4 * backend.pool->size() * cluster_thread_floats(n_page * kPageTokens, n_page * n_slot, d);
}

void cluster(const Backend& backend, const Cluster& a) {
  const char* op = "cluster";
  check_stored(op, "k_pages", a.k_pages, {-1, -1, kPageTokens, -1});
  const int64_t n_page = a.k_pages.shape[0], h_kv = a.k_pages.shape[1], d = a.k_pages.shape[3];
  check(d > 0 && d <= kMaxHead, op, ": d_head is ", d, ", expected 1..", kMaxHead);
  check_shape(op, "v_pages", a.v_pages, a.k_pages.dtype, {n_page, h_kv, kPageTokens, d});
  check_shape(op, "pages", a.pages, DType::i32, {-1, -1});
  check(a.pages.shape[1] >= 1 && a.pages.shape[1] <= kMaxSegmentPages, op, ": a segment has ", a.pages.shape[1], " pages, expected 1..",
        kMaxSegmentPages);
  check_index(op, a.index, n_page, h_kv, d);
  const int64_t n_slot = a.index.centroid.shape[2];
  check_shape(op, "value", a.index.value, DType::f8, {n_page, h_kv, n_slot, d});
  check_shape(op, "order", a.index.order, DType::u16, {n_page, h_kv, kPageTokens});
  check(a.iterations >= 1 && a.iterations <= 1000, op, ": iterations is ", a.iterations, ", expected 1..1000");
  const int64_t need = cluster_scratch_bytes(backend, a.pages.shape[1], n_slot, d);
  check(a.scratch.bytes() >= need, op, ": scratch has ", a.scratch.bytes(), " bytes, ", need, " are needed");
  if (backend.cuda) return backend.cuda->cluster(*backend.stream, a);
  check_contents(a);
  backend.cpu->cluster(*backend.pool, a);
}

}  // namespace prt
