// Hopper's own machinery, one instruction per function: mbarriers, the copy engine (TMA), warpgroup matrix products (wgmma).
// mbarriers and TMA are there from sm_90 on, wgmma and setmaxnreg on sm_90a only; elsewhere these functions are empty, so a kernel built
// of them compiles everywhere, keeps its body in #ifdef PRT_SM90A and is only started where CudaStream::arch is 90.
//
// What the tensor cores and the copy engine see of shared memory is the "async proxy": after ordinary stores that they shall read,
// every storing thread calls fence_async_proxy() before the barrier.
#pragma once
#include <cuda.h>

#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/types.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PRT_SM90A 1
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define PRT_SM90 1
#endif
// Blocks per cluster, between __global__ void and the kernel's name; launch() needs to know nothing of it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define PRT_CLUSTER(n)
#else
#define PRT_CLUSTER(n) __cluster_dims__(n, 1, 1)
#endif

namespace prt {

// ---- tensor maps (host). dims and box count elements, innermost first; strides are those of dims[1..], in bytes, multiples of 16. Reads
// past dims give 0, writes there are dropped. With swizzle the innermost box dimension is 128, 64 or 32 bytes.
template <int kDims>
struct TensorMapShape {
  int64_t dims[kDims];
  int64_t stride_bytes[kDims > 1 ? kDims - 1 : 1];
  int32_t box[kDims];
};

template <int kDims>
CUtensorMap make_tensor_map(const void* data, DType dtype, const TensorMapShape<kDims>& shape, CUtensorMapSwizzle swizzle,
                            CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {  // from the driver, so that nothing links against it
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found{};
    cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found), "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess) fail(PRT_DEVICE_ERROR, "the NVIDIA driver has no cuTensorMapEncodeTiled; it is too old");
    return reinterpret_cast<Encode>(f);
  }();
  cuuint64_t dims[kDims], strides[kDims];
  cuuint32_t box[kDims], steps[kDims];
  for (int i = 0; i < kDims; ++i) {
    dims[i] = static_cast<cuuint64_t>(shape.dims[i]);
    if (i + 1 < kDims) strides[i] = static_cast<cuuint64_t>(shape.stride_bytes[i]);
    box[i] = static_cast<cuuint32_t>(shape.box[i]);
    steps[i] = 1;
  }
  const CUtensorMapDataType type = dtype == DType::bf16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                   : dtype == DType::f32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                                         : CU_TENSOR_MAP_DATA_TYPE_INT32;
  CUtensorMap map;
  const CUresult r = encode(&map, type, kDims, const_cast<void*>(data), dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                            promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (r != CUDA_SUCCESS)
    fail(PRT_DEVICE_ERROR, "cuTensorMapEncodeTiled: error ", static_cast<int>(r), " for ", dims[0], " x ", kDims > 1 ? dims[1] : 1);
  return map;
}

// A matrix [n_row][n_col] read or written in boxes of box_rows x box_cols.
inline CUtensorMap make_matrix_map(const void* data, DType dtype, int64_t n_row, int64_t n_col, int64_t row_stride, int32_t box_rows,
                                   int32_t box_cols, CUtensorMapSwizzle swizzle) {
  return make_tensor_map<2>(data, dtype, {{n_col, n_row}, {row_stride * dtype_size(dtype)}, {box_cols, box_rows}}, swizzle);
}

#ifdef __CUDACC__

// ---- mbarriers. A phase ends when the expected arrivals and bytes have come; mbar_wait(bar, p) returns once phase p (0, 1, 0, ...) is
// over, so a consumer's first wait has parity 0, and a producer's first wait for a slot that starts out empty has parity 1.
__device__ __forceinline__ void mbar_init(uint64_t* bar, uint32_t arrivals) {
#ifdef PRT_SM90
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_addr(bar)), "r"(arrivals) : "memory");
#endif
}
__device__ __forceinline__ void mbar_init_fence() {  // after the inits, before anybody else (the copy engine, the cluster) uses them
#ifdef PRT_SM90
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void mbar_expect(uint64_t* bar, uint32_t bytes) {  // one arrival, and so many bytes to come
#ifdef PRT_SM90
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_addr(bar)), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void mbar_arrive(uint64_t* bar) {
#ifdef PRT_SM90
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_addr(bar)) : "memory");
#endif
}
__device__ __forceinline__ bool mbar_test(uint64_t* bar, uint32_t parity) {
  uint32_t done = 1;
#ifdef PRT_SM90
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(smem_addr(bar)), "r"(parity)
               : "memory");
