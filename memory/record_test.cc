#include "memory/record.h"

#include <cmath>
#include <fstream>
#include <set>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "memory/little_endian.h"
#include "nlohmann/json.hpp"

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

// The memory of the stored records; the formula is tests/goldens/records.py's.
ExplicitMemory GoldenMemory() {
  ExplicitMemory memory;
  memory.shape = {.layers = 2, .kv_heads = 2, .tokens = 3, .head_dim = 16};
  memory.reference_tokens = 5;
  for (int64_t i = 0; i < memory.shape.values(); ++i)
    memory.values.push_back(static_cast<float>((i * 7919) % 1009 - 504) / 256);
  return memory;
}

const Hash256 kWriter = Sha256Of("golden writer");

std::string Reseal(std::string record) {  // after a change, both CRCs
  StoreLittleEndian<uint32_t>(record.data() + 120, Crc32c(RecordPayload(record)));
  StoreLittleEndian<uint32_t>(record.data() + 124, Crc32c(std::string_view(record).substr(0, 124)));
  return record;
}

void ExpectRefused(std::string_view record, absl::StatusCode code, const std::string& what) {
  const absl::StatusOr<RecordHeader> header = CheckRecord(record);
  EXPECT_EQ(header.status().code(), code) << header.status();
  EXPECT_THAT(std::string(header.status().message()), HasSubstr(what));
}

class StoredRecordTest : public ::testing::TestWithParam<CodecId> {
 protected:
  std::unique_ptr<Codec> MakeCodec() const {
    switch (GetParam()) {
      case CodecId::kF32:
        return MakeF32Codec(16);
      case CodecId::kBF16:
        return MakeBF16Codec(16);
      case CodecId::kInt8:
        return MakeInt8Codec(16);
      case CodecId::kVq:
        return MakeVqCodec(ReadFile("memory/testdata/codebook_v1.m3cb")).value();
    }
    return nullptr;
  }
  std::string Stored() const {
    return ReadFile(
        absl::StrCat("memory/testdata/record_v1_", std::string(CodecName(GetParam())), ".m3rec"));
  }
};

TEST_P(StoredRecordTest, ReadsAndWritesTheSameBytes) {
  const auto codec = MakeCodec();
  const std::string stored = Stored();
  const ExplicitMemory golden = GoldenMemory();
  EXPECT_EQ(EncodeRecord(golden, kWriter, *codec).value(), stored);

  const RecordHeader header = CheckRecord(stored).value();
  EXPECT_EQ(header.version, 1);
  EXPECT_EQ(header.codec, GetParam());
  EXPECT_EQ(header.shape, golden.shape);
  EXPECT_EQ(header.reference_tokens, 5);
  EXPECT_EQ(header.writer_fingerprint, kWriter);
  EXPECT_EQ(header.codebook_hash, codec->codebook_hash());
  EXPECT_EQ(header.payload_bytes + kRecordHeaderBytes, stored.size());

  const ExplicitMemory memory = DecodeRecord(stored, kWriter, *codec).value();
  EXPECT_EQ(memory.shape, golden.shape);
  EXPECT_EQ(memory.reference_tokens, 5);
  ASSERT_EQ(memory.values.size(), golden.values.size());
  // The codebook of the tests is not trained: its memory is close only to the numbers' own size.
  const double tolerance = GetParam() == CodecId::kF32 ? 0 : GetParam() == CodecId::kVq ? 4 : 0.008;
  for (size_t i = 0; i < memory.values.size(); ++i)
    ASSERT_NEAR(memory.values[i], golden.values[i], tolerance);
  if (GetParam() != CodecId::kVq) {  // whose decoded vector may lie nearer another coarse centroid
    EXPECT_EQ(EncodeRecord(memory, kWriter, *codec).value(), stored);
  }

  std::vector<float> place(golden.values.size());
  EXPECT_EQ(DecodeRecordInto(stored, kWriter, *codec, place).value().shape, golden.shape);
  EXPECT_EQ(place, memory.values);
}

TEST_P(StoredRecordTest, EveryFlippedBitIsAnError) {
  std::string record = Stored();
  for (size_t bit = 0; bit < record.size() * 8; ++bit) {
    record[bit / 8] ^= static_cast<char>(1 << bit % 8);
    ASSERT_FALSE(CheckRecord(record).ok()) << "byte " << bit / 8 << " bit " << bit % 8;
    record[bit / 8] ^= static_cast<char>(1 << bit % 8);
  }
  EXPECT_TRUE(CheckRecord(record).ok());
}

