// Operations of writing a memory (explicit-memory.md, Writing).
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "transformer/check.h"
#include "transformer/cpu/cpu_device.h"
#include "transformer/cpu/kernels.h"

namespace memory3 {
namespace {

constexpr int kPanel = CpuKernels::kPanel;

void CheckRows(std::span<const ReferenceRows> references, int64_t rows) {
  for (const ReferenceRows& r : references) {
    CHECK(r.tokens >= 1 && r.row >= 0 && r.row + r.tokens <= rows);
  }
}

}  // namespace

void CpuDevice::AttentionReceived(Tensor weights, Tensor q, Tensor k,
                                  std::span<const ReferenceRows> references,
                                  const AttentionShape& shape) {
  const int d = shape.head_dim;
  CHECK(weights.dtype == DType::kF32 && q.dtype == DType::kF32 && k.dtype == DType::kF32);
  CHECK(q.cols == shape.heads * d && k.cols == shape.kv_heads * d);
  CHECK(weights.cols == shape.kv_heads && weights.rows == k.rows && q.rows == k.rows);
  CheckRows(references, k.rows);
  if (references.empty()) return;
  const int group = shape.heads / shape.kv_heads;
  const int longest = std::max_element(references.begin(), references.end(), [](auto& a, auto& b) {
                        return a.tokens < b.tokens;
                      })->tokens;
  const int64_t tiles = (longest + kPanel - 1) / kPanel;
  const int64_t stride = tiles * kPanel;
  // Keys as panels, one row of scores for each token and one head, the sums.
  const int64_t floats = tiles * d * kPanel + longest * stride + stride;
  const int tasks = static_cast<int>(references.size()) * shape.kv_heads;
  const int team = std::min(threads_, tasks);
  float* const scratch = static_cast<float*>(Scratch(team * floats * sizeof(float)));

#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
  for (int task = 0; task < tasks; ++task) {
    const ReferenceRows& reference = references[task / shape.kv_heads];
    const int kv_head = task % shape.kv_heads;
    const int n = reference.tokens;
    float* const panels = scratch + omp_get_thread_num() * floats;
    float* const scores = panels + tiles * d * kPanel;
    float* const received = scores + longest * stride;
    std::memset(received, 0, stride * sizeof(float));
    for (int first = 0; first < n; first += kPanel) {
      kernels_.pack_columns(panels + first * d, 0,
                            k.as<float>() + (reference.row + first) * k.stride + kv_head * d,
                            k.stride, std::min(kPanel, n - first), d);
    }
    for (int g = 0; g < group; ++g) {
      const float* queries = q.as<float>() + reference.row * q.stride + (kv_head * group + g) * d;
      for (int first = 0; first < n; first += kPanel) {
        kernels_.panel_f32(queries, q.stride, panels + first * d, d, n, scores + first, stride,
                           PanelMode::kStore, nullptr);
      }
      for (int i = 0; i < n; ++i) {
        float* s = scores + i * stride;
        float max = 0;
        const float sum = kernels_.softmax_numerators(s, n, shape.scale, &max);
        kernels_.add_scaled(received, s, 1.0f / sum, n);
      }
    }
    for (int j = 0; j < n; ++j) {
      weights.as<float>()[(reference.row + j) * weights.stride + kv_head] = received[j];
    }
  }
}

void CpuDevice::SelectKept(int32_t* kept, Tensor weights, std::span<const ReferenceRows> references,
                           int keep) {
  CHECK(weights.dtype == DType::kF32 && keep >= 0);
  CheckRows(references, weights.rows);
  const int64_t heads = weights.cols;
  const int64_t tasks = static_cast<int64_t>(references.size()) * heads;
#pragma omp parallel num_threads(threads_) if (tasks > 8)
  {
    std::vector<int32_t> order;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const ReferenceRows& reference = references[task / heads];
      const float* w = weights.as<float>() + task % heads;
      order.resize(reference.tokens);
      std::iota(order.begin(), order.end(), reference.row);
      const int n = std::min(keep, reference.tokens);
      std::partial_sort(order.begin(), order.begin() + n, order.end(), [&](int32_t a, int32_t b) {
        const float wa = w[a * weights.stride], wb = w[b * weights.stride];
        return wa != wb ? wa > wb : a < b;
      });
      std::sort(order.begin(), order.begin() + n);
      int32_t* to = kept + task * keep;
      std::copy(order.begin(), order.begin() + n, to);
      std::fill(to + n, to + keep, -1);
    }
  }
}

void CpuDevice::GatherKept(float* memory, const int32_t* kept, Tensor k, Tensor v, int references,
                           int keep, int kv_heads, int head_dim) {
  CHECK(k.dtype == DType::kF32 && v.dtype == DType::kF32);
  CHECK(k.cols == kv_heads * head_dim && v.cols == k.cols && k.rows == v.rows);
#pragma omp parallel for schedule(static) \
    num_threads(threads_) if (int64_t{references} * keep * k.cols > 16384)
  for (int reference = 0; reference < references; ++reference) {
    for (int h = 0; h < kv_heads; ++h) {
      for (int i = 0; i < keep; ++i) {
        const int64_t row = kept[(int64_t{reference} * kv_heads + h) * keep + i];
        CHECK(row >= -1 && row < k.rows);
        const Tensor* sources[] = {&k, &v};
        for (int part = 0; part < 2; ++part) {
          float* to =
              memory + (((int64_t{reference} * 2 + part) * kv_heads + h) * keep + i) * head_dim;
          if (row < 0) {
            std::memset(to, 0, head_dim * sizeof(float));
          } else {
            const Tensor& from = *sources[part];
            std::memcpy(to, from.as<float>() + row * from.stride + h * head_dim,
                        head_dim * sizeof(float));
          }
        }
      }
    }
  }
}

}  // namespace memory3
