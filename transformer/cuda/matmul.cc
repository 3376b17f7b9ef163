// CudaDevice's products: weights as the device wants them, and which of cuBLASLt and our own kernel
// multiplies.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "transformer/check.h"
#include "transformer/cuda/cuda_device.h"
#include "transformer/cuda/matmul_rows.h"
#include "transformer/cuda/pointwise.h"

namespace memory3 {

// The matrix [out, in] in device memory, rows padded to 16 bytes with zeros.
class CudaWeight final : public Weight {
 public:
  CudaWeight(int64_t out, int64_t in, WeightFormat format) : Weight(out, in, format) {}

  int64_t bytes() const override {
    return codes != nullptr
               ? out() * (code_stride + 4)
               : out() * in() * SizeOf(shadow.data != nullptr ? DType::kBF16 : matrix.dtype);
  }

  Tensor matrix;                  // f32 or bf16
  Tensor shadow;                  // bf16 copy of a trainable matrix, data null: none
  const int8_t* codes = nullptr;  // int8: the matrix is codes * scales[row]
  int64_t code_stride = 0;
  const float* scales = nullptr;
  std::vector<Buffer> storage;
};

namespace {

constexpr int64_t kRowAlignment = 16;  // bytes

int64_t PadRow(int64_t elements, int64_t size) {
  const int64_t unit = kRowAlignment / size;
  return (elements + unit - 1) / unit * unit;
}

uint16_t RoundToBf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

bool AlignedRows(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.data) % kRowAlignment == 0 &&
         t.stride * SizeOf(t.dtype) % kRowAlignment == 0;
}

cudaDataType_t CudaType(DType type) { return type == DType::kF32 ? CUDA_R_32F : CUDA_R_16BF; }

const CudaWeight& WeightOf(const Weight& w) { return static_cast<const CudaWeight&>(w); }

}  // namespace

absl::StatusOr<std::unique_ptr<Weight>> CudaDevice::PrepareWeight(std::span<const float> w,
                                                                  int64_t out, int64_t in,
                                                                  WeightFormat format) {
  CHECK(static_cast<int64_t>(w.size()) == out * in);
  auto weight = std::make_unique<CudaWeight>(out, in, format);
  const auto allocate = [&](size_t bytes) -> absl::StatusOr<void*> {
    absl::StatusOr<Buffer> buffer = Allocate(bytes);
    if (!buffer.ok()) return buffer.status();
    weight->storage.push_back(*std::move(buffer));
    return weight->storage.back().data();
  };
  // Rows are converted and sent a few MiB at a time.
  const auto send = [&](void* to, int64_t stride, auto zero, auto convert) {
    using Element = decltype(zero);
    const int64_t rows = std::max<int64_t>(1, (int64_t{4} << 20) / stride);
    std::vector<Element> host;
    for (int64_t first = 0; first < out; first += rows) {
      const int64_t count = std::min(rows, out - first);
      host.assign(count * stride, zero);
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t c = 0; c < in; ++c) {
          host[r * stride + c] = convert(first + r, w[(first + r) * in + c]);
        }
      }
      Upload(static_cast<Element*>(to) + first * stride, host.data(),
             host.size() * sizeof(Element));
    }
  };

  if (format == WeightFormat::kInt8) {
    std::vector<float> scales(out), factors(out);
    for (int64_t r = 0; r < out; ++r) {
      float most = 0;
      for (int64_t c = 0; c < in; ++c) most = std::max(most, std::fabs(w[r * in + c]));
      scales[r] = most / 127.0f;
      factors[r] = most > 0 ? 127.0f / most : 0.0f;
    }
    weight->code_stride = PadRow(in, 1);
    absl::StatusOr<void*> codes = allocate(out * weight->code_stride);
    if (!codes.ok()) return codes.status();
    absl::StatusOr<void*> scale_memory = allocate(out * sizeof(float));
    if (!scale_memory.ok()) return scale_memory.status();
    send(*codes, weight->code_stride, int8_t{0},
         [&](int64_t r, float x) { return static_cast<int8_t>(std::lrint(x * factors[r])); });
    Upload(*scale_memory, scales.data(), scales.size() * sizeof(float));
    weight->codes = static_cast<const int8_t*>(*codes);
    weight->scales = static_cast<const float*>(*scale_memory);
  } else {
    // f32 activations meet rounded weights as f32: the same numbers.
    const bool rounded = format == WeightFormat::kBF16;
    const DType stored = rounded && activations_ == DType::kBF16 ? DType::kBF16 : DType::kF32;
    const int64_t stride = PadRow(in, SizeOf(stored));
    absl::StatusOr<void*> matrix = allocate(out * stride * SizeOf(stored));
    if (!matrix.ok()) return matrix.status();
    weight->matrix = {*matrix, stored, out, in, stride};
    if (stored == DType::kBF16) {
      send(*matrix, stride, uint16_t{0}, [](int64_t, float x) { return RoundToBf16(x); });
    } else if (rounded) {
      send(*matrix, stride, 0.0f,
           [](int64_t, float x) { return std::bit_cast<float>(uint32_t{RoundToBf16(x)} << 16); });
    } else {
      send(*matrix, stride, 0.0f, [](int64_t, float x) { return x; });
    }
  }
  absl::Status status = Synchronize();
  if (!status.ok()) return status;
  return weight;
}

