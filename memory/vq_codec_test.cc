#include "memory/vq_codec.h"

#include <cmath>
#include <fstream>
#include <limits>
#include <random>
#include <sstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "memory/little_endian.h"

namespace memory3 {
namespace {

using ::testing::HasSubstr;

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file) << path;
  std::stringstream data;
  data << file.rdbuf();
  return data.str();
}

std::string StoredCodebook() { return ReadFile("memory/testdata/codebook_v1.m3cb"); }

std::vector<float> RandomNumbers(size_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> numbers(n);
  for (float& x : numbers) x = normal(random);
  return numbers;
}

// Random tables; the rotation a product of plane rotations.
VqCodebook RandomCodebook(int head_dim, int coarse_bits, int fine_bits, uint32_t seed) {
  VqCodebook c;
  c.head_dim = head_dim;
  c.coarse_bits = coarse_bits;
  c.fine_bits = fine_bits;
  const int d = head_dim;
  c.rotation.assign(d * d, 0.0f);
  for (int i = 0; i < d; ++i) c.rotation[i * d + i] = 1;
  std::mt19937 random(seed);
  for (int step = 0; step < 6 * d; ++step) {
    const int a = random() % d, b = (a + 1 + random() % (d - 1)) % d;
    const double angle = random() % 1000 * 0.00628;
    for (int k = 0; k < d; ++k) {
      const double x = c.rotation[a * d + k], y = c.rotation[b * d + k];
      c.rotation[a * d + k] = static_cast<float>(x * std::cos(angle) - y * std::sin(angle));
      c.rotation[b * d + k] = static_cast<float>(x * std::sin(angle) + y * std::cos(angle));
    }
  }
  c.coarse = RandomNumbers(static_cast<size_t>(d) << coarse_bits, seed + 1);
  c.fine = RandomNumbers(static_cast<size_t>(d) << fine_bits, seed + 2);
  for (float& x : c.fine) x *= 0.5f;
  return c;
}

double SquaredDistance(const float* a, const float* b, int n) {
  double sum = 0;
  for (int k = 0; k < n; ++k)
    sum += (static_cast<double>(a[k]) - b[k]) * (static_cast<double>(a[k]) - b[k]);
  return sum;
}

class KernelsTest : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    const vq::Kernels* kernels[3];
    if (GetParam() >= vq::AvailableKernels(kernels)) GTEST_SKIP() << "this CPU has fewer kernels";
    kernels_ = kernels[GetParam()];
  }
  const vq::Kernels* kernels_ = nullptr;
};

// Every depth and batch size the tables' shapes give, and the row counts around a block.
TEST_P(KernelsTest, NearestAndProductAgreeWithPlainLoops) {
  for (const int depth : {1, 3, 10, 40}) {
    for (const int rows : {2, 47, 48, 49, 80, 1024}) {
      for (const int n : {1, 5, 8, 13, 64}) {
        const int stride = depth + 3;
        const std::vector<float> table =
            RandomNumbers(static_cast<size_t>(rows) * depth, rows + depth);
        const std::vector<float> x = RandomNumbers(static_cast<size_t>(n) * stride, n);
        const int blocks = (rows + vq::kRowBlock - 1) / vq::kRowBlock;
        std::vector<float> values(blocks * depth * vq::kRowBlock, 0.0f);
        std::vector<float> half_norms(blocks * vq::kRowBlock,
                                      std::numeric_limits<float>::infinity());
        for (int r = 0; r < rows; ++r) {
          half_norms[r] = 0;
          for (int k = 0; k < depth; ++k) {
            const float value = table[r * depth + k];
            values[(r / vq::kRowBlock * depth + k) * vq::kRowBlock + r % vq::kRowBlock] = value;
            half_norms[r] += value * value / 2;
          }
        }
        const vq::RowBlocks view{values.data(), half_norms.data(), rows, blocks, depth};
        std::vector<int32_t> nearest(n);
        kernels_->nearest(view, x.data(), n, stride, nearest.data());
        std::vector<float> product(n * rows + 1, -7.0f);
        kernels_->product(view, x.data(), n, stride, product.data());
        for (int v = 0; v < n; ++v) {
          double least = std::numeric_limits<double>::infinity();
          for (int r = 0; r < rows; ++r) {
            least = std::min(least, SquaredDistance(&table[r * depth], &x[v * stride], depth));
            double dot = 0;
            for (int k = 0; k < depth; ++k)
              dot += static_cast<double>(table[r * depth + k]) * x[v * stride + k];
            ASSERT_NEAR(product[v * rows + r], dot, 1e-4);
          }
          ASSERT_GE(nearest[v], 0);
          ASSERT_LT(nearest[v], rows);
          ASSERT_NEAR(SquaredDistance(&table[nearest[v] * depth], &x[v * stride], depth), least,
                      1e-4)
              << kernels_->name << " depth " << depth << " rows " << rows << " n " << n;
        }
        ASSERT_EQ(product.back(), -7.0f) << "wrote past the end";
      }
    }
  }
}

