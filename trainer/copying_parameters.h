// Parameters to start a small model from that copies from the start: an induction circuit (Elhage
// et al. 2021, Olsson et al. 2022) laid out in the first two layers, all else random as in
// InitialParameters. Learning it from nothing is a sudden phase that a small run may never reach
// (docs/results/tiny_model.md); laid out, training finds it in use from its first step, in the
// context and, since memories are keys and values of the same heads, in memories.
//
//   embedding    coordinate 0 is the same for every token, so that it stands for "any token";
//                twice the usual deviation, so that copied tokens win over a flat output
//   layer 0      half of the KV heads attend to the token before: queries and keys see coordinate 0
//                alone, and rotary positions do the rest; they write that token, projected to a
//                random subspace, into another subspace
//   layer 1      every head looks, in the slow half of its frequencies (which do not see
//                distances), for places after a token like the present one, and writes its share
//                of the token found back as it is
//
// Thread-safety: immutable.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "transformer/config.h"
#include "transformer/parameters.h"
#include "transformer/tensor_source.h"

namespace memory3 {

class CopyingParameters : public TensorSource {
 public:
  // INVALID_ARGUMENT names the field: fewer than two layers, untied embeddings, other than one KV
  // head for each head, head_dim below 16, or heads that do not make up the width.
  static absl::StatusOr<std::unique_ptr<CopyingParameters>> Create(const ModelConfig& config,
                                                                   uint64_t seed);
  absl::Status Read(std::string_view name, int64_t rows, int64_t cols,
                    std::span<float> out) const override;

 private:
  CopyingParameters(const ModelConfig& config, uint64_t seed);
  void LayOutPreviousToken(std::string_view matrix, std::span<float> out) const;
  void LayOutMatching(std::string_view matrix, std::span<float> out) const;

  const ModelConfig config_;
  const uint64_t seed_;
  const InitialParameters random_;
  std::vector<double> basis_;  // [width, width], orthogonal rows
};

}  // namespace memory3