#endif
  return done != 0;
}
__device__ __forceinline__ void mbar_wait(uint64_t* bar, uint32_t parity) {
  while (!mbar_test(bar, parity)) {
  }
}
__device__ __forceinline__ void fence_async_proxy() {
#ifdef PRT_SM90
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- clusters
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t r = 0;
#ifdef PRT_SM90
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
#endif
  return r;
}
// The cluster's barrier is for every thread of it; warps need not be converged.
__device__ __forceinline__ void cluster_arrive() {
#ifdef PRT_SM90
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#ifdef PRT_SM90
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
// The same for whole blocks: one thread's fence covers what the block wrote before, a fence of every thread takes several times as long.
__device__ __forceinline__ void cluster_arrive_block() {
  __syncthreads();
#ifdef PRT_SM90
  if (threadIdx.x == 0) asm volatile("fence.acq_rel.cluster;" ::: "memory");
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait_block() {
#ifdef PRT_SM90
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}
// A generic address of this block's shared memory, in another block.
template <class T>
__device__ __forceinline__ T* in_block(T* p, uint32_t cta) {
#ifdef PRT_SM90
  asm("mapa.u64 %0, %0, %1;" : "+l"(p) : "r"(cta));
#endif
  return p;
}
// Another block's copy of a shared-memory location; store there, then cluster_sync().
__device__ __forceinline__ uint32_t cluster_addr(const void* p, uint32_t cta) {
  uint32_t a = smem_addr(p);
#ifdef PRT_SM90
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(cta));
#endif
  return a;
}
__device__ __forceinline__ void store_cluster(uint32_t addr, float a, float b, float c, float d) {
#ifdef PRT_SM90
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(addr), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
#endif
}

// ---- the copy engine. How long L2 keeps a line: the encodings are those that createpolicy gives.
constexpr uint64_t kCacheNormal = 0x1000000000000000, kCacheEvictFirst = 0x12F0000000000000, kCacheEvictLast = 0x14F0000000000000;

__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap* map) {
#ifdef PRT_SM90
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}
__device__ __forceinline__ void tma_load(void* dst, const CUtensorMap* map, uint64_t* bar, int c0, int c1, uint64_t cache = kCacheNormal) {
#ifdef PRT_SM90
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(
          smem_addr(dst)),
      "l"(map), "r"(smem_addr(bar)), "r"(c0), "r"(c1), "l"(cache)
      : "memory");
#endif
}
__device__ __forceinline__ void tma_load(void* dst, const CUtensorMap* map, uint64_t* bar, int c0, int c1, int c2, uint64_t cache) {
#ifdef PRT_SM90
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], %6;" ::
          "r"(smem_addr(dst)),
      "l"(map), "r"(smem_addr(bar)), "r"(c0), "r"(c1), "r"(c2), "l"(cache)
      : "memory");
#endif
}
// Stores are grouped: tma_store..., bulk_commit(), and bulk_wait_read<n>() until all but the last n groups have left shared memory.
__device__ __forceinline__ void tma_store(const CUtensorMap* map, const void* src, int c0, int c1) {
#ifdef PRT_SM90
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(smem_addr(src)), "r"(c0),
               "r"(c1)
               : "memory");
