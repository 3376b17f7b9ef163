// Products with weights.
#include <dnnl.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>

#include "transformer/bf16.h"
#include "transformer/check.h"
#include "transformer/cpu/cpu_device.h"
#include "transformer/cpu/kernels.h"

namespace memory3 {
namespace {

constexpr int kPanel = CpuKernels::kPanel;

int64_t RoundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Weights in panels of kPanel output columns (kernels.h), the last one filled up with zeros.
class PackedWeight final : public Weight {
 public:
  PackedWeight(int64_t out, int64_t in, WeightFormat format)
      : Weight(out, in, format),
        panels_((out + kPanel - 1) / kPanel),
        k_(RoundUp(in, format == WeightFormat::kF32    ? 1
                       : format == WeightFormat::kBF16 ? 2
                                                       : 4)) {}

  int64_t bytes() const override {
    return data.bytes() + scales.size() * sizeof(float) + sums.size() * sizeof(int32_t);
  }
  int64_t panels() const { return panels_; }
  int64_t k() const { return k_; }  // in(), rounded up to what a step of the kernel takes
  int64_t panel_bytes() const {
    return k_ * kPanel *
           (format() == WeightFormat::kF32    ? 4
            : format() == WeightFormat::kBF16 ? 2
                                              : 1);
  }
  const void* panel(int64_t p) const { return data.as<char>() + p * panel_bytes(); }

  Buffer data;
  std::vector<float> scales;  // int8: [panels * kPanel]
  std::vector<int32_t> sums;  // int8: the weights' sums, [panels * kPanel]

