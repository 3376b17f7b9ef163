#include "trainer/copying_parameters.h"

#include <cmath>
#include <numbers>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "trainer/random.h"

namespace memory3 {
namespace {

constexpr double kDeviation = 0.04;      // of the embedding
constexpr double kConstant = 4;          // coordinate 0, in deviations
constexpr double kPreviousLogits = 8;    // of the attention to the token before
constexpr double kPreviousWrite = 0.06;  // gain from what it sees to what it writes
constexpr double kMatch = 2;             // gain of queries and keys
constexpr double kCopyWrite = 1;
// Share of each frequency, fastest first, in the attention to the token before.
constexpr double kPreviousShare[] = {1, 1, 1, 0.7, 0.5, 0.3};

double Gaussian(Random* random) {
  const double u = 1 - random->Unit();
  return std::sqrt(-2 * std::log(u)) * std::cos(2 * std::numbers::pi * random->Unit());
}

// Orthogonal rows (Gram-Schmidt on Gaussian ones) of length 1, all zero at coordinate 0 but the
// last.
std::vector<double> RandomBasis(int n, Random random) {
  std::vector<double> rows(static_cast<size_t>(n) * n, 0);
  for (int r = 0; r < n; ++r) {
    double* row = rows.data() + static_cast<int64_t>(r) * n;
    for (int c = r + 1 < n ? 1 : 0; c < n; ++c) row[c] = Gaussian(&random);
    for (int pass = 0; pass < 2; ++pass) {  // twice is enough (Kahan)
      for (int other = 0; other < r; ++other) {
        const double* o = rows.data() + static_cast<int64_t>(other) * n;
        double dot = 0;
        for (int c = 0; c < n; ++c) dot += row[c] * o[c];
        for (int c = 0; c < n; ++c) row[c] -= dot * o[c];
      }
    }
    double square = 0;
    for (int c = 0; c < n; ++c) square += row[c] * row[c];
    // The last can only be coordinate 0, which nothing should copy, nor be dead.
    const double length = r + 1 < n ? 1 : 0.1;
    for (int c = 0; c < n; ++c) row[c] *= length / std::sqrt(square);
  }
  return rows;
}

absl::Status Check(const ModelConfig& c) {
  const char* field = nullptr;
  if (c.layers < 2) field = "num_hidden_layers: a circuit takes two";
  if (!c.tie_word_embeddings) field = "tie_word_embeddings: must be true";
  if (c.kv_heads != c.heads) field = "num_key_value_heads: must be num_attention_heads";
  if (c.heads % 2 != 0) field = "num_attention_heads: must be even";
  if (c.head_dim < 16) field = "head_dim: must be at least 16";
  if (c.heads * c.head_dim != c.hidden_size) field = "head_dim: heads must make up the width";
  if (field == nullptr) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("copying weights: ", field));
}

}  // namespace

absl::StatusOr<std::unique_ptr<CopyingParameters>> CopyingParameters::Create(
    const ModelConfig& config, uint64_t seed) {
  if (absl::Status status = Check(config); !status.ok()) return status;
  return std::unique_ptr<CopyingParameters>(new CopyingParameters(config, seed));
}

CopyingParameters::CopyingParameters(const ModelConfig& config, uint64_t seed)
    : config_(config),
      seed_(seed),
      random_(seed, config.layers),
      basis_(RandomBasis(config.hidden_size, Random({seed, 0xba515}))) {}

absl::Status CopyingParameters::Read(std::string_view name, int64_t rows, int64_t cols,
                                     std::span<float> out) const {
  if (absl::Status status = random_.Read(name, rows, cols, out); !status.ok()) return status;
  if (name == "model.embed_tokens.weight") {
    for (float& x : out) x *= static_cast<float>(kDeviation / 0.02);
    for (int64_t r = 0; r < rows; ++r) out[r * cols] = kDeviation * kConstant;
  }
  const absl::string_view full(name.data(), name.size());
  for (const char* const matrix : {"q_proj", "k_proj", "v_proj", "o_proj"}) {
    if (full == absl::StrCat("model.layers.0.self_attn.", matrix, ".weight")) {
      LayOutPreviousToken(matrix, out);
    } else if (full == absl::StrCat("model.layers.1.self_attn.", matrix, ".weight")) {
      LayOutMatching(matrix, out);
    }
  }
  return absl::OkStatus();
}