TEST_P(KernelsTest, EqualRowsGiveTheLowest) {
  std::vector<float> values(2 * vq::kRowBlock, 1.0f);  // two blocks of one number each
  std::vector<float> half_norms(2 * vq::kRowBlock, 0.5f);
  const vq::RowBlocks view{values.data(), half_norms.data(), 2 * vq::kRowBlock, 2, 1};
  const std::vector<float> x(11, 0.3f);
  std::vector<int32_t> nearest(11, -1);
  kernels_->nearest(view, x.data(), 11, 1, nearest.data());
  EXPECT_THAT(nearest, ::testing::Each(0));
  half_norms[0] = half_norms[1] = 9;
  kernels_->nearest(view, x.data(), 11, 1, nearest.data());
  EXPECT_THAT(nearest, ::testing::Each(2));
}

INSTANTIATE_TEST_SUITE_P(All, KernelsTest, ::testing::Values(0, 1, 2));

TEST(VqCodecTest, EveryInstructionSetGivesTheSameCodes) {
  const VqCodebook codebook = RandomCodebook(48, 7, 5, 11);
  const std::vector<float> x = RandomNumbers(48 * 333, 12);
  const vq::Kernels* kernels[3];
  const int count = vq::AvailableKernels(kernels);
  std::vector<std::vector<uint8_t>> codes;
  for (int i = 0; i < count; ++i) {
    const auto codec = VqCodec::Create(codebook, Sha256Of("x"), *kernels[i]).value();
    codes.emplace_back(333 * codec->bytes_per_vector());
    ASSERT_TRUE(codec->Encode(x, codes.back()).ok());
  }
  for (int i = 1; i < count; ++i) EXPECT_EQ(codes[i], codes[0]) << kernels[i]->name;
}

