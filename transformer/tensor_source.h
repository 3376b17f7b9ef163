// Where a model's tensors come from: a checkpoint on disk, or random numbers.
#pragma once

#include <span>
#include <string_view>

#include "absl/status/status.h"

namespace memory3 {

// Thread-safety: const methods from any thread.
class TensorSource {
 public:
  virtual ~TensorSource() = default;
  // Fills `out` with tensor `name` (Hugging Face's name, e.g.
  // "model.layers.0.self_attn.q_proj.weight"), converted to f32, row-major [rows, cols] (cols == 1
  // and rows == size for a vector). NOT_FOUND: no such tensor. INVALID_ARGUMENT: another shape or
  // type; both name tensor and file.
  virtual absl::Status Read(std::string_view name, int64_t rows, int64_t cols,
                            std::span<float> out) const = 0;
};

}  // namespace memory3
