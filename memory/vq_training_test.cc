// Our encoder and decoder against FAISS's, on indexes FAISS trained.
#include "memory/vq_training.h"

#include <faiss/Index2Layer.h>
#include <faiss/IndexFlat.h>
#include <faiss/IndexPQ.h>
#include <faiss/IndexPreTransform.h>
#include <faiss/impl/ProductQuantizer.h>
#include <faiss/index_factory.h>
#include <omp.h>

#include <cmath>
#include <memory>
#include <random>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "memory/vq_codec.h"

namespace memory3 {
namespace {

using ::testing::HasSubstr;

// Correlated numbers of unequal variance, so that the rotation and both levels have work to do.
std::vector<float> Vectors(int64_t n, int d, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(n * d);
  for (int64_t v = 0; v < n; ++v) {
    const float common = normal(random);
    for (int k = 0; k < d; ++k)
      x[v * d + k] = normal(random) * (0.3f + 2.0f * k / d) + (k % 3 == 0 ? 2 * common : 0);
  }
  return x;
}

double Error(const float* a, const float* b, int d) {
  double sum = 0;
  for (int k = 0; k < d; ++k)
    sum += (static_cast<double>(a[k]) - b[k]) * (static_cast<double>(a[k]) - b[k]);
  return sum;
}

// Ours against FAISS's on one index.
void ExpectAgreement(const faiss::Index& index, int64_t n) {
  const int d = index.d;
  const auto codec = VqCodec::Create(CodebookFromFaiss(index).value(), Sha256Of("x")).value();
  ASSERT_EQ(codec->bytes_per_vector(), static_cast<int64_t>(index.sa_code_size()));
  const int64_t bytes = codec->bytes_per_vector();
  const std::vector<float> x = Vectors(n, d, 2);
  std::vector<uint8_t> ours(n * bytes), theirs(n * bytes);
  ASSERT_TRUE(codec->Encode(x, ours).ok());
  index.sa_encode(n, x.data(), theirs.data());
  std::vector<float> ours_decoded(n * d), theirs_decoded(n * d), cross(n * d);
  ASSERT_TRUE(codec->Decode(ours, ours_decoded).ok());
  ASSERT_TRUE(codec->Decode(theirs, cross).ok());
  index.sa_decode(n, theirs.data(), theirs_decoded.data());

  // Decoding of the same bytes.
  float largest = 0, difference = 0;
  for (int64_t i = 0; i < n * d; ++i) {
    largest = std::max(largest, std::fabs(theirs_decoded[i]));
    difference = std::max(difference, std::fabs(theirs_decoded[i] - cross[i]));
  }
  EXPECT_LE(difference, 1e-5 * largest);

  // Encoding: the same codes, save where two centroids are equally near to within rounding.
  int64_t different = 0;
  for (int64_t v = 0; v < n; ++v) {
    if (std::equal(&ours[v * bytes], &ours[(v + 1) * bytes], &theirs[v * bytes])) continue;
    ++different;
    const double a = Error(&x[v * d], &ours_decoded[v * d], d);
    const double b = Error(&x[v * d], &theirs_decoded[v * d], d);
    EXPECT_NEAR(a, b, 1e-5 * b) << "vector " << v;
  }
  EXPECT_LE(different, n / 500);
}

struct Case {
  int head_dim;
  VqTrainingOptions bits;
  int64_t train;
};

class FaissAgreementTest : public ::testing::TestWithParam<Case> {};

TEST_P(FaissAgreementTest, CodesDistancesAndDecoding) {
  omp_set_num_threads(1);  // tables this small only make threads wait for each other
  const int d = GetParam().head_dim;
  const std::vector<float> sample = Vectors(GetParam().train, d, 1);
  std::unique_ptr<faiss::Index> index(
      faiss::index_factory(d, VqFactoryString(d, GetParam().bits).c_str()));
  auto* outer = dynamic_cast<faiss::IndexPreTransform*>(index.get());
  ASSERT_NE(outer, nullptr);
  auto* opq = dynamic_cast<faiss::OPQMatrix*>(outer->chain[0]);
  ASSERT_NE(opq, nullptr);
  // Any trained rotation serves this test: 16 centroids instead of 256, 4 rounds instead of 50.
  faiss::ProductQuantizer rough(d, opq->M, 4);
  opq->pq = &rough;
  opq->niter = 4;
  index->train(GetParam().train, sample.data());

  ExpectAgreement(*index, 2000);
}

INSTANTIATE_TEST_SUITE_P(HeadDims, FaissAgreementTest,
                         ::testing::Values(Case{8, {4, 3}, 600}, Case{32, {6, 5}, 2600},
                                           Case{64, {7, 6}, 5200}, Case{80, {8, 6}, 10000}),
                         [](const auto& info) { return absl::StrCat("d", info.param.head_dim); });

// The paper's own size; its tables random, since training them takes minutes.
TEST(FaissAgreementAtStandardSizeTest, CodesDistancesAndDecoding) {
  omp_set_num_threads(1);
  const int d = 80;
  std::unique_ptr<faiss::Index> index(faiss::index_factory(d, VqFactoryString(d).c_str()));
  auto& outer = dynamic_cast<faiss::IndexPreTransform&>(*index);
  auto& layers = dynamic_cast<faiss::Index2Layer&>(*outer.index);
  auto& coarse = dynamic_cast<faiss::MultiIndexQuantizer&>(*layers.q1.quantizer);
  auto& opq = dynamic_cast<faiss::LinearTransform&>(*outer.chain[0]);
  faiss::RandomRotationMatrix rotation(d, d);
  rotation.init(1);
  opq.A = rotation.A;
  opq.is_orthonormal = opq.is_trained = true;
  coarse.pq.centroids = Vectors(coarse.pq.centroids.size() / 40, 40, 6);
  layers.pq.centroids = Vectors(layers.pq.centroids.size() / 10, 10, 7);
  index->is_trained = layers.is_trained = coarse.is_trained = true;
  ASSERT_EQ(index->sa_code_size(), 14);
  ExpectAgreement(*index, 1000);
}

TEST(TrainVqCodebookTest, TrainsWarnsAndRoundTrips) {
  omp_set_num_threads(1);
  const std::vector<float> sample = Vectors(1000, 16, 3);
  const VqTraining few = TrainVqCodebook(sample, 16, {.coarse_bits = 6, .fine_bits = 4}).value();
  EXPECT_THAT(few.warning, HasSubstr("1000 vectors"));
  EXPECT_GT(few.relative_error, 0);
  EXPECT_LT(few.relative_error, 0.2);
  const std::string file = SerializeCodebook(few.codebook).value();
  const auto codec = MakeVqCodec(file).value();
  std::vector<uint8_t> codes(1000 * codec->bytes_per_vector());
  std::vector<float> decoded(sample.size());
  ASSERT_TRUE(codec->Encode(sample, codes).ok());
  ASSERT_TRUE(codec->Decode(codes, decoded).ok());
  double error = 0, total = 0;
  for (size_t i = 0; i < sample.size(); ++i) {
    error += std::pow(sample[i] - decoded[i], 2);
    total += std::pow(sample[i], 2);
  }
  EXPECT_NEAR(error / total, few.relative_error, 1e-5);
}

TEST(RelativeErrorTest, IsTheCodecs) {
  const auto f32 = MakeF32Codec(4);
  EXPECT_EQ(RelativeError(*f32, Vectors(10, 4, 1)).value(), 0);
  // In bf16 257 becomes 256: an error of 1 beside 257² + 1.
  EXPECT_NEAR(RelativeError(*MakeBF16Codec(2), std::vector<float>{257, 1}).value(),
              1.0 / (257 * 257 + 1), 1e-12);
  EXPECT_EQ(RelativeError(*f32, std::vector<float>(8)).value(), 0);
  EXPECT_EQ(RelativeError(*f32, std::vector<float>(7)).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(TrainVqCodebookTest, EnoughVectorsGiveNoWarning) {
  omp_set_num_threads(1);
  const std::vector<float> sample = Vectors(256 * kVectorsPerCentroid, 8, 4);
  EXPECT_EQ(TrainVqCodebook(sample, 8, {.coarse_bits = 3, .fine_bits = 2}).value().warning, "");
}

TEST(TrainVqCodebookTest, RefusesBadInput) {
  const auto refused = [](const std::vector<float>& x, int d, VqTrainingOptions bits,
                          const char* what) {
    const absl::Status status = TrainVqCodebook(x, d, bits).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(what));
  };
  std::vector<float> x = Vectors(300, 16, 5);
  refused(x, 12, {4, 3}, "head_dim is 12");
  refused(x, 16, {}, "at least 16384");
  refused(x, 16, {20, 3}, "coarse_bits 20");
  refused(std::vector<float>(17), 16, {4, 3}, "17 numbers");
  x[33] = std::nanf("");
  refused(x, 16, {4, 3}, "vector 2 has NaN at 1");
}

TEST(CodebookFromFaissTest, RefusesOtherIndexes) {
  EXPECT_THAT(std::string(CodebookFromFaiss(faiss::IndexFlatL2(16)).status().message()),
              HasSubstr("no single transform"));
  const auto refused = [](const char* factory, const char* what) {
    std::unique_ptr<faiss::Index> index(faiss::index_factory(16, factory));
    EXPECT_THAT(std::string(CodebookFromFaiss(*index).status().message()), HasSubstr(what))
        << factory;
  };
  refused("OPQ4_16,PQ4", "no Residual");
  refused("OPQ4_16,Residual2x4,PQ4x3", "eight books");
  refused("OPQ4_16,Residual2x4,PQ8x3", "not trained");
  refused("OPQ4_8,Residual2x4,PQ8x3", "no square matrix");
}

}  // namespace
}  // namespace memory3
