// Operations that work row by row.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "transformer/bf16.h"
#include "transformer/check.h"
#include "transformer/cpu/cpu_device.h"
#include "transformer/cpu/kernels.h"

namespace memory3 {
namespace {

// Below this many elements waking the other threads costs more than they save.
constexpr int64_t kSerialElements = 16384;

float* Row(const Tensor& t, int64_t r) { return t.as<float>() + r * t.stride; }

void CheckF32(const Tensor& t) { CHECK(t.dtype == DType::kF32 && t.stride >= t.cols); }

const BatchInput& InputOf(const PreparedBatch& batch) {
  return static_cast<const CpuPreparedBatch&>(batch).input;
}

}  // namespace

void CpuDevice::Embed(Tensor y, const PreparedBatch& batch, Tensor table) {
  const BatchInput& input = InputOf(batch);
  CheckF32(y);
  CHECK(y.rows == batch.rows && y.cols == table.cols);
  CHECK(table.dtype == DType::kF32 || table.dtype == DType::kBF16);
#pragma omp parallel for schedule(static) \
    num_threads(threads_) if (y.rows * y.cols > kSerialElements)
  for (int64_t r = 0; r < y.rows; ++r) {
    const int64_t id = input.token_ids[r];
    CHECK(id >= 0 && id < table.rows);
    if (table.dtype == DType::kF32) {
      std::memcpy(Row(y, r), Row(table, id), y.cols * sizeof(float));
    } else {
      kernels_.f32_from_bf16(Row(y, r), table.as<uint16_t>() + id * table.stride, y.cols);
    }
  }
}

void CpuDevice::RmsNorm(Tensor y, Tensor x, const float* gain, float eps, float* inv_rms) {
  CheckF32(x);
  CheckF32(y);
  CHECK(x.rows == y.rows && x.cols == y.cols);
#pragma omp parallel for schedule(static) \
    num_threads(threads_) if (y.rows * y.cols > kSerialElements)
  for (int64_t r = 0; r < y.rows; ++r) {
    const float inv = kernels_.rms_norm(Row(y, r), Row(x, r), gain, eps, y.cols);
    if (inv_rms != nullptr) inv_rms[r] = inv;
  }
}

void CpuDevice::Rope(Tensor x, const PreparedBatch& batch, std::span<const float> inv_freq,
                     int heads, int head_dim, bool inverse) {
  const BatchInput& input = InputOf(batch);
  const int64_t half = head_dim / 2;
  CheckF32(x);
  CHECK(x.rows == batch.rows && input.positions.size() == batch.rows);
  CHECK(heads * head_dim <= x.cols && inv_freq.size() == half && head_dim % 2 == 0);
  if (rope_positions_ != input.positions ||
      !std::equal(inv_freq.begin(), inv_freq.end(), rope_inv_freq_.begin(), rope_inv_freq_.end())) {
    rope_positions_ = input.positions;
    rope_inv_freq_.assign(inv_freq.begin(), inv_freq.end());
    rope_table_.resize(x.rows * head_dim);
#pragma omp parallel for schedule(static) num_threads(threads_) if (x.rows * half > 1024)
    for (int64_t r = 0; r < x.rows; ++r) {
      float* table = rope_table_.data() + r * head_dim;
      for (int64_t i = 0; i < half; ++i) {
        // The angle is rounded to f32 as transformers rounds it.
        const float angle = static_cast<float>(input.positions[r]) * inv_freq[i];
        table[i] = static_cast<float>(std::cos(static_cast<double>(angle)));
        table[half + i] = static_cast<float>(std::sin(static_cast<double>(angle)));
      }
    }
  }
#pragma omp parallel for schedule(static) \
    num_threads(threads_) if (x.rows * x.cols > kSerialElements)
  for (int64_t r = 0; r < x.rows; ++r) {
    const float* cosine = rope_table_.data() + r * head_dim;
    const float* sine = cosine + half;
    for (int h = 0; h < heads; ++h) {
      kernels_.rotate(Row(x, r) + h * head_dim, cosine, sine, inverse ? -1.0f : 1.0f, half);
    }
  }
}

void CpuDevice::StoreKv(const PreparedBatch& batch, Tensor k, Tensor v, int layer, int kv_heads,
                        int head_dim) {
  const BatchInput& input = InputOf(batch);
  if (input.destination.empty()) return;
  CheckF32(k);
  CheckF32(v);
  CHECK(k.rows == batch.rows && v.rows == batch.rows);
  CHECK(k.cols == kv_heads * head_dim && v.cols == k.cols);
  CHECK(input.destination_source >= 0 && input.destination_source < input.attention.sources.size());
  const KvSource& source = input.attention.sources[input.destination_source];
  CHECK(source.dtype == DType::kF32 || source.dtype == DType::kBF16);
#pragma omp parallel for schedule(static) \
    num_threads(threads_) if (k.rows * k.cols > kSerialElements)
  for (int64_t r = 0; r < k.rows; ++r) {
    if (input.destination[r] == nullptr) continue;
    for (int h = 0; h < kv_heads; ++h) {
      const int64_t at = layer * source.layer_stride + h * source.head_stride;
      const float* key = Row(k, r) + h * head_dim;
      const float* value = Row(v, r) + h * head_dim;
      if (source.dtype == DType::kF32) {
        float* to = static_cast<float*>(input.destination[r]) + at;
        std::memcpy(to, key, head_dim * sizeof(float));
        std::memcpy(to + source.value_offset, value, head_dim * sizeof(float));
      } else {
        uint16_t* to = static_cast<uint16_t*>(input.destination[r]) + at;
        kernels_.bf16_from_f32(to, key, head_dim);
        kernels_.bf16_from_f32(to + source.value_offset, value, head_dim);
      }
    }
  }
}

void CpuDevice::SiluMul(Tensor y, Tensor gate_up) {
  CheckF32(y);
  CheckF32(gate_up);
  CHECK(gate_up.rows == y.rows && gate_up.cols == 2 * y.cols);
#pragma omp parallel for schedule(static) \
    num_threads(threads_) if (y.rows * y.cols > kSerialElements)
  for (int64_t r = 0; r < y.rows; ++r) {
    const float* gate = Row(gate_up, r);
    kernels_.silu_mul(Row(y, r), gate, gate + y.cols, y.cols);
  }
}

void CpuDevice::GatherRows(Tensor y, Tensor x, const PreparedBatch& batch) {
  const BatchInput& input = InputOf(batch);
  CheckF32(y);
  CheckF32(x);
  CHECK(y.rows == batch.logit_rows && x.rows == batch.rows && x.cols == y.cols);
  for (int64_t r = 0; r < y.rows; ++r) {
    const int64_t from = input.logit_rows[r];
    CHECK(from >= 0 && from < x.rows);
    std::memcpy(Row(y, r), Row(x, from), y.cols * sizeof(float));
  }
}

void CpuDevice::ArgMax(int32_t* ids, Tensor logits) {
  CheckF32(logits);
#pragma omp parallel for schedule(static) \
    num_threads(threads_) if (logits.rows > 1 && logits.rows * logits.cols > kSerialElements)
  for (int64_t r = 0; r < logits.rows; ++r) {
    ids[r] = static_cast<int32_t>(kernels_.arg_max(Row(logits, r), logits.cols));
  }
}

}  // namespace memory3
