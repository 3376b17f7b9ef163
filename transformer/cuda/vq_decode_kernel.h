// The kernel behind CudaVqDecoder. Returns the launch's error.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "transformer/tensor.h"

namespace memory3 {

// Tables as in VqCodebook, in device memory.
struct VqTables {
  const float* rotation = nullptr;
  const float* coarse = nullptr;
  const float* fine = nullptr;
  int coarse_bits = 0, fine_bits = 0;
  int coarse_code_bytes = 0, code_bytes = 0;
};

cudaError_t LaunchVqDecode(const VectorRuns& vectors, int64_t count, int head_dim,
                           const uint8_t* codes, const VqTables& tables, cudaStream_t stream);

}  // namespace memory3
