#include "cuda/launch.cuh"
#include "cuda/vec.cuh"
#include "ops/cuda_table.h"

namespace prt::cuda {

namespace {

constexpr int kThreads = 256, kEach = 4;  // copies of a thread, all loads in flight before the first store

// No page is both read and written: a copy goes to a page that was free. Word is 16 bytes, or 2 where pages are not whole ones.
template <class Word>
__global__ void page_copy_kernel(Word* k_pages, Word* v_pages, int64_t page_words, const int32_t* src, const int32_t* dst) {
  pdl_wait();
  pdl_launch();
  Word* pages = blockIdx.z ? v_pages : k_pages;
  const Word* from = pages + src[blockIdx.x] * page_words;
  Word* to = pages + dst[blockIdx.x] * page_words;
  const int64_t first = int64_t{blockIdx.y} * kThreads * kEach + threadIdx.x;
  Word x[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (first + i * kThreads < page_words) x[i] = from[first + i * kThreads];
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (first + i * kThreads < page_words) to[first + i * kThreads] = x[i];
}

template <class Word>
void run(const CudaStream& s, const PageCopy& a) {
  const int64_t words = a.k_pages.row_size() * dtype_size(a.k_pages.dtype) / static_cast<int64_t>(sizeof(Word));
  launch(s, page_copy_kernel<Word>, dim3(a.src.shape[0], (words + kThreads * kEach - 1) / (kThreads * kEach), 2), kThreads, 0,
         a.k_pages.as<Word>(), a.v_pages.as<Word>(), words, a.src.as<int32_t>(), a.dst.as<int32_t>());
}

}  // namespace

void page_copy(const CudaStream& s, const PageCopy& a) {
  const bool wide = in_pieces(a.k_pages, 8) && in_pieces(a.v_pages, 8);
  wide ? run<uint4>(s, a) : run<uint16_t>(s, a);
}

}  // namespace prt::cuda
