// The vq codec: encoding and decoding of our own over a codebook FAISS trained, agreeing with
// FAISS's sa_encode and sa_decode of the same index. Two products and argmins to encode, a table
// walk and the inverse rotation to decode; batched inside, one thread.
//
// Thread-safety: immutable; any thread. Callers spread encoding over threads by memories.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "memory/codec.h"
#include "memory/vq_codebook.h"
#include "memory/vq_kernels.h"

namespace memory3 {

class VqCodec final : public Codec {
 public:
  // `hash`: SHA-256 of the codebook's file. INVALID_ARGUMENT as CheckCodebook. `kernels` lives for
  // ever.
  static absl::StatusOr<std::unique_ptr<VqCodec>> Create(
      VqCodebook codebook, const Hash256& hash, const vq::Kernels& kernels = vq::PickKernels());

  CodecId id() const override { return CodecId::kVq; }
  int head_dim() const override { return codebook_.head_dim; }
  const Hash256& codebook_hash() const override { return hash_; }
  int64_t bytes_per_vector() const override { return codebook_.code_bytes(); }
  absl::Status Encode(std::span<const float> vectors, std::span<uint8_t> out) const override;
  absl::Status Decode(std::span<const uint8_t> bytes, std::span<float> vectors) const override;

  // What Decode checks, without decoding: DATA_LOSS names the first vector whose code has bits that
  // no code has; INVALID_ARGUMENT: not a whole number of codes.
  absl::Status CheckCodes(std::span<const uint8_t> codes) const;

  // The tables, for devices that keep them beside their kernels.
  const VqCodebook& codebook() const { return codebook_; }

 private:
  // A table in the kernels' layout, with its memory.
  struct Table {
    std::vector<float> values;
    std::vector<float> half_norms;
    int64_t rows = 0;
    int depth = 0;
    vq::RowBlocks blocks() const;
  };

  VqCodec(VqCodebook codebook, const Hash256& hash, const vq::Kernels& kernels);
  static Table MakeTable(const float* rows, int64_t count, int depth);

  VqCodebook codebook_;
  Hash256 hash_;
  const vq::Kernels& kernels_;
  Table rotation_, inverse_;
  Table coarse_[kCoarseBooks];
  Table fine_[kFineBooks];
};

}  // namespace memory3
