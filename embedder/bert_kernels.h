// The element-wise parts of a BERT layer, for one row at a time. Pure functions.
#pragma once

namespace memory3 {

// row[i] = layer_norm(row + residual)[i] · weight[i] + bias[i], i < n; residual may be null.
void AddLayerNorm(const float* residual, const float* weight, const float* bias, float eps, int n,
                  float* row);
// row[i] = gelu(row[i] + bias[i]), gelu(x) = x/2 · (1 + erf(x/√2)) to within 1e-6.
void BiasGelu(const float* bias, int n, float* row);
void AddBias(const float* bias, int n, float* row);
// Softmax of scale · row.
void ScaledSoftmax(float scale, int n, float* row);

}  // namespace memory3
