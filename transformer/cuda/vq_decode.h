// Vector-quantised memories decoded on the GPU: the codebook's tables live there, the codes come as
// they stand in the records (memory/vq_codebook.h; explicit-memory.md, Compressing).
//
// Only in builds with CUDA. Thread-safety: the device's thread; Decode queues and returns.
// Ownership: owns the tables' device memory; the device must outlive it.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "memory/vq_codebook.h"
#include "transformer/device.h"
#include "transformer/tensor.h"

namespace memory3 {

class CudaVqDecoder {
 public:
  // `device`: one that MakeCudaDevice made. INVALID_ARGUMENT: CheckCodebook's, or a device that is
  // none of those. RESOURCE_EXHAUSTED: the device is full.
  static absl::StatusOr<std::unique_ptr<CudaVqDecoder>> Create(Device* device,
                                                               const VqCodebook& codebook);

  int head_dim() const { return head_dim_; }
  int64_t code_bytes() const { return code_bytes_; }
  // vectors[i] = the vector that codes[i] stands for. vectors: [n, head_dim], f32 or bf16; codes:
  // [n, code_bytes], device memory. Any bytes decode to finite numbers: bits that no code has are
  // not looked at (the record's checksum is the host's to check). Errors of the launch.
  absl::Status Decode(Tensor vectors, const uint8_t* codes) const;

 private:
  CudaVqDecoder() = default;

  Device* device_ = nullptr;
  int head_dim_ = 0, coarse_bits_ = 0, fine_bits_ = 0;
  int64_t code_bytes_ = 0, coarse_code_bytes_ = 0;
  Buffer rotation_, coarse_, fine_;
};

}  // namespace memory3
