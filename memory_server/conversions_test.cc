#include "memory_server/conversions.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace memory3 {
namespace {

using ::testing::HasSubstr;

Hash256 Filled(uint8_t byte) {
  Hash256 hash;
  hash.bytes.fill(byte);
  return hash;
}

KnowledgeBaseSpec FullSpec() {
  KnowledgeBaseSpec spec;
  spec.name = "wiki";
  spec.writer_fingerprint = Filled(1);
  spec.geometry = {{3, 5, 8}, 4, 64, 8, 128};
  spec.codec = CodecId::kVq;
  spec.codebook = std::string("code\0book", 9);
  spec.embedder_fingerprint = Filled(2);
  spec.embedding_dimension = 384;
  spec.metric = Metric::kInnerProduct;
  spec.description = "all of it";
  return spec;
}

TEST(ConversionsTest, SpecsComeBackTheSame) {
  const KnowledgeBaseSpec spec = FullSpec();
  const absl::StatusOr<KnowledgeBaseSpec> back = FromProto(ToProto(spec));
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(*back, spec);
  for (const CodecId codec : {CodecId::kF32, CodecId::kBF16, CodecId::kInt8, CodecId::kVq}) {
    KnowledgeBaseSpec other = spec;
    other.codec = codec;
    EXPECT_EQ(FromProto(ToProto(other))->codec, codec);
  }
}

TEST(ConversionsTest, AnUnsetMetricIsCosine) {
  v1::KnowledgeBaseSpec proto = ToProto(FullSpec());
  proto.clear_metric();
  EXPECT_EQ(FromProto(proto)->metric, Metric::kCosine);
}

TEST(ConversionsTest, BadSpecsNameTheField) {
  const auto expect = [](const v1::KnowledgeBaseSpec& proto, const char* field) {
    const absl::Status status = FromProto(proto).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << field;
    EXPECT_THAT(std::string(status.message()), HasSubstr(field));
  };
  v1::KnowledgeBaseSpec proto = ToProto(FullSpec());
  proto.set_writer_fingerprint("short");
  expect(proto, "writer_fingerprint");
  proto = ToProto(FullSpec());
  proto.set_embedder_fingerprint(std::string(33, 'x'));
  expect(proto, "embedder_fingerprint");
  proto = ToProto(FullSpec());
  proto.set_codec(static_cast<v1::Codec>(99));
  expect(proto, "codec");
  proto = ToProto(FullSpec());
  proto.set_metric(static_cast<v1::Metric>(99));
  expect(proto, "metric");
}

TEST(ConversionsTest, SourcesComeBackTheSame) {
  Source source;
  source.document_id = "d";
  source.ordinal = 7;
  source.title = "T";
  source.uri = "https://example.org";
  source.char_begin = uint64_t{5} << 33;
  source.char_end = (uint64_t{5} << 33) + 9;
  source.text = "text";
  source.metadata = {{"lang", "en"}, {"year", "2024"}};
  EXPECT_EQ(FromProto(ToProto(source)), source);
}

TEST(ConversionsTest, LoadsSayWhatTheyAre) {
  LoadInfo load;
  load.load_id = "l";
  load.knowledge_base = "kb";
  load.idempotency_key = "key";
  load.mode = LoadMode::kReplace;
  load.state = LoadState::kFailed;
  load.entries = 3;
  load.bytes = 4;
  load.failure = "why";
  load.begun_at = absl::FromUnixSeconds(100);
  load.ended_at = absl::InfiniteFuture();
  v1::Load proto = ToProto(load);
  EXPECT_EQ(proto.mode(), v1::LOAD_MODE_REPLACE);
  EXPECT_EQ(proto.state(), v1::LOAD_STATE_FAILED);
  EXPECT_EQ(proto.failure(), "why");
  EXPECT_EQ(proto.begun_at().seconds(), 100);
  EXPECT_FALSE(proto.has_ended_at());  // it runs
  EXPECT_FALSE(proto.has_expected_entries());
  EXPECT_FALSE(proto.has_time_left());
  load.expected_entries = 0;
  load.time_left = absl::Milliseconds(1500);
  proto = ToProto(load);
  EXPECT_TRUE(proto.has_expected_entries());
  EXPECT_EQ(FromProto(proto.time_left()), absl::Milliseconds(1500));
}

TEST(ConversionsTest, DurationsComeBackTheSame) {
  for (const absl::Duration d : {absl::ZeroDuration(), absl::Nanoseconds(1), absl::Seconds(90),
                                 absl::Milliseconds(1999), -absl::Milliseconds(1500)}) {
    EXPECT_EQ(FromProto(ToProto(d)), d) << d;
  }
}

TEST(ConversionsTest, RecordIdsAre32BytesEach) {
  EXPECT_EQ(*RecordIdFromProto(std::string(32, 'a'), "record_id"), Filled('a'));
  const absl::StatusOr<std::vector<RecordId>> ids =
      RecordIdsFromProto(std::string(32, 'a') + std::string(32, 'b'), "evicted");
  ASSERT_TRUE(ids.ok());
  EXPECT_EQ(*ids, (std::vector<RecordId>{Filled('a'), Filled('b')}));
  EXPECT_TRUE(RecordIdsFromProto("", "evicted")->empty());
  EXPECT_THAT(std::string(RecordIdFromProto("x", "record_id").status().message()),
              HasSubstr("record_id"));
  EXPECT_THAT(std::string(RecordIdsFromProto(std::string(33, 'a'), "evicted").status().message()),
              HasSubstr("evicted"));
}

}  // namespace
}  // namespace memory3