std::unique_ptr<Weight> CudaDevice::TrainableWeight(Tensor w, void* shadow) {
  CHECK(w.dtype == DType::kF32);
  auto weight = std::make_unique<CudaWeight>(w.rows, w.cols, WeightFormat::kF32);
  weight->matrix = w;
  if (shadow != nullptr && activations_ == DType::kBF16) {
    weight->shadow = w;
    weight->shadow.data = shadow;
    weight->shadow.dtype = DType::kBF16;
  }
  return weight;
}

Tensor CudaDevice::As(DType dtype, Tensor t, ScratchUse use) {
  if (t.dtype == dtype) return t;
  // Rows stay 16-byte aligned.
  Tensor copy{nullptr, dtype, t.rows, t.cols, PadRow(t.cols, SizeOf(dtype))};
  copy.data = Scratch(use, copy.rows * copy.stride * SizeOf(dtype));
  if (copy.data != nullptr) Note(LaunchConvert(copy, t, stream_), "convert");
  return copy;
}

// A frozen f32 weight (WeightFormat::kF32) stays exact; a trainable one takes the activations'
// type.
Tensor CudaDevice::WeightAs(DType dtype, const CudaWeight& w) {
  if (w.shadow.data != nullptr && dtype == DType::kBF16) return w.shadow;
  return As(dtype, w.matrix, kConvertedWeight);
}

void CudaDevice::Multiply(MatrixProduct product) {
  if (product.m == 0 || product.n == 0) return;
  if (product.a == nullptr || product.b == nullptr || product.d == nullptr) return;  // noted
  Note(lt_->Multiply(product, stream_));
}

// As Multiply, for a result that cuBLASLt may not write in its type: f32 inputs write f32 only.
void CudaDevice::MultiplyInto(Tensor d, MatrixProduct product) {
  const bool direct = product.input == CUDA_R_16BF || d.dtype == DType::kF32;
  Tensor to = d;
  if (!direct) {
    to = {nullptr, DType::kF32, d.rows, d.cols, PadRow(d.cols, 4)};
    to.data = Scratch(kConvertedOutput, to.rows * to.stride * 4);
    if (to.data == nullptr) return;
    if (product.accumulate) Note(LaunchConvert(to, d, stream_), "convert");
  }
  product.output = CudaType(to.dtype);
  product.d = to.data;
  product.d_stride = to.stride;
  Multiply(product);
  if (!direct) Note(LaunchConvert(d, to, stream_), "convert");
}

void CudaDevice::MatMulInt8(Tensor y, Tensor x, const CudaWeight& w, bool accumulate) {
  const int64_t stride = w.code_stride;
  // The library's int8 products want whole vectors: rows past the last are whatever is there, and
  // so are their sums, which nobody reads.
  const int64_t padded_rows = PadRow(x.rows, 1);
  auto* codes = static_cast<int8_t*>(Scratch(kQuantizedRows, padded_rows * stride));
  auto* scales = static_cast<float*>(Scratch(kQuantizedScales, x.rows * sizeof(float)));
  if (codes == nullptr || scales == nullptr) return;
  Note(LaunchQuantizeRows(codes, stride, scales, x, stream_), "quantise");
  if (x.rows > kMaxProductRows && w.out() % 16 == 0) {
    auto* sums =
        static_cast<int32_t*>(Scratch(kIntegerSums, padded_rows * w.out() * sizeof(int32_t)));
    if (sums == nullptr) return;
    MatrixProduct product;
    product.input = CUDA_R_8I;
    product.output = CUDA_R_32I;
    product.m = padded_rows;
    product.n = w.out();
    product.k = stride;
    product.a = codes;
    product.a_stride = stride;
    product.b = w.codes;
    product.b_stride = stride;
    product.b_transposed = true;
    product.d = sums;
    product.d_stride = w.out();
    Multiply(product);
    Note(LaunchScaleSums(y, sums, scales, w.scales, accumulate, stream_), "int8 product");
    return;
  }
  for (int64_t first = 0; first < x.rows; first += kMaxProductRows) {
    RowsProduct product;
    product.y = y.Rows(first, std::min<int64_t>(kMaxProductRows, x.rows - first));
    product.x = codes + first * stride;
    product.x_stride = stride;
    product.w = w.codes;
    product.w_stride = stride;
    product.row_bytes = stride;
    product.x_scale = scales + first;
    product.w_scale = w.scales;
    product.accumulate = accumulate;
    Note(LaunchRowsProduct(product, stream_), "int8 product");
  }
}

