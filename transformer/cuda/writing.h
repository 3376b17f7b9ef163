// Scoring and picking the tokens of references (explicit-memory.md, Writing). Launches return the
// launch's error. Shapes: device.h; references and kept are device memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "transformer/cuda/plan.h"
#include "transformer/tensor.h"

namespace memory3 {

cudaError_t LaunchAttentionReceived(Tensor weights, Tensor q, Tensor k,
                                    const ReferenceRange* references, int count, int longest,
                                    const HeadShape& shape, cudaStream_t stream);
cudaError_t LaunchSelectKept(int32_t* kept, Tensor weights, const ReferenceRange* references,
                             int count, int longest, int keep, cudaStream_t stream);
cudaError_t LaunchGatherKept(float* memory, const int32_t* kept, Tensor k, Tensor v, int references,
                             int keep, int kv_heads, int head_dim, cudaStream_t stream);
cudaError_t LaunchScatterKept(Tensor dk, Tensor dv, const float* dmemory, const int32_t* kept,
                              int references, int keep, int kv_heads, int head_dim,
                              cudaStream_t stream);

}  // namespace memory3
