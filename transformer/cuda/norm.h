// RMS normalisation, forward and backward. Launches return the launch's error. Shapes: device.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "transformer/tensor.h"

namespace memory3 {

cudaError_t LaunchRmsNorm(Tensor y, Tensor x, const float* gain, float eps, float* inv_rms,
                          cudaStream_t stream);

// Floats of scratch that the backward needs.
int64_t RmsNormBackwardScratch(int64_t rows, int64_t cols);
cudaError_t LaunchRmsNormBackward(Tensor dx, float* dgain, Tensor dy, Tensor x, const float* gain,
                                  const float* inv_rms, float* scratch, cudaStream_t stream);

}  // namespace memory3
