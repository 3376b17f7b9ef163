#include "memory/vq_training.h"

#include <faiss/Index2Layer.h>
#include <faiss/IndexPQ.h>
#include <faiss/IndexPreTransform.h>
#include <faiss/index_factory.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "memory/vq_codec.h"
#include "spdlog/spdlog.h"

namespace memory3 {
namespace {

absl::Status NotOfThisForm(const char* part) {
  return absl::InvalidArgumentError(
      absl::StrCat("FAISS index: ", part, "; it must be one of \"OPQ…,Residual2x…,PQ8x…\""));
}

}  // namespace

std::string VqFactoryString(int head_dim, const VqTrainingOptions& options) {
  return absl::StrCat("OPQ", head_dim / 4, "_", head_dim, ",Residual2x", options.coarse_bits,
                      ",PQ8x", options.fine_bits);
}

absl::StatusOr<double> RelativeError(const Codec& codec, std::span<const float> vectors) {
  if (vectors.size() % codec.head_dim() != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(vectors.size(), " numbers are no vectors of ", codec.head_dim()));
  }
  constexpr int64_t kBatch = 4096;
  const int64_t d = codec.head_dim();
  const int64_t n = static_cast<int64_t>(vectors.size()) / d;
  std::vector<uint8_t> codes(kBatch * codec.bytes_per_vector());
  std::vector<float> decoded(kBatch * d);
  double error = 0, total = 0;
  for (int64_t first = 0; first < n; first += kBatch) {
    const int64_t count = std::min(kBatch, n - first);
    const std::span<const float> x = vectors.subspan(first * d, count * d);
    const std::span<uint8_t> code(codes.data(), count * codec.bytes_per_vector());
    const std::span<float> y(decoded.data(), count * d);
    if (absl::Status status = codec.Encode(x, code); !status.ok()) return status;
    if (absl::Status status = codec.Decode(code, y); !status.ok()) return status;
    for (size_t i = 0; i < x.size(); ++i) {
      const double difference = static_cast<double>(x[i]) - y[i];
      error += difference * difference;
      total += static_cast<double>(x[i]) * x[i];
    }
  }
  return total > 0 ? error / total : 0;
}

absl::StatusOr<VqCodebook> CodebookFromFaiss(const faiss::Index& index) {
  const auto* outer = dynamic_cast<const faiss::IndexPreTransform*>(&index);
  if (outer == nullptr || outer->chain.size() != 1) return NotOfThisForm("has no single transform");
  const auto* rotation = dynamic_cast<const faiss::LinearTransform*>(outer->chain[0]);
  if (rotation == nullptr || rotation->have_bias || rotation->d_in != rotation->d_out)
    return NotOfThisForm("its transform is no square matrix without bias");
  const auto* layers = dynamic_cast<const faiss::Index2Layer*>(outer->index);
  if (layers == nullptr) return NotOfThisForm("has no Residual and PQ");
  const auto* coarse = dynamic_cast<const faiss::MultiIndexQuantizer*>(layers->q1.quantizer);
  if (coarse == nullptr || coarse->pq.M != kCoarseBooks)
    return NotOfThisForm("its coarse quantizer is no pair of books");
  if (layers->pq.M != kFineBooks) return NotOfThisForm("its PQ has not eight books");
  if (!index.is_trained) return NotOfThisForm("is not trained");
  VqCodebook codebook;
  codebook.head_dim = rotation->d_in;
  codebook.coarse_bits = static_cast<int>(coarse->pq.nbits);
  codebook.fine_bits = static_cast<int>(layers->pq.nbits);
  codebook.rotation = rotation->A;
  codebook.coarse = coarse->pq.centroids;
  codebook.fine = layers->pq.centroids;
  if (absl::Status status = CheckCodebook(codebook); !status.ok()) return status;
  return codebook;
}

absl::StatusOr<VqTraining> TrainVqCodebook(std::span<const float> vectors, int head_dim,
                                           const VqTrainingOptions& options) {
  if (head_dim < 8 || head_dim > kMaxVqHeadDim || head_dim % 8 != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "codebook: head_dim is ", head_dim, "; vq wants a multiple of 8 in 8..", kMaxVqHeadDim));
  }
  if (options.coarse_bits < 1 || options.coarse_bits > 16 || options.fine_bits < 1 ||
      options.fine_bits > 12) {
    return absl::InvalidArgumentError(absl::StrCat("codebook: coarse_bits ", options.coarse_bits,
                                                   " not in 1..16 or fine_bits ", options.fine_bits,
                                                   " not in 1..12"));
  }
  if (vectors.size() % head_dim != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("codebook: ", vectors.size(), " numbers are no vectors of ", head_dim));
  }
  if (absl::Status finite = CheckFinite(vectors, head_dim); !finite.ok()) return finite;
  const int64_t n = static_cast<int64_t>(vectors.size()) / head_dim;
  constexpr int64_t kRotationCentroids = 256;  // of the PQ that OPQ trains inside
  const int64_t fewest = std::max(
      {int64_t{1} << options.coarse_bits, int64_t{1} << options.fine_bits, kRotationCentroids});
  if (n < fewest) {
    return absl::InvalidArgumentError(
        absl::StrCat("codebook: ", n, " training vectors, at least ", fewest, " are needed"));
  }
  VqTraining training;
  if (n < fewest * kVectorsPerCentroid) {
    training.warning =
        absl::StrCat("codebook trained on ", n, " vectors; ", fewest * kVectorsPerCentroid, " (",
                     kVectorsPerCentroid, " per centroid) are wanted: expect larger errors");
    spdlog::warn("{}", training.warning);
  }
  try {
    const std::unique_ptr<faiss::Index> index(faiss::index_factory(
        head_dim, VqFactoryString(head_dim, options).c_str(), faiss::METRIC_L2));
    index->train(n, vectors.data());
    absl::StatusOr<VqCodebook> codebook = CodebookFromFaiss(*index);
    if (!codebook.ok()) return codebook.status();
    training.codebook = *std::move(codebook);
  } catch (const std::exception& e) {
    return absl::InternalError(absl::StrCat("FAISS: ", e.what()));
  }
  const auto codec = VqCodec::Create(training.codebook, Hash256{});
  if (!codec.ok()) return codec.status();
  const absl::StatusOr<double> error = RelativeError(**codec, vectors);
  if (!error.ok()) return error.status();
  training.relative_error = *error;
  return training;
}

}  // namespace memory3
