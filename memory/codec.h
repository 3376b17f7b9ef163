// How a memory's numbers become bytes: f32, bf16, int8 (one scale a vector) and vq (the paper's
// OPQ{d/4}_{d},Residual2x14,PQ8x10, 14 bytes a vector). A codec works on vectors of head_dim
// numbers; the record (record.h) adds everything around them. docs/formats.md has the bytes.
//
// Thread-safety: a Codec is immutable; all methods from any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "memory/hash.h"

namespace memory3 {

enum class CodecId : uint8_t { kF32 = 1, kBF16 = 2, kInt8 = 3, kVq = 4 };

absl::StatusOr<CodecId> ParseCodecId(std::string_view name);  // "f32", "bf16", "int8", "vq"
std::string_view CodecName(CodecId id);

class Codec {
 public:
  virtual ~Codec() = default;
  virtual CodecId id() const = 0;
  virtual int head_dim() const = 0;
  // SHA-256 of the codebook; all zero for codecs without one.
  virtual const Hash256& codebook_hash() const = 0;
  virtual int64_t bytes_per_vector() const = 0;
  // vectors: n*head_dim floats; out: n*bytes_per_vector() bytes. INVALID_ARGUMENT on NaN or
  // infinity (names the vector) and on wrong sizes.
  virtual absl::Status Encode(std::span<const float> vectors, std::span<uint8_t> out) const = 0;
  // The inverse. Any bytes decode to finite numbers or give DATA_LOSS.
  virtual absl::Status Decode(std::span<const uint8_t> bytes, std::span<float> vectors) const = 0;
};

// head_dim >= 1.
std::unique_ptr<Codec> MakeF32Codec(int head_dim);
std::unique_ptr<Codec> MakeBF16Codec(int head_dim);
std::unique_ptr<Codec> MakeInt8Codec(int head_dim);
// `codebook`: the bytes of a codebook file (memory/vq_codebook.h); errors as ParseCodebook.
absl::StatusOr<std::unique_ptr<Codec>> MakeVqCodec(std::string_view codebook);
// Any of them. `codebook` is given for vq and only for vq; its head_dim is the given one (else
// INVALID_ARGUMENT).
absl::StatusOr<std::unique_ptr<Codec>> MakeCodec(CodecId id, int head_dim,
                                                 std::string_view codebook = {});

// For codecs. INVALID_ARGUMENT unless `values` numbers and `bytes` bytes are the same number of
// vectors.
absl::Status CheckCodecSizes(const Codec& codec, size_t values, size_t bytes);
// INVALID_ARGUMENT names the first vector of `head_dim` numbers that holds NaN or infinity.
absl::Status CheckFinite(std::span<const float> vectors, int head_dim);

}  // namespace memory3
