// The codebook of the vq codec: a rotation, two coarse books over the halves of the rotated vector
// and eight fine books over the eighths of what the coarse leave (the paper's
// OPQ20_80,Residual2x14,PQ8x10; explicit-memory.md, Compressing). Trained by memory/vq_training.h;
// docs/formats.md has the file.
//
// Thread-safety: a plain value.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "memory/hash.h"

namespace memory3 {

inline constexpr uint32_t kCodebookVersion = 1;
inline constexpr int kCoarseBooks = 2;
inline constexpr int kFineBooks = 8;
inline constexpr int kMaxVqHeadDim = 512;

struct VqCodebook {
  int head_dim = 0;             // 8..512, 8 divides it
  int coarse_bits = 0;          // 1..16; 14 is the standard
  int fine_bits = 0;            // 1..12; 10 is the standard
  std::vector<float> rotation;  // [head_dim, head_dim], y = rotation x; orthonormal
  std::vector<float> coarse;    // [2, 1 << coarse_bits, head_dim / 2]
  std::vector<float> fine;      // [8, 1 << fine_bits, head_dim / 8]

  int64_t coarse_rows() const { return int64_t{1} << coarse_bits; }
  int64_t fine_rows() const { return int64_t{1} << fine_bits; }
  // The code of a vector: 2 * coarse_bits rounded up to bytes, then 8 * fine_bits. Standard: 14.
  int64_t coarse_code_bytes() const { return (kCoarseBooks * coarse_bits + 7) / 8; }
  int64_t code_bytes() const { return coarse_code_bytes() + fine_bits; }
};

// INVALID_ARGUMENT says which extent, size or number is wrong. Numbers are finite and at most 2^40,
// the rotation's rows orthonormal within 1e-3: what follows decodes to finite numbers.
absl::Status CheckCodebook(const VqCodebook& codebook);

// The file's bytes; the codebook's hash is their SHA-256. INVALID_ARGUMENT as CheckCodebook.
absl::StatusOr<std::string> SerializeCodebook(const VqCodebook& codebook);

// DATA_LOSS for a wrong magic, length, checksum or content, UNIMPLEMENTED for another version; says
// which.
absl::StatusOr<VqCodebook> ParseCodebook(std::string_view file);

}  // namespace memory3
