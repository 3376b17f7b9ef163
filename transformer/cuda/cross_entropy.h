// Loss and gradient over the vocabulary, in place. Launches return the launch's error.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "transformer/tensor.h"

namespace memory3 {

// As Device::CrossEntropy; targets: [rows] device memory.
cudaError_t LaunchCrossEntropy(float* losses, Tensor logits, const int32_t* targets,
                               float loss_scale, cudaStream_t stream);

}  // namespace memory3