TEST_P(StoredRecordTest, EveryTruncationAndAnyExtraByteIsAnError) {
  const std::string record = Stored();
  for (size_t n = 0; n < record.size(); ++n)
    ASSERT_EQ(CheckRecord(record.substr(0, n)).status().code(), absl::StatusCode::kDataLoss) << n;
  ExpectRefused(record + '\0', absl::StatusCode::kDataLoss, "length");
}

INSTANTIATE_TEST_SUITE_P(Codecs, StoredRecordTest,
                         ::testing::Values(CodecId::kF32, CodecId::kBF16, CodecId::kInt8,
                                           CodecId::kVq),
                         [](const auto& info) { return std::string(CodecName(info.param)); });

class RecordTest : public ::testing::Test {
 protected:
  std::unique_ptr<Codec> codec_ = MakeF32Codec(16);
  std::string record_ = EncodeRecord(GoldenMemory(), kWriter, *codec_).value();
};

TEST_F(RecordTest, ErrorsSayWhich) {
  std::string r = record_;
  r[0] = 'X';
  ExpectRefused(Reseal(r), absl::StatusCode::kDataLoss, "magic");
  ExpectRefused("m3recor", absl::StatusCode::kDataLoss, "length is 7");
  ExpectRefused("", absl::StatusCode::kDataLoss, "length is 0");
  ExpectRefused(record_.substr(0, 100), absl::StatusCode::kDataLoss, "length is 100");
  r = record_;
  r[8] = 2;
  ExpectRefused(Reseal(r), absl::StatusCode::kUnimplemented, "version is 2");
  r = record_;
  r[20] ^= 1;
  ExpectRefused(r, absl::StatusCode::kDataLoss, "CRC of the header");
  r = record_;
  r.back() ^= 1;
  ExpectRefused(r, absl::StatusCode::kDataLoss, "CRC of the payload");
  ExpectRefused(record_.substr(0, record_.size() - 1), absl::StatusCode::kDataLoss, "length is");
}

TEST_F(RecordTest, WellSealedNonsenseIsRefused) {
  const auto with_u32 = [&](size_t at, uint32_t value) {
    std::string r = record_;
    StoreLittleEndian<uint32_t>(r.data() + at, value);
    return Reseal(r);
  };
  const struct {
    size_t at;
    const char* name;
  } extents[] = {{16, "layers"}, {20, "kv_heads"}, {24, "tokens"}, {28, "head_dim"}};
  for (const auto& extent : extents) {
    for (const uint32_t value : {0u, 0x10001u, 0x7FFFFFFFu, 0x80000000u, 0xFFFFFFFFu})
      ExpectRefused(with_u32(extent.at, value), absl::StatusCode::kDataLoss, extent.name);
  }
  ExpectRefused(with_u32(32, 2), absl::StatusCode::kDataLoss, "reference_tokens is 2");
  ExpectRefused(with_u32(32, 0xFFFFFFFF), absl::StatusCode::kDataLoss, "reference_tokens");
  ExpectRefused(with_u32(36, 1), absl::StatusCode::kDataLoss, "reserved");
  ExpectRefused(with_u32(112, 1), absl::StatusCode::kDataLoss, "reserved");
  ExpectRefused(with_u32(116, 1), absl::StatusCode::kDataLoss, "reserved");
  ExpectRefused(with_u32(104, 8), absl::StatusCode::kDataLoss, "payload length 8");
  ExpectRefused(with_u32(108, 0x80000000), absl::StatusCode::kDataLoss, "payload length");
  for (const uint8_t codec : {0, 5, 255}) {
    std::string r = record_;
    r[12] = static_cast<char>(codec);
    ExpectRefused(Reseal(r), absl::StatusCode::kDataLoss, "codec " + std::to_string(codec));
  }
  std::string r = record_;
  r[13] = 1;
  ExpectRefused(Reseal(r), absl::StatusCode::kUnimplemented, "codebook scope 1");
  r = record_;
  r[72] = 1;  // f32 has no codebook
  ExpectRefused(Reseal(r), absl::StatusCode::kDataLoss, "codebook hash");
  r = record_;
  r[12] = 4;  // vq has one
  ExpectRefused(Reseal(r), absl::StatusCode::kDataLoss, "without a codebook hash");
}

