// Rotary position embedding and the placing of keys and values. Launches return the launch's error.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "transformer/cuda/plan.h"
#include "transformer/tensor.h"

namespace memory3 {

// positions: [rows], inv_freq: [head_dim / 2], both device memory.
cudaError_t LaunchRope(Tensor x, const int32_t* positions, const float* inv_freq, int heads,
                       int head_dim, bool inverse, cudaStream_t stream);

// destination: [rows] device pointers, null: the row is not kept. `to` says how they are laid out,
// layer_offset is that of the layer stored.
cudaError_t LaunchStoreKv(void* const* destination, SourceAtLayer to, Tensor k, Tensor v,
                          int kv_heads, int head_dim, cudaStream_t stream);

}  // namespace memory3