void CudaDevice::MatMul(Tensor y, Tensor x, const Weight& weight, bool accumulate) {
  const CudaWeight& w = WeightOf(weight);
  CHECK(x.rows == y.rows && x.cols == w.in() && y.cols == w.out());
  if (x.rows == 0) return;
  Bind();
  if (w.codes != nullptr) return MatMulInt8(y, x, w, accumulate);

  const bool trainable = w.storage.empty();
  const DType type = trainable ? activations_ : w.matrix.dtype;
  const Tensor matrix = WeightAs(type, w);
  const Tensor input = As(type, x, kConvertedInput);
  if (matrix.data == nullptr || input.data == nullptr) return;
  if (type == DType::kBF16 && x.rows <= kMaxProductRows && w.in() * 2 % kRowAlignment == 0 &&
      AlignedRows(input) && AlignedRows(matrix)) {
    RowsProduct product;
    product.y = y;
    product.x = input.data;
    product.x_stride = input.stride * 2;
    product.w = matrix.data;
    product.w_stride = matrix.stride * 2;
    product.row_bytes = w.in() * 2;
    product.accumulate = accumulate;
    Note(LaunchRowsProduct(product, stream_), "product of few rows");
    return;
  }
  MatrixProduct product;
  product.input = CudaType(type);
  product.m = x.rows;
  product.n = w.out();
  product.k = w.in();
  product.a = input.data;
  product.a_stride = input.stride;
  product.b = matrix.data;
  product.b_stride = matrix.stride;
  product.b_transposed = true;
  product.accumulate = accumulate;
  MultiplyInto(y, product);
}

void CudaDevice::MatMulBackwardInput(Tensor dx, Tensor dy, const Weight& weight, bool accumulate) {
  const CudaWeight& w = WeightOf(weight);
  CHECK(w.codes == nullptr);  // an int8 weight has no backward
  CHECK(dx.rows == dy.rows && dx.cols == w.in() && dy.cols == w.out());
  if (dx.rows == 0) return;
  Bind();
  const DType type = w.storage.empty() ? activations_ : w.matrix.dtype;
  const Tensor matrix = WeightAs(type, w);
  const Tensor gradient = As(type, dy, kConvertedInput);
  MatrixProduct product;
  product.input = CudaType(type);
  product.m = dx.rows;
  product.n = w.in();
  product.k = w.out();
  product.a = gradient.data;
  product.a_stride = gradient.stride;
  product.b = matrix.data;
  product.b_stride = matrix.stride;
  product.accumulate = accumulate;
  MultiplyInto(dx, product);
}

void CudaDevice::MatMulBackwardWeight(Tensor dw, Tensor dy, Tensor x) {
  CHECK(dw.dtype == DType::kF32);
  CHECK(dw.rows == dy.cols && dw.cols == x.cols && dy.rows == x.rows);
  if (x.rows == 0) return;
  Bind();
  const Tensor gradient = As(activations_, dy, kConvertedInput);
  const Tensor input = As(activations_, x, kConvertedWeight);  // no weight is converted here
  MatrixProduct product;
  product.input = CudaType(activations_);
  product.m = dw.rows;
  product.n = dw.cols;
  product.k = x.rows;
  product.a = gradient.data;
  product.a_stride = gradient.stride;
  product.a_transposed = true;
  product.b = input.data;
  product.b_stride = input.stride;
  product.accumulate = true;
  MultiplyInto(dw, product);
}

}  // namespace memory3