TEST_F(RecordTest, AGeometryWhoseProductOverflowsIsRefused) {
  std::string r = record_;
  for (const size_t at : {16, 20, 24, 28}) StoreLittleEndian<uint32_t>(r.data() + at, 0x10000);
  StoreLittleEndian<uint32_t>(r.data() + 32, 0x10000);
  ExpectRefused(Reseal(r), absl::StatusCode::kDataLoss, "more than");
}

TEST_F(RecordTest, AnotherWriterCodecOrHeadDimIsFailedPrecondition) {
  const auto refused = [&](const Hash256& writer, const Codec& codec, const std::string& what) {
    const absl::Status status = DecodeRecord(record_, writer, codec).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(what));
  };
  refused(Sha256Of("another"), *codec_, "fingerprint");
  refused(kWriter, *MakeBF16Codec(16), "codec is f32, expected bf16");
  refused(kWriter, *MakeF32Codec(8), "head_dim");
  std::vector<float> small(3);
  EXPECT_EQ(DecodeRecordInto(record_, kWriter, *codec_, small).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(RecordTest, EncodeRefusesBadMemories) {
  const auto refused = [&](const ExplicitMemory& memory, const std::string& what) {
    const absl::Status status = EncodeRecord(memory, kWriter, *codec_).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(what));
  };
  ExplicitMemory memory = GoldenMemory();
  memory.values[17] = std::nanf("");
  refused(memory, "vector 1 has NaN at 1");
  memory = GoldenMemory();
  memory.values.pop_back();
  refused(memory, "its shape wants 384");
  memory = GoldenMemory();
  memory.reference_tokens = 2;
  refused(memory, "reference_tokens");
  memory = GoldenMemory();
  memory.shape.layers = -2;
  memory.shape.kv_heads = -2;
  refused(memory, "layers is -2");
  memory = GoldenMemory();
  memory.shape = {.layers = 65536, .kv_heads = 65536, .tokens = 65536, .head_dim = 65536};
  memory.reference_tokens = 65536;
  refused(memory, "more than");
  memory = GoldenMemory();
  memory.shape.head_dim = 8;
  memory.shape.layers = 4;
  refused(memory, "the codec's is 16");
}

TEST_F(RecordTest, TheLargestRecordRoundTrips) {  // dense mode of a 7 B model in f32
  ExplicitMemory memory;
  memory.shape = {.layers = 32, .kv_heads = 32, .tokens = 128, .head_dim = 128};
  memory.reference_tokens = 128;
  ASSERT_EQ(memory.shape.values(), kMaxRecordValues);
  memory.values.resize(kMaxRecordValues, 0.25f);
  memory.values.back() = -3;
  const auto codec = MakeF32Codec(128);
  const std::string record = EncodeRecord(memory, kWriter, *codec).value();
  EXPECT_EQ(record.size(), kMaxRecordBytes);
  EXPECT_EQ(DecodeRecord(record, kWriter, *codec).value().values, memory.values);
  memory.shape.tokens = 129;
  memory.reference_tokens = 129;
  memory.values.resize(memory.shape.values());
  EXPECT_THAT(std::string(EncodeRecord(memory, kWriter, *codec).status().message()),
              HasSubstr("more than"));
}

TEST(RecordIdTest, AgreesWithTheVectorsOfHashlib) {
  const auto cases = nlohmann::json::parse(ReadFile("memory/testdata/record_id.json"));
  ASSERT_GE(cases.size(), 10);
  std::set<std::string> ids;
  for (const auto& c : cases) {
    const RecordId id =
        ComputeRecordId(c.at("tenant").get<std::string>(),
                        Hash256::FromHex(c.at("writer_fingerprint").get<std::string>()).value(),
                        ParseCodecId(c.at("codec").get<std::string>()).value(),
                        Hash256::FromHex(c.at("codebook_hash").get<std::string>()).value(),
                        c.at("token_ids").get<std::vector<int32_t>>());
    EXPECT_EQ(id.ToHex(), c.at("record_id").get<std::string>()) << c;
    EXPECT_TRUE(ids.insert(id.ToHex()).second) << "two cases share an id: " << c;
  }
}

}  // namespace
}  // namespace memory3
