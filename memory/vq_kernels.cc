#include "memory/vq_kernels.h"

namespace memory3::vq {

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

int AvailableKernels(const Kernels* out[3]) {
  int n = 0;
#if defined(__x86_64__)
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (fma && __builtin_cpu_supports("avx512f")) out[n++] = &kAvx512Kernels;
  if (fma) out[n++] = &kAvx2Kernels;
#endif
  out[n++] = &kBaselineKernels;
  return n;
}

const Kernels& PickKernels() {
  const Kernels* kernels[3];
  AvailableKernels(kernels);
  return *kernels[0];
}

}  // namespace memory3::vq