#endif
}
__device__ __forceinline__ void tma_add(const CUtensorMap* map, const void* src, int c0, int c1) {  // out += src, each element rounded once
#ifdef PRT_SM90
  asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(smem_addr(src)),
               "r"(c0), "r"(c1)
               : "memory");
#endif
}
__device__ __forceinline__ void bulk_commit() {
#ifdef PRT_SM90
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}
template <int kLeft>
__device__ __forceinline__ void bulk_wait_read() {
#ifdef PRT_SM90
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kLeft) : "memory");
#endif
}
template <int kLeft>
__device__ __forceinline__ void bulk_wait() {
#ifdef PRT_SM90
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// ---- registers and barriers of warpgroups. setmaxnreg needs __launch_bounds__(threads, 1), and each role one branch of one if/else.
template <int kRegisters>
__device__ __forceinline__ void registers_up_to() {
#ifdef PRT_SM90A
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void registers_down_to() {
#ifdef PRT_SM90A
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
// Named barriers 1..15 (0 is __syncthreads): some warps of the block, threads being their number times 32.
__device__ __forceinline__ void named_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// One elected lane of a converged warp.
__device__ __forceinline__ bool elect_one() {
  uint32_t p = (threadIdx.x & 31) == 0;
#ifdef PRT_SM90
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(p));
#endif
  return p != 0;
}

// ---- stmatrix: the four 8 x 8 blocks that a warp holds in wgmma's accumulator layout, rounded to 16 bits, to rows of shared memory;
// lane l gives the address of row l % 8 of block l / 8.
__device__ __forceinline__ void stmatrix_x4(uint32_t row_addr, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
#ifdef PRT_SM90
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_addr), "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
#endif
}

// ---- wgmma: d[64][kN] (+)= a[64][16] b[16][kN] by one warpgroup (128 threads), f32 accumulators in registers. Thread t of the warpgroup,
// warp w = t / 32, lane l = t % 32, holds d[16 w + l / 4 + 8 (i / 2 % 2)][8 (i / 4) + 2 (l % 4) + i % 2] in element i.
//
//   wgmma_fence();                       // before the first product that uses registers written since
//   for (k...) Wgmma<kN, T>::mma(d, a_desc, b_desc, accumulate);
//   wgmma_commit(); ... wgmma_wait<0>(); // until all but the last n groups are complete
//
// Operands in shared memory are described by 64-bit descriptors, made for tiles that TMA has written with 128-byte swizzle, tile bases
// aligned to 1024 bytes:
//   K-major (k contiguous: x and weight rows, q, k): box of 64 k x rows. desc = wgmma_desc(tile), k step of 16: + 32 bytes, i.e. desc + 2;
//     64 rows further: + 8192 bytes, i.e. desc + 512.
//   MN-major (n contiguous: v in p v): box of 64 n x rows k. desc = wgmma_desc(tile, bytes from one box of 64 n to the next); k step of 16:
//     + 2048 bytes, i.e. desc + 128; kBTransposed = 1.
__device__ __forceinline__ uint64_t wgmma_desc(const void* tile, uint32_t lead_bytes = 16) {
  return uint64_t{(smem_addr(tile) & 0x3ffff) >> 4} | uint64_t{lead_bytes >> 4} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
__device__ __forceinline__ void wgmma_fence() {
#ifdef PRT_SM90A
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wgmma_commit() {
#ifdef PRT_SM90A
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int kLeft>
__device__ __forceinline__ void wgmma_wait() {
#ifdef PRT_SM90A
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
#endif
}
template <int kCount>
__device__ __forceinline__ void wgmma_keep(float (&d)[kCount]) {  // the compiler may not move accesses to d across this
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int kN, class T>
struct Wgmma;  // kN: a multiple of 32 up to 256; T: bf16 or f16

#define PRT_D0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define PRT_D1 PRT_D0 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define PRT_D2 PRT_D1 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define PRT_D3 PRT_D2 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define PRT_D4 PRT_D3 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define PRT_D5 PRT_D4 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define PRT_D6 PRT_D5 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define PRT_D7 PRT_D6 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define PRT_FQ(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PRT_F(i) PRT_FQ(i), PRT_FQ(i + 4), PRT_FQ(i + 8), PRT_FQ(i + 12)
#define PRT_F0 PRT_F(0)
#define PRT_F1 PRT_F0, PRT_F(16)
#define PRT_F2 PRT_F1, PRT_F(32)
#define PRT_F3 PRT_F2, PRT_F(48)
#define PRT_F4 PRT_F3, PRT_F(64)
#define PRT_F5 PRT_F4, PRT_F(80)
#define PRT_F6 PRT_F5, PRT_F(96)
#define PRT_F7 PRT_F6, PRT_F(112)

#ifdef PRT_SM90A
#define PRT_ASM(...) asm volatile(__VA_ARGS__)
#else
#define PRT_ASM(...)
#endif
// i: accumulators / 16 - 1; n0...: the numbers of the operands behind them
#define PRT_WGMMA_TYPE(N, T, NAME, i, n0, n1, n2, n3, n4, n5, n6)                                                                          \
  template <>                                                                                                                              \
  struct Wgmma<N, T> {                                                                                                                     \
    template <int kBTransposed = 0>                                                                                                        \
    static __device__ __forceinline__ void mma(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {                                \
      PRT_ASM("{\n.reg .pred p;\nsetp.ne.b32 p, %" #n2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" PRT_D##i \
              "}, %" #n0 ", %" #n1 ", p, 1, 1, 0, %" #n3 ";\n}" : PRT_F##i : "l"(a),                                                       \
              "l"(b), "r"(accumulate), "n"(kBTransposed));                                                                                 \
    }                                                                                                                                      \
    template <int kBTransposed = 0>                                                                                                        \
    static __device__ __forceinline__ void mma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {                    \
      PRT_ASM("{\n.reg .pred p;\nsetp.ne.b32 p, %" #n5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" PRT_D##i \
              "}, {%" #n0 ",%" #n1 ",%" #n2 ",%" #n3 "}, %" #n4 ", p, 1, 1, %" #n6 ";\n}" : PRT_F##i : "r"(a[0]),                          \
              "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kBTransposed));                                                \
    }                                                                                                                                      \
  };
#define PRT_WGMMA(N, ...)                      \
  PRT_WGMMA_TYPE(N, bf16, "bf16", __VA_ARGS__) \
  PRT_WGMMA_TYPE(N, f16, "f16", __VA_ARGS__)
PRT_WGMMA(32, 0, 16, 17, 18, 19, 20, 21, 22)
PRT_WGMMA(64, 1, 32, 33, 34, 35, 36, 37, 38)
PRT_WGMMA(96, 2, 48, 49, 50, 51, 52, 53, 54)
PRT_WGMMA(128, 3, 64, 65, 66, 67, 68, 69, 70)
PRT_WGMMA(160, 4, 80, 81, 82, 83, 84, 85, 86)
PRT_WGMMA(192, 5, 96, 97, 98, 99, 100, 101, 102)
PRT_WGMMA(224, 6, 112, 113, 114, 115, 116, 117, 118)
PRT_WGMMA(256, 7, 128, 129, 130, 131, 132, 133, 134)

#undef PRT_WGMMA
#undef PRT_WGMMA_TYPE
#undef PRT_ASM
#undef PRT_D0
#undef PRT_D1
#undef PRT_D2
#undef PRT_D3
#undef PRT_D4
#undef PRT_D5
#undef PRT_D6
#undef PRT_D7
#undef PRT_FQ
#undef PRT_F
#undef PRT_F0
#undef PRT_F1
#undef PRT_F2
#undef PRT_F3
#undef PRT_F4
#undef PRT_F5
#undef PRT_F6
#undef PRT_F7
#endif  // __CUDACC__

}  // namespace prt