 private:
  int64_t panels_, k_;
};

// Column c of panel p holds the weights of output p * kPanel + c.
void PackPanel(PackedWeight& w, int64_t p, std::span<const float> from) {
  const int64_t in = w.in();
  char* const to = w.data.as<char>() + p * w.panel_bytes();
  const int64_t columns = std::min<int64_t>(kPanel, w.out() - p * kPanel);
  for (int64_t c = 0; c < columns; ++c) {
    const int64_t o = p * kPanel + c;
    const float* row = from.data() + o * in;
    switch (w.format()) {
      case WeightFormat::kF32: {
        float* f = reinterpret_cast<float*>(to) + c;
        for (int64_t k = 0; k < in; ++k) f[k * kPanel] = row[k];
        break;
      }
      case WeightFormat::kBF16: {
        uint16_t* h = reinterpret_cast<uint16_t*>(to) + 2 * c;
        for (int64_t k = 0; k < in; ++k) h[(k / 2) * 2 * kPanel + k % 2] = FloatToBf16(row[k]);
        break;
      }
      case WeightFormat::kInt8: {
        float largest = 0;
        for (int64_t k = 0; k < in; ++k) largest = std::max(largest, std::abs(row[k]));
        const float factor = largest > 0 ? 127.0f / largest : 0.0f;
        int8_t* q = reinterpret_cast<int8_t*>(to) + 4 * c;
        int32_t sum = 0;
        for (int64_t k = 0; k < in; ++k) {
          const int value = static_cast<int>(std::lrintf(row[k] * factor));
          q[(k / 4) * 4 * kPanel + k % 4] = static_cast<int8_t>(value);
          sum += value;
        }
        w.scales[o] = largest / 127.0f;
        w.sums[o] = sum;
        break;
      }
    }
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<Weight>> CpuDevice::PrepareWeight(std::span<const float> w,
                                                                 int64_t out, int64_t in,
                                                                 WeightFormat format) {
  CHECK(out > 0 && in > 0 && w.size() == out * in);
  auto packed = std::make_unique<PackedWeight>(out, in, format);
  absl::StatusOr<Buffer> data = Allocate(packed->panels() * packed->panel_bytes());
  if (!data.ok()) return data.status();
  packed->data = *std::move(data);
  if (format == WeightFormat::kInt8) {
    packed->scales.resize(packed->panels() * kPanel);
    packed->sums.resize(packed->panels() * kPanel);
  }
#pragma omp parallel for schedule(static) num_threads(threads_)
  for (int64_t p = 0; p < packed->panels(); ++p) PackPanel(*packed, p, w);
  return packed;
}

std::unique_ptr<Weight> CpuDevice::TrainableWeight(Tensor w, void*) {
  CHECK(w.dtype == DType::kF32);
  return std::make_unique<CpuTrainableWeight>(w);
}

void CpuDevice::MatMul(Tensor y, Tensor x, const Weight& weight, bool accumulate) {
  CHECK(x.dtype == DType::kF32 && y.dtype == DType::kF32);
  CHECK(x.rows == y.rows && x.cols == weight.in() && y.cols == weight.out());
  const int64_t rows = x.rows;
  if (rows == 0) return;

  if (const auto* trainable = dynamic_cast<const CpuTrainableWeight*>(&weight)) {
    const Tensor& m = trainable->matrix();
    const int before = omp_get_max_threads();
    omp_set_num_threads(threads_);  // oneDNN's
    const dnnl_status_t status =
        dnnl_sgemm('N', 'T', rows, y.cols, x.cols, 1.0f, x.as<float>(), x.stride, m.as<float>(),
                   m.stride, accumulate ? 1.0f : 0.0f, y.as<float>(), y.stride);
    omp_set_num_threads(before);
    CHECK(status == dnnl_success);
    return;
  }

  const auto& w = static_cast<const PackedWeight&>(weight);
  // Activations as the kernel reads them.
  const char* a = x.as<char>();
  int64_t a_stride = x.stride * sizeof(float);
  char* converted = nullptr;
  float* x_scale = nullptr;
  if (w.format() != WeightFormat::kF32) {
    const bool bf16 = w.format() == WeightFormat::kBF16;
    a_stride = RoundUp(w.k() * (bf16 ? kernels_.bf16_activation_bytes : 1), 64);
    converted = static_cast<char*>(Scratch(rows * (a_stride + sizeof(float))));
    x_scale = reinterpret_cast<float*>(converted + rows * a_stride);
    a = converted;
  }
  const auto convert = [&](int64_t r) {
    char* to = converted + r * a_stride;
    const float* from = x.as<float>() + r * x.stride;
    if (w.format() == WeightFormat::kBF16) {
      kernels_.round_bf16(to, from, x.cols, w.k());
    } else if (w.format() == WeightFormat::kInt8) {
      x_scale[r] = kernels_.quantize_row(reinterpret_cast<uint8_t*>(to), from, x.cols, w.k());
    }
  };
  const auto product = [&](int64_t p, int64_t row, int64_t count, float* to, int64_t stride,
                           PanelMode mode) {
    const char* from = a + row * a_stride;
    switch (w.format()) {
      case WeightFormat::kF32:
        kernels_.panel_f32(reinterpret_cast<const float*>(from), a_stride / sizeof(float),
                           static_cast<const float*>(w.panel(p)), w.k(), count, to, stride, mode);
        break;
      case WeightFormat::kBF16:
        kernels_.panel_bf16(from, a_stride, static_cast<const uint16_t*>(w.panel(p)), w.k(), count,
                            to, stride, mode);
        break;
      case WeightFormat::kInt8:
        kernels_.panel_int8(reinterpret_cast<const uint8_t*>(from), a_stride, x_scale + row,
                            static_cast<const int8_t*>(w.panel(p)), &w.scales[p * kPanel],
                            &w.sums[p * kPanel], w.k(), count, to, stride, mode);
        break;
    }
  };
  // Rows [row, row + count) of panel p's columns.
  const auto task = [&](int64_t p, int64_t row, int64_t count) {
    float* to = y.as<float>() + row * y.stride + p * kPanel;
    const int64_t columns = std::min<int64_t>(kPanel, y.cols - p * kPanel);
    if (columns == kPanel) {
      product(p, row, count, to, y.stride, accumulate ? PanelMode::kAdd : PanelMode::kStore);
      return;
    }
    constexpr int64_t kRows = 16;
    alignas(64) float sums[kRows * kPanel];
    for (int64_t r = 0; r < count; r += kRows) {
      const int64_t n = std::min(kRows, count - r);
      product(p, row + r, n, sums, kPanel, PanelMode::kStore);
      for (int64_t i = 0; i < n; ++i) {
        float* yr = to + (r + i) * y.stride;
        for (int64_t c = 0; c < columns; ++c) {
          yr[c] = accumulate ? yr[c] + sums[i * kPanel + c] : sums[i * kPanel + c];
        }
      }
    }
  };

  const int64_t panels = w.panels();
  constexpr int64_t kSerialRows = 8;
  if (converted != nullptr && rows <= kSerialRows) {
    for (int64_t r = 0; r < rows; ++r) convert(r);
  }
#pragma omp parallel num_threads(threads_)
  {
    if (converted != nullptr && rows > kSerialRows) {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < rows; ++r) convert(r);
    }
    // Neighbouring panels by one thread: it reads one long run of memory.
#pragma omp for schedule(static) nowait
    for (int64_t p = 0; p < panels; ++p) task(p, 0, rows);
  }
}

}  // namespace memory3