TEST(VqCodecTest, CodesAreTheNearestAndDecodeUndoesTheRotation) {
  for (const int d : {8, 16, 80, 128}) {
    const VqCodebook c = RandomCodebook(d, 6, 4, d);
    const auto codec = VqCodec::Create(c, Sha256Of("x")).value();
    EXPECT_EQ(codec->bytes_per_vector(), 2 + 4);
    const int n = 77, half = d / 2, part = d / 8;
    const std::vector<float> x = RandomNumbers(static_cast<size_t>(n) * d, d + 1);
    std::vector<uint8_t> codes(n * 6);
    ASSERT_TRUE(codec->Encode(x, codes).ok());
    std::vector<float> decoded(x.size());
    ASSERT_TRUE(codec->Decode(codes, decoded).ok());
    for (int v = 0; v < n; ++v) {
      std::vector<float> y(d);
      for (int i = 0; i < d; ++i) {
        double sum = 0;
        for (int k = 0; k < d; ++k)
          sum += static_cast<double>(c.rotation[i * d + k]) * x[v * d + k];
        y[i] = static_cast<float>(sum);
      }
      // The code's fields, by arithmetic of its own.
      const uint32_t coarse = codes[v * 6] | codes[v * 6 + 1] << 8;
      uint64_t fine = 0;
      for (int b = 0; b < 4; ++b) fine |= uint64_t{codes[v * 6 + 2 + b]} << 8 * b;
      ASSERT_EQ(coarse >> 12, 0);
      std::vector<float> z(d);
      for (int m = 0; m < 2; ++m) {
        const float* book = &c.coarse[m * 64 * half];
        const int row = coarse >> 6 * m & 63;
        const double chosen = SquaredDistance(book + row * half, &y[m * half], half);
        for (int r = 0; r < 64; ++r)
          ASSERT_LE(chosen, SquaredDistance(book + r * half, &y[m * half], half) + 1e-4);
        for (int k = 0; k < half; ++k) z[m * half + k] = book[row * half + k];
      }
      for (int m = 0; m < 8; ++m) {
        const float* book = &c.fine[m * 16 * part];
        const int row = fine >> 4 * m & 15;
        std::vector<float> rest(part);
        for (int k = 0; k < part; ++k) rest[k] = y[m * part + k] - z[m * part + k];
        const double chosen = SquaredDistance(book + row * part, rest.data(), part);
        for (int r = 0; r < 16; ++r)
          ASSERT_LE(chosen, SquaredDistance(book + r * part, rest.data(), part) + 1e-4);
        for (int k = 0; k < part; ++k) z[m * part + k] += book[row * part + k];
      }
      for (int k = 0; k < d; ++k) {
        double sum = 0;
        for (int i = 0; i < d; ++i) sum += static_cast<double>(c.rotation[i * d + k]) * z[i];
        ASSERT_NEAR(decoded[v * d + k], sum, 1e-4);
      }
    }
  }
}

TEST(VqCodecTest, StandardCodeHas14Bytes) {
  VqCodebook c;
  c.head_dim = 80;
  c.coarse_bits = 14;
  c.fine_bits = 10;
  EXPECT_EQ(c.code_bytes(), 14);
}

