#include "base/backend.h"

#include "ops/cpu_table.h"

namespace prt {

Backend cpu_backend(ThreadPool& pool, Isa isa) {
  const CpuOps* ops = &baseline::cpu_ops;
#if defined(PRT_X86)
  switch (isa) {
    case Isa::baseline: break;
    case Isa::avx2: ops = &avx2::cpu_ops; break;
#if defined(PRT_WITHOUT_AVX512)
    case Isa::avx512:
    case Isa::avx512bf16: ops = &avx2::cpu_ops; break;
#else
    case Isa::avx512: ops = &avx512::cpu_ops; break;
    case Isa::avx512bf16: ops = &avx512bf16::cpu_ops; break;
#endif
    case Isa::amx: ops = &amx::cpu_ops; break;
  }
#else
  (void)isa;
#endif
  return {ops, &pool};
}

}  // namespace prt
