// What the decoder computes on: buffers that a Device owns the memory of, and views into them.
//
// Thread-safety: plain values; a Buffer is freed by the thread that drops it, at a moment when the
// device no longer uses it (Device::Synchronize where in doubt).
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace memory3 {

// bfloat16 is the upper half of an IEEE float. Conversions round to nearest even
// (transformer/bf16.h).
enum class DType : uint8_t { kF32 = 0, kBF16 = 1, kF16 = 2, kI32 = 3 };

constexpr int64_t SizeOf(DType type) { return type == DType::kF32 || type == DType::kI32 ? 4 : 2; }

class Device;

// Owned, 64-byte aligned memory of one device. Movable. The device must outlive it.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Device* device, void* data, size_t bytes) : device_(device), data_(data), bytes_(bytes) {}
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    if (this != &other) {
      Free();
      device_ = std::exchange(other.device_, nullptr);
      data_ = std::exchange(other.data_, nullptr);
      bytes_ = std::exchange(other.bytes_, 0);
    }
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { Free(); }

  void* data() const { return data_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  void Free();  // device.cc

  Device* device_ = nullptr;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// A view of a row-major matrix in device memory; element (r, c) is at data + r * stride + c.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;  // elements from row to row, >= cols

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
  // Rows [first, first + count).
  Tensor Rows(int64_t first, int64_t count) const {
    Tensor t = *this;
    t.data = static_cast<char*>(data) + first * stride * SizeOf(dtype);
    t.rows = count;
    return t;
  }
  // Columns [first, first + count).
  Tensor Cols(int64_t first, int64_t count) const {
    Tensor t = *this;
    t.data = static_cast<char*>(data) + first * SizeOf(dtype);
    t.cols = count;
    return t;
  }
};

// Where vectors of head_dim elements lie in device memory: in runs of `run` vectors one behind the
// other. Vector i begins at element i / run * run_stride + i % run * head_dim of `data`.
struct VectorRuns {
  void* data = nullptr;
  DType dtype = DType::kF32;  // or kBF16
  int64_t run = 1;            // >= 1
  int64_t run_stride = 0;
};

}  // namespace memory3
