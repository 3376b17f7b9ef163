// Products with weights.
//
// Packed weights are multiplied by our own kernels whatever the number of rows. oneDNN above 16
// rows was the other way; measured at 512 rows on TinyLlama's matrices (2 Zen 5 cores, oneDNN 2.6
// with weights packed its way, GFLOP/s): f32 478, bf16 980, int8 1985; ours: 460-527, 930-1040,
// 1710-1870. So it would gain little, and cost a second copy of the weights and the promise that a
// row has the same bits in prefill and decode.
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

// Rows of one task: enough that a panel pays for being brought in, few enough that their sums and
// activations stay in the cache.
constexpr int64_t kLeastBlock = 24, kMostBlock = 512;  // rounded up to the kernel's block_rows
// Rows that one thread converts sooner than the others would have woken up.
constexpr int64_t kFewRows = 8;

// Bytes from row to row of the activations as the kernel reads them: whole lines, and no multiple
// of 512, or 16 rows of a tile would meet in a few sets of the first-level cache.
int64_t ActivationStride(WeightFormat format, int64_t k, const Tensor& x,
                         const CpuKernels& kernels) {
  if (format == WeightFormat::kF32) return x.stride * sizeof(float);
  const int64_t stride =
      RoundUp(k * (format == WeightFormat::kBF16 ? kernels.bf16_activation_bytes : 1), 64);
  return stride % 512 == 0 ? stride + 64 : stride;
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

  // A trainable weight becomes panels on the way: to turn a panel's rows costs as much as a few
  // rows of the product, and the order of summation is the packed weights' too. (oneDNN's sgemm,
  // which reads the matrix as it is, sums a single row in another order than many.)
  const auto* const trainable = dynamic_cast<const CpuTrainableWeight*>(&weight);
  const auto* const packed = trainable ? nullptr : static_cast<const PackedWeight*>(&weight);
  const WeightFormat format = weight.format();
  const int64_t k = packed ? packed->k() : weight.in();
  const int64_t panels = (weight.out() + kPanel - 1) / kPanel;
  // Tasks are panels; of few panels each is cut by rows, too, so that every thread has its share.
  const int64_t cuts = panels >= 4 * threads_ ? 1 : (4 * threads_ + panels - 1) / panels;
  const int64_t block = RoundUp(
      std::clamp<int64_t>((rows + cuts - 1) / cuts, kLeastBlock, kMostBlock), kernels_.block_rows);
  const int64_t blocks = (rows + block - 1) / block;
  const int64_t tasks = panels * blocks;
  const int team = static_cast<int>(std::min<int64_t>(threads_, tasks));

  // Scratch: the activations as the kernel reads them with their scales, and for each thread room
  // for a task's sums, for its columns where the last panel is only partly there, and for a panel
  // of a trainable weight.
  const int64_t a_stride = ActivationStride(format, k, x, kernels_);
  const bool convert = format != WeightFormat::kF32;
  const int64_t converted_bytes = convert ? rows * a_stride + RoundUp(rows * 4, 64) : 0;
  const int64_t sums = std::min(block, rows) * kPanel;
  const int64_t own = 2 * sums + (trainable ? k * kPanel : 0);  // floats of one thread
  char* const scratch = static_cast<char*>(Scratch(converted_bytes + team * own * sizeof(float)));
  char* const a = convert ? scratch : x.as<char>();
  float* const x_scale = reinterpret_cast<float*>(scratch + rows * a_stride);
  float* const room = reinterpret_cast<float*>(scratch + converted_bytes);

  const auto convert_row = [&](int64_t r) {
    const float* from = x.as<float>() + r * x.stride;
    if (format == WeightFormat::kBF16) {
      kernels_.round_bf16(a + r * a_stride, from, x.cols, k);
    } else {
      x_scale[r] =
          kernels_.quantize_row(reinterpret_cast<uint8_t*>(a + r * a_stride), from, x.cols, k);
    }
  };
  const auto product = [&](int64_t p, int64_t row, int64_t n, float* to, int64_t stride,
                           PanelMode mode, float* between) {
    const char* from = a + row * a_stride;
    const float* f32_panel = nullptr;
    if (trainable) {
      const Tensor& m = trainable->matrix();
      float* const turned = between + 2 * sums;
      kernels_.pack_columns(turned, 0, m.as<float>() + p * kPanel * m.stride, m.stride,
                            static_cast<int>(std::min<int64_t>(kPanel, m.rows - p * kPanel)),
                            static_cast<int>(k));
      f32_panel = turned;
    } else if (format == WeightFormat::kF32) {
      f32_panel = static_cast<const float*>(packed->panel(p));
    }
    switch (format) {
      case WeightFormat::kF32:
        return kernels_.panel_f32(reinterpret_cast<const float*>(from), x.stride, f32_panel, k, n,
                                  to, stride, mode, between);
      case WeightFormat::kBF16:
        return kernels_.panel_bf16(from, a_stride, static_cast<const uint16_t*>(packed->panel(p)),
                                   k, n, to, stride, mode, between);
      case WeightFormat::kInt8:
        return kernels_.panel_int8(reinterpret_cast<const uint8_t*>(from), a_stride, x_scale + row,
                                   static_cast<const int8_t*>(packed->panel(p)),
                                   &packed->scales[p * kPanel], &packed->sums[p * kPanel], k, n, to,
                                   stride, mode, between);
    }
  };
  const auto run = [&](int64_t task) {
    const int64_t p = task % panels, row = task / panels * block;
    const int64_t n = std::min(block, rows - row);
    float* const between = room + omp_get_thread_num() * own;
    float* const to = y.as<float>() + row * y.stride + p * kPanel;
    const int64_t columns = std::min<int64_t>(kPanel, y.cols - p * kPanel);
    if (columns == kPanel) {
      product(p, row, n, to, y.stride, accumulate ? PanelMode::kAdd : PanelMode::kStore, between);
      return;
    }
    float* const part = between + sums;
    product(p, row, n, part, kPanel, PanelMode::kStore, between);
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        float& out = to[r * y.stride + c];
        out = accumulate ? out + part[r * kPanel + c] : part[r * kPanel + c];
      }
    }
  };

  const bool few = rows <= kFewRows;
  if (convert && few) {
    for (int64_t r = 0; r < rows; ++r) convert_row(r);
  }
#pragma omp parallel num_threads(team)
  {
    if (convert && !few) {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < rows; ++r) convert_row(r);
    }
    // Neighbouring panels by one thread, which then reads one long run of memory; with many rows in
    // smaller portions, so that a thread that was held up does not hold up the others.
    const int64_t portions = rows <= 48 ? team : 8 * team;
    const int64_t portion = std::max<int64_t>(1, (tasks + portions - 1) / portions);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t first = 0; first < tasks; first += portion) {
      for (int64_t t = first; t < std::min(tasks, first + portion); ++t) run(t);
    }
  }
}

}  // namespace memory3