// The first half of the basis reads a token, the second half is where the token before is written.
void CopyingParameters::LayOutPreviousToken(std::string_view matrix, std::span<float> out) const {
  const int width = config_.hidden_size, d = config_.head_dim, heads = config_.heads / 2;
  const std::vector<float> frequency = RopeInverseFrequencies(config_);
  // Coordinate 0 after normalisation.
  const double constant =
      kConstant / std::sqrt((width - 1 + kConstant * kConstant) / static_cast<double>(width));
  const double gain = std::sqrt(kPreviousLogits * std::sqrt(d)) / constant;
  for (int r = 0; r < heads * d; ++r) {
    const double* reads = basis_.data() + static_cast<int64_t>(r) * width;
    const double* writes = basis_.data() + (static_cast<int64_t>(heads) * d + r) * width;
    for (int c = 0; c < width; ++c) {
      if (matrix == "v_proj") {
        out[static_cast<int64_t>(r) * width + c] =
            static_cast<float>(reads[c] * std::sqrt(kPreviousWrite));
      } else if (matrix == "o_proj") {
        out[static_cast<int64_t>(c) * width + r] =
            static_cast<float>(writes[c] * std::sqrt(kPreviousWrite));
      } else {
        out[static_cast<int64_t>(r) * width + c] *= 0.1F;
      }
    }
  }
  if (matrix != "q_proj" && matrix != "k_proj") return;
  // The rotated product at distance n is Σ share · cos(frequency · (n - 1)), largest at n = 1.
  for (int h = 0; h < heads; ++h) {
    for (size_t p = 0; p < std::size(kPreviousShare); ++p) {
      const double size = gain * std::sqrt(kPreviousShare[p]);
      const double turn = matrix == "q_proj" ? -frequency[p] : 0;
      const int64_t row = static_cast<int64_t>(h) * d + static_cast<int64_t>(p);
      out[row * width] = static_cast<float>(size * std::cos(turn));
      out[(row + d / 2) * width] = static_cast<float>(size * std::sin(turn));
    }
  }
}

void CopyingParameters::LayOutMatching(std::string_view matrix, std::span<float> out) const {
  const int width = config_.hidden_size, d = config_.head_dim, half = width / 2;
  if (matrix == "v_proj" || matrix == "o_proj") {
    for (int r = 0; r < width; ++r) {
      for (int c = 0; c < width; ++c) {
        const auto value =
            static_cast<float>(basis_[static_cast<int64_t>(r) * width + c] * std::sqrt(kCopyWrite));
        out[matrix == "v_proj" ? static_cast<int64_t>(r) * width + c
                               : static_cast<int64_t>(c) * width + r] = value;
      }
    }
    return;
  }
  // Queries see the token itself, keys the token before, through the same random projection.
  const int first = matrix == "q_proj" ? 0 : half;
  for (float& x : out) x *= 0.3F;
  for (int row = 0; row < width; ++row) {
    const int pair = row % d % (d / 2);
    if (pair < d * 7 / 32) continue;  // a fast frequency
    Random random({seed_, static_cast<uint64_t>(row), 0x3a7c4});
    for (int k = 0; k < half; ++k) {
      const double weight = kMatch * Gaussian(&random) / std::sqrt(half);
      const double* direction = basis_.data() + (static_cast<int64_t>(first) + k) * width;
      for (int c = 0; c < width; ++c) {
        out[static_cast<int64_t>(row) * width + c] += static_cast<float>(weight * direction[c]);
      }
    }
  }
}

}  // namespace memory3
