// The scratch of `cluster`, which its contract sizes and its CPU twin lays out.
#pragma once
#include <cstdint>

namespace prt {

// One thread's: keys [n][d], centroids [k][d], their transpose [d][k_pad], sums [k][d], scores [64][k_pad], bias [k_pad], and as integers
// cluster of each row [n], rows and first row of each cluster [k].
inline int64_t cluster_thread_floats(int64_t n, int64_t k, int64_t d) {
  const int64_t k_pad = (k + 15) / 16 * 16;
  return (n * d + 2 * k * d + d * k_pad + 64 * k_pad + k_pad + n + 2 * k_pad + 15) / 16 * 16;
}

}  // namespace prt