TEST(VqCodecTest, BadInputIsRefusedAndHugeNumbersAreNot) {
  const auto codec = MakeVqCodec(StoredCodebook()).value();
  ASSERT_EQ(codec->head_dim(), 16);
  ASSERT_EQ(codec->bytes_per_vector(), 4);
  std::vector<float> x(48, 0.5f);
  std::vector<uint8_t> codes(12);
  EXPECT_TRUE(codec->Encode(x, codes).ok());
  x[20] = std::nanf("");
  EXPECT_THAT(std::string(codec->Encode(x, codes).message()), HasSubstr("vector 1 has NaN at 4"));
  x.assign(48, std::numeric_limits<float>::max());  // overflows inside; still some code
  EXPECT_TRUE(codec->Encode(x, codes).ok());
  EXPECT_TRUE(codec->Decode(codes, x).ok());
  for (const float value : x) EXPECT_TRUE(std::isfinite(value));
  x.resize(32);
  EXPECT_EQ(codec->Encode(x, codes).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(codec->Decode(codes, x).code(), absl::StatusCode::kInvalidArgument);
}

TEST(VqCodecTest, AnyBytesDecodeToFiniteNumbersOrDataLoss) {
  // 3 + 3 bits of the coarse byte leave two that no encoder sets.
  const auto codec = VqCodec::Create(RandomCodebook(8, 3, 2, 1), Sha256Of("x")).value();
  ASSERT_EQ(codec->bytes_per_vector(), 3);
  std::vector<float> x(8);
  int refused = 0;
  for (int byte = 0; byte < 256; ++byte) {
    const std::vector<uint8_t> code = {static_cast<uint8_t>(byte), 0xA5, 0xFF};
    const absl::Status status = codec->Decode(code, x);
    if (!status.ok()) {
      EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
      ++refused;
    }
    EXPECT_EQ(status.ok(), byte < 64);
  }
  EXPECT_EQ(refused, 192);
}

TEST(MakeCodecTest, MatchesCodebookAndGeometry) {
  const std::string file = StoredCodebook();
  EXPECT_EQ(MakeCodec(CodecId::kVq, 16, file).value()->codebook_hash(), Sha256Of(file));
  EXPECT_EQ(MakeCodec(CodecId::kInt8, 24).value()->bytes_per_vector(), 28);
  const auto refused = [](const absl::StatusOr<std::unique_ptr<Codec>>& codec, const char* what) {
    EXPECT_EQ(codec.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(codec.status().message()), HasSubstr(what));
  };
  refused(MakeCodec(CodecId::kVq, 24, file), "head_dim is 16, the model's is 24");
  refused(MakeCodec(CodecId::kVq, 16), "wants a codebook");
  refused(MakeCodec(CodecId::kF32, 16, file), "no codebook");
  refused(MakeCodec(CodecId::kF32, 0), "head_dim is 0");
}

TEST(CodebookTest, StoredFileReadsAndWritesTheSameBytes) {
  const std::string file = StoredCodebook();
  const VqCodebook c = ParseCodebook(file).value();
  EXPECT_EQ(c.head_dim, 16);
  EXPECT_EQ(c.coarse_bits, 4);
  EXPECT_EQ(c.fine_bits, 3);
  EXPECT_EQ(SerializeCodebook(c).value(), file);
}

TEST(CodebookTest, EveryFlippedBitAndTruncationIsAnError) {
  std::string file = StoredCodebook();
  for (size_t bit = 0; bit < file.size() * 8; ++bit) {
    file[bit / 8] ^= static_cast<char>(1 << bit % 8);
    ASSERT_FALSE(ParseCodebook(file).ok()) << "bit " << bit;
    file[bit / 8] ^= static_cast<char>(1 << bit % 8);
  }
  for (size_t n = 0; n < file.size(); ++n)
    ASSERT_EQ(ParseCodebook(file.substr(0, n)).status().code(), absl::StatusCode::kDataLoss);
  EXPECT_FALSE(ParseCodebook(file + "x").ok());
}

TEST(CodebookTest, ErrorsSayWhich) {
  const std::string file = StoredCodebook();
  const auto refused = [](std::string f, absl::StatusCode code, const char* what) {
    StoreLittleEndian<uint32_t>(f.data() + f.size() - 4,
                                Crc32c(std::string_view(f).substr(0, f.size() - 4)));
    const absl::Status status = ParseCodebook(f).status();
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(what));
  };
  const auto with_u32 = [&](size_t at, uint32_t value) {
    std::string f = file;
    StoreLittleEndian<uint32_t>(f.data() + at, value);
    return f;
  };
  refused(with_u32(0, 1), absl::StatusCode::kDataLoss, "magic");
  refused(with_u32(8, 9), absl::StatusCode::kUnimplemented, "version is 9");
  refused(with_u32(12, 12), absl::StatusCode::kDataLoss, "head_dim is 12");
  refused(with_u32(12, 0xFFFFFFF8), absl::StatusCode::kDataLoss, "head_dim");
  refused(with_u32(16, 17), absl::StatusCode::kDataLoss, "coarse_bits is 17");
  refused(with_u32(20, 0), absl::StatusCode::kDataLoss, "fine_bits is 0");
  refused(with_u32(20, 4), absl::StatusCode::kDataLoss, "length is");
  refused(with_u32(60, 1), absl::StatusCode::kDataLoss, "reserved");
  refused(with_u32(64, 0x7FC00000), absl::StatusCode::kDataLoss, "rotation[0] is nan");
  refused(with_u32(64, 0x40000000), absl::StatusCode::kDataLoss, "not orthonormal");
  refused(with_u32(64 + 4 * 256, 0x7F7FFFFF), absl::StatusCode::kDataLoss, "coarse[0]");
  VqCodebook c = ParseCodebook(file).value();
  c.fine.pop_back();
  EXPECT_EQ(SerializeCodebook(c).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace memory3
