// Operations that move or combine single elements and rows. Launches return the launch's error.
// Shapes: device.h; ids, rows and groups are device memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "transformer/cuda/plan.h"
#include "transformer/tensor.h"

namespace memory3 {

// y = x, converted to y's type.
cudaError_t LaunchConvert(Tensor y, Tensor x, cudaStream_t stream);
// y[i] = x[rows[i]]
cudaError_t LaunchGatherRows(Tensor y, Tensor x, const int32_t* rows, cudaStream_t stream);
// x[rows[i]] += y[i]; rows differ from each other.
cudaError_t LaunchScatterRows(Tensor x, Tensor y, const int32_t* rows, cudaStream_t stream);
// dtable[group.token] += Σ dy[order[i]], i in [group.begin, group.end), in order.
cudaError_t LaunchEmbedBackward(Tensor dtable, Tensor dy, const TokenGroup* groups, int count,
                                const int32_t* order, cudaStream_t stream);
cudaError_t LaunchSiluMul(Tensor y, Tensor gate_up, cudaStream_t stream);
cudaError_t LaunchSiluMulBackward(Tensor dgate_up, Tensor dy, Tensor gate_up, cudaStream_t stream);
cudaError_t LaunchArgMax(int32_t* ids, Tensor logits, cudaStream_t stream);

}  // namespace memory3
