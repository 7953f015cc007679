#include "attention/choice.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "ops/cuda_table.h"

namespace prt::cuda {
namespace {

constexpr int kThreads = 256;

struct ReuseArgs {
  int32_t *anew, *kept;
  int2* ranges;
  const int32_t *n_range, *made;
  float* query;
  const void* q;
  const int32_t *kv_len, *state;
  int64_t q_stride, stride, check;
  int32_t h_kv, max_range, w, width;
  float threshold;
};

// A block per entry. Floor: two queries read, one written; it is a matter of the launch.
template <class T>
__global__ void __launch_bounds__(kThreads) reuse_kernel(const __grid_constant__ ReuseArgs a) {
  __shared__ double sums[3][32];
  const int entry = static_cast<int>(blockIdx.x), tid = static_cast<int>(threadIdx.x), place = a.state[entry], len = a.kv_len[entry];
  pdl_wait();
  pdl_launch();
  const T* q = static_cast<const T*>(a.q) + entry * a.q_stride;
  const auto part = [&](int i) {  // the query of all heads, or their sum
    float x = 0;
    for (int j = i; j < a.width; j += a.w) x += to_float(q[j]);
    return x;
  };
  bool serves = false;
  float* keep = a.query + int64_t{max(place, 0)} * a.w;
  if (place >= 0) {
    const int64_t made = a.made[place], since = len - made;
    serves = made > 0 && since > 0 && (a.stride == 0 || since < a.stride);
    if (serves && a.check > 0 && since % a.check == 0) {
      double both = 0, old = 0, now = 0;
      for (int i = tid; i < a.w; i += kThreads) {
        const double x = keep[i], y = part(i);
        both += x * y, old += x * x, now += y * y;
      }
      both = block_sum(both, sums[0]), old = block_sum(old, sums[1]), now = block_sum(now, sums[2]);
      serves = both >= static_cast<double>(a.threshold) * sqrt(old) * sqrt(now);
    }
  }
  if (tid == 0) a.kept[entry] = serves ? place : -1, a.anew[entry] = serves ? -1 : place;
  if (place < 0) return;
  if (serves) {
    for (int h = tid; h < a.h_kv; h += kThreads) {  // the last range reaches to the newest row
      const int n = a.n_range[int64_t{place} * a.h_kv + h];
      int2* range = a.ranges + (int64_t{place} * a.h_kv + h) * a.max_range;
      range[n - 1].y = (n > 1 ? range[n - 2].y : 0) + len - range[n - 1].x;
    }
  } else {
    for (int i = tid; i < a.w; i += kThreads) keep[i] = part(i);
  }
}

}  // namespace

void reuse(const CudaStream& stream, const Reuse& x) {
  const ReuseArgs a{x.anew.as<int32_t>(),
                    x.kept.as<int32_t>(),
                    x.ranges.as<int2>(),
                    x.n_range.as<int32_t>(),
                    x.made.as<int32_t>(),
                    x.query.as<float>(),
                    x.q.data,
                    x.kv_len.as<int32_t>(),
                    x.state.as<int32_t>(),
                    x.q.row_stride,
                    x.stride,
                    x.check,
                    static_cast<int32_t>(x.ranges.shape[1]),
                    static_cast<int32_t>(x.ranges.shape[2]),
                    static_cast<int32_t>(x.query.shape[1]),
                    static_cast<int32_t>(x.q.shape[1]),
                    x.threshold};
  with_dtype(x.q.dtype, [&](auto zero) {
    launch(stream, reuse_kernel<decltype(zero)>, dim3(static_cast<uint32_t>(x.q.shape[0])), dim3(kThreads), 0, a);
  });
}

}  // namespace prt::cuda
