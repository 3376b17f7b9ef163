// Trains the vq codec's codebook with FAISS and takes FAISS's trained index as a codebook. The only
// part of memory/ that links FAISS (library memory3_codec_training).
//
// Thread-safety: functions; FAISS trains with OpenMP's threads.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "absl/status/statusor.h"
#include "memory/codec.h"
#include "memory/vq_codebook.h"

namespace faiss {
struct Index;
}

namespace memory3 {

struct VqTrainingOptions {
  int coarse_bits = 14;
  int fine_bits = 10;
};

struct VqTraining {
  VqCodebook codebook;
  // RelativeError of the training vectors. Near 0 and no promise for others where there were hardly
  // more vectors than centroids.
  double relative_error = 0;
  // "" or why the codebook may be poor: fewer than kVectorsPerCentroid vectors for a coarse
  // centroid.
  std::string warning;
};

inline constexpr int64_t kVectorsPerCentroid = 39;  // FAISS's own wish

// "OPQ{d/4}_{d},Residual2x{coarse_bits},PQ8x{fine_bits}" (explicit-memory.md, Compressing).
std::string VqFactoryString(int head_dim, const VqTrainingOptions& options = {});

// vectors: [n, head_dim], sampled over layers, heads, K and V of many memories. INVALID_ARGUMENT on
// NaN, infinity, a head_dim the codec has no rule for, or fewer vectors than centroids of one book
// (2^14).
absl::StatusOr<VqTraining> TrainVqCodebook(std::span<const float> vectors, int head_dim,
                                           const VqTrainingOptions& options = {});

// Mean of |x - decode(encode(x))|² over mean of |x|², of `vectors` [n, codec.head_dim()]; 0 for
// zeros. What a codebook is worth is this on memories it was not trained on. Errors as Encode.
absl::StatusOr<double> RelativeError(const Codec& codec, std::span<const float> vectors);

// A trained FAISS index of VqFactoryString as our codebook. INVALID_ARGUMENT names the part of the
// index that is not of that form.
absl::StatusOr<VqCodebook> CodebookFromFaiss(const faiss::Index& index);

}  // namespace memory3
