// The optimiser's passes over memory. Launches return the launch's error.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace memory3 {

// sums: [kSumPieces]; the total is their sum in order.
inline constexpr int kSumPieces = 1024;
cudaError_t LaunchSumOfSquares(double* sums, const float* x, int64_t n, cudaStream_t stream);

// Factors of one AdamW step, worked out on the host in double.
struct AdamWFactors {
  float beta1, beta2, epsilon;
  float decay;       // 1 - learning_rate * weight_decay
  float step_size;   // learning_rate / (1 - beta1^t)
  float root_scale;  // 1 / sqrt(1 - beta2^t)
  float gradient_scale;
};
// shadow: bf16, may be null.
cudaError_t LaunchAdamW(float* parameter, void* shadow, const float* gradient, float* m, float* v,
                        int64_t n, const AdamWFactors& factors, cudaStream_t stream);

}  // namespace memory3
