#include "memory/codec.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace memory3 {
namespace {

using ::testing::HasSubstr;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<float> RandomNumbers(size_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> numbers(n);
  for (float& x : numbers) x = normal(random);
  return numbers;
}

std::vector<uint8_t> Encoded(const Codec& codec, const std::vector<float>& vectors) {
  std::vector<uint8_t> bytes(vectors.size() / codec.head_dim() * codec.bytes_per_vector());
  const absl::Status status = codec.Encode(vectors, bytes);
  EXPECT_TRUE(status.ok()) << status;
  return bytes;
}

std::vector<float> Decoded(const Codec& codec, const std::vector<uint8_t>& bytes) {
  std::vector<float> vectors(bytes.size() / codec.bytes_per_vector() * codec.head_dim());
  const absl::Status status = codec.Decode(bytes, vectors);
  EXPECT_TRUE(status.ok()) << status;
  return vectors;
}

absl::Status DecodeStatus(const Codec& codec, const std::vector<uint8_t>& bytes) {
  std::vector<float> vectors(bytes.size() / codec.bytes_per_vector() * codec.head_dim());
  return codec.Decode(bytes, vectors);
}

TEST(CodecNamesTest, RoundTrip) {
  for (CodecId id : {CodecId::kF32, CodecId::kBF16, CodecId::kInt8, CodecId::kVq})
    EXPECT_EQ(ParseCodecId(CodecName(id)).value(), id);
  EXPECT_THAT(std::string(ParseCodecId("f64").status().message()), HasSubstr("\"f64\""));
}

TEST(F32CodecTest, IsExact) {
  const auto codec = MakeF32Codec(7);
  EXPECT_EQ(codec->bytes_per_vector(), 28);
  const std::vector<float> x = RandomNumbers(7 * 9, 1);
  EXPECT_EQ(Decoded(*codec, Encoded(*codec, x)), x);
  EXPECT_TRUE(codec->codebook_hash().is_zero());
}

TEST(BF16CodecTest, RoundsToNearestEven) {
  const auto codec = MakeBF16Codec(4);
  EXPECT_EQ(codec->bytes_per_vector(), 8);
  // bf16 has 8 bits of significand: between 256 and 258 nothing; ties go to the even neighbour.
  EXPECT_EQ(Decoded(*codec, Encoded(*codec, {257, 259, -257.01f, 1.0f})),
            (std::vector<float>{256, 260, -258, 1.0f}));
  const std::vector<float> x = RandomNumbers(400, 2);
  const std::vector<float> y = Decoded(*codec, Encoded(*codec, x));
  for (size_t i = 0; i < x.size(); ++i) EXPECT_LE(std::fabs(x[i] - y[i]), std::fabs(x[i]) / 256);
}

TEST(BF16CodecTest, RefusesWhatWouldRoundToInfinity) {
  const auto codec = MakeBF16Codec(2);
  std::vector<uint8_t> out(8);
  const std::vector<float> x = {1, 1, 0, std::numeric_limits<float>::max()};
  EXPECT_THAT(std::string(codec->Encode(x, out).message()), HasSubstr("vector 1"));
}

TEST(Int8CodecTest, ErrorIsHalfAStepAndTheLargestIsExactTo127) {
  const auto codec = MakeInt8Codec(80);
  EXPECT_EQ(codec->bytes_per_vector(), 84);
  const std::vector<float> x = RandomNumbers(80 * 50, 3);
  const std::vector<uint8_t> bytes = Encoded(*codec, x);
  const std::vector<float> y = Decoded(*codec, bytes);
  for (int v = 0; v < 50; ++v) {
    float scale;
    std::memcpy(&scale, bytes.data() + v * 84, 4);
    float largest = 0;
    int largest_code = 0;
    for (int k = 0; k < 80; ++k) {
      largest = std::max(largest, std::fabs(x[v * 80 + k]));
      largest_code = std::max(largest_code, std::abs(static_cast<int8_t>(bytes[v * 84 + 4 + k])));
      EXPECT_LE(std::fabs(x[v * 80 + k] - y[v * 80 + k]), scale * 0.50001f);
      // Against the C library's rounding, which ties to even.
      EXPECT_EQ(static_cast<int8_t>(bytes[v * 84 + 4 + k]), std::nearbyint(x[v * 80 + k] / scale));
    }
    EXPECT_EQ(scale, largest / 127);
    EXPECT_EQ(largest_code, 127);
  }
}

TEST(Int8CodecTest, ZerosAndDenormals) {
  const auto codec = MakeInt8Codec(3);
  const float tiny = std::numeric_limits<float>::denorm_min();
  EXPECT_EQ(Decoded(*codec, Encoded(*codec, {0, 0, -0.0f, tiny, -tiny, 0})),
            (std::vector<float>{0, 0, 0, 0, 0, 0}));
  std::vector<uint8_t> out(7);
  const std::vector<float> x = {std::numeric_limits<float>::max(), 1, 1};
  EXPECT_THAT(std::string(codec->Encode(x, out).message()), HasSubstr("too large"));
}

TEST(CodecTest, EncodeRefusesNaNAndInfinityAndNamesTheVector) {
  for (const auto& codec : {MakeF32Codec(4), MakeBF16Codec(4), MakeInt8Codec(4)}) {
    for (const float bad : {std::nanf(""), kInfinity, -kInfinity}) {
      std::vector<float> x(12, 1.0f);
      x[9] = bad;
      std::vector<uint8_t> out(3 * codec->bytes_per_vector());
      const absl::Status status = codec->Encode(x, out);
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
      EXPECT_THAT(std::string(status.message()), HasSubstr("vector 2 has "));
      EXPECT_THAT(std::string(status.message()), HasSubstr("at 1"));
    }
  }
}

TEST(CodecTest, WrongSizesAreRefused) {
  for (const auto& codec : {MakeF32Codec(4), MakeBF16Codec(4), MakeInt8Codec(4)}) {
    std::vector<float> x(8);
    std::vector<uint8_t> bytes(2 * codec->bytes_per_vector());
    EXPECT_TRUE(codec->Encode(x, bytes).ok());
    for (const int extra : {-1, 1}) {
      std::vector<float> wrong(8 + extra);
      EXPECT_EQ(codec->Encode(wrong, bytes).code(), absl::StatusCode::kInvalidArgument);
      EXPECT_EQ(codec->Decode(bytes, wrong).code(), absl::StatusCode::kInvalidArgument);
      std::vector<uint8_t> wrong_bytes(bytes.size() + extra);
      EXPECT_EQ(codec->Encode(x, wrong_bytes).code(), absl::StatusCode::kInvalidArgument);
    }
    EXPECT_EQ(codec->Decode(bytes, std::span<float>(x).first(4)).code(),
              absl::StatusCode::kInvalidArgument);
    EXPECT_TRUE(codec->Encode({}, {}).ok());
  }
}

TEST(CodecTest, DecodeNeverGivesWhatIsNotFinite) {
  std::mt19937 random(5);
  for (const auto& codec : {MakeF32Codec(4), MakeBF16Codec(4), MakeInt8Codec(4)}) {
    int refused = 0;
    for (int round = 0; round < 20000; ++round) {
      std::vector<uint8_t> bytes(codec->bytes_per_vector());
      for (uint8_t& b : bytes) b = static_cast<uint8_t>(random() >> 13);
      std::vector<float> x(4);
      const absl::Status status = codec->Decode(bytes, x);
      if (!status.ok()) {
        EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
        ++refused;
        continue;
      }
      for (const float value : x) ASSERT_TRUE(std::isfinite(value));
    }
    EXPECT_GT(refused, 0);
    EXPECT_LT(refused, 20000);
  }
  // The largest scale times the largest code is the edge.
  const auto codec = MakeInt8Codec(1);
  const float edge = std::numeric_limits<float>::max() / 128;
  std::vector<uint8_t> bytes(5, 0x80);
  std::memcpy(bytes.data(), &edge, 4);
  EXPECT_TRUE(DecodeStatus(*codec, bytes).ok());
  const float beyond = std::nextafter(edge, kInfinity);
  std::memcpy(bytes.data(), &beyond, 4);
  EXPECT_EQ(DecodeStatus(*codec, bytes).code(), absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace memory3
