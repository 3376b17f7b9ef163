// Vector-quantised memories decoded on the GPU: the codebook's tables live there, the codes come as
// they stand in the records (memory/vq_codebook.h; explicit-memory.md, Compressing).
//
// Only in builds with CUDA. Thread-safety: any thread makes one and calls DecodeAside; Decode
// queues on the device's stream and is for the device's thread. Ownership: owns the tables' device
// memory; the device must outlive it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "memory/vq_codebook.h"
#include "transformer/device.h"
#include "transformer/tensor.h"

namespace memory3 {

class CudaDevice;

class CudaVqDecoder final : public VectorDecoder {
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
  absl::Status DecodeAside(const VectorRuns& vectors, std::span<const uint8_t> codes) override;

 private:
  CudaVqDecoder() = default;
  cudaError_t Launch(const VectorRuns& vectors, int64_t count, const uint8_t* codes,
                     cudaStream_t stream) const;

  CudaDevice* device_ = nullptr;
  int head_dim_ = 0, coarse_bits_ = 0, fine_bits_ = 0;
  int64_t code_bytes_ = 0, coarse_code_bytes_ = 0;
  Buffer rotation_, coarse_, fine_;
};

}  // namespace memory3
