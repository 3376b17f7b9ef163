#include "embedder/bert_kernels.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

namespace memory3 {
namespace {

// The loops below are written so that the compiler turns them into vector code by itself: no calls,
// no branches, reductions over kLanes independent sums.
constexpr int kLanes = 16;

// e^x, relative error below 2e-7 (Cephes' expf); x <= -87.3 gives about 1e-38.
inline float Exp(float x) {
  x = std::min(std::max(x, -87.3f), 88.0f);
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 · 2^23: rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t exponent = std::bit_cast<int32_t>(shifted) << 23;
  return std::bit_cast<float>(std::bit_cast<int32_t>(p) + exponent);
}

// Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7, for x >= 0.
inline float Erf(float x) {
  const float t = 1.0f / (1.0f + 0.3275911f * x);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  return 1.0f - p * t * Exp(-x * x);
}

template <typename Term>
float Sum(int n, Term term) {
  float lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += term(i + l);
  }
  float sum = 0;
  for (; i < n; ++i) sum += term(i);
  for (const float lane : lanes) sum += lane;
  return sum;
}

}  // namespace

void AddLayerNorm(const float* residual, const float* weight, const float* bias, float eps, int n,
                  float* row) {
  if (residual != nullptr) {
    for (int i = 0; i < n; ++i) row[i] += residual[i];
  }
  const float mean = Sum(n, [&](int i) { return row[i]; }) / static_cast<float>(n);
  const float variance =
      Sum(n, [&](int i) { return (row[i] - mean) * (row[i] - mean); }) / static_cast<float>(n);
  const float scale = 1.0f / std::sqrt(variance + eps);
  for (int i = 0; i < n; ++i) row[i] = (row[i] - mean) * scale * weight[i] + bias[i];
}

void BiasGelu(const float* bias, int n, float* row) {
  for (int i = 0; i < n; ++i) {
    const float x = row[i] + bias[i];
    const float erf = std::copysign(Erf(std::fabs(x) * 0.707106781f), x);
    row[i] = 0.5f * x * (1.0f + erf);
  }
}

void AddBias(const float* bias, int n, float* row) {
  for (int i = 0; i < n; ++i) row[i] += bias[i];
}

void ScaledSoftmax(float scale, int n, float* row) {
  float most = row[0];
  for (int i = 1; i < n; ++i) most = std::max(most, row[i]);
  for (int i = 0; i < n; ++i) row[i] = Exp((row[i] - most) * scale);
  const float inverse = 1.0f / Sum(n, [&](int i) { return row[i]; });
  for (int i = 0; i < n; ++i) row[i] *= inverse;
}

}  // namespace memory3
