#include "memory_server/retrieve_wire.h"

#include <gmock/gmock.h>
#include <grpcpp/impl/codegen/proto_utils.h>
#include <gtest/gtest.h>

#include <map>
#include <string>
#include <vector>

namespace memory3 {
namespace {

v1::RetrieveResponse Parse(grpc::ByteBuffer buffer) {
  v1::RetrieveResponse message;
  const grpc::Status parsed =
      grpc::GenericDeserialize<grpc::ProtoBufferReader, v1::RetrieveResponse>(&buffer, &message);
  EXPECT_TRUE(parsed.ok()) << parsed.error_message();
  return message;
}

v1::RetrieveResponse Head() {
  v1::RetrieveResponse head;
  head.set_request_id(7);
  head.set_version(3);
  head.set_last(true);
  head.mutable_took()->set_nanos(12345);
  auto* hit = head.add_queries()->add_hits();
  hit->set_score(0.5f);
  hit->add_sources()->set_document_id("d");
  return head;
}

TEST(RetrieveWireTest, ProtobufReadsWhatItWouldHaveWritten) {
  v1::RetrieveResponse expected = Head();
  std::vector<WirePiece> pieces;
  const auto bytes = std::make_shared<std::string>(300'000, 'x');
  for (int i = 0; i < 3; ++i) {
    WirePiece piece;
    piece.record_id.bytes.fill(static_cast<uint8_t>(i));
    piece.offset = uint64_t{1'000'000} * i;
    piece.data = std::string_view(*bytes).substr(0, 100'000 * i);  // the first is empty
    piece.owner = bytes;
    auto* p = expected.add_pieces();
    p->set_record_id(std::string(piece.record_id.view()));
    p->set_offset(piece.offset);
    p->set_data(std::string(piece.data));
    pieces.push_back(piece);
  }
  EXPECT_EQ(Parse(SerializeRetrieveResponse(Head(), pieces)).SerializeAsString(),
            expected.SerializeAsString());
}

TEST(RetrieveWireTest, WithoutPiecesItIsTheHead) {
  EXPECT_EQ(Parse(SerializeRetrieveResponse(Head(), {})).SerializeAsString(),
            Head().SerializeAsString());
  EXPECT_EQ(Parse(SerializeRetrieveResponse({}, {})).ByteSizeLong(), 0);
}

TEST(RetrieveWireTest, TheOwnerIsLetGoWithTheBuffer) {
  auto bytes = std::make_shared<std::string>(1000, 'y');
  const std::weak_ptr<std::string> watch = bytes;
  {
    WirePiece piece;
    piece.data = *bytes;
    piece.owner = bytes;
    const grpc::ByteBuffer buffer = SerializeRetrieveResponse(Head(), {&piece, 1});
    piece.owner.reset();
    bytes.reset();
    EXPECT_FALSE(watch.expired());
  }
  EXPECT_TRUE(watch.expired());
}

// `bytes` as a transport may cut them.
grpc::ByteBuffer CutInto(const std::string& bytes, size_t size) {
  std::vector<grpc::Slice> slices;
  for (size_t at = 0; at < bytes.size(); at += size) slices.emplace_back(bytes.substr(at, size));
  return {slices.data(), slices.size()};
}

absl::Status TakeInto(grpc::ByteBuffer message, std::map<std::string, std::string>* records) {
  return TakeRetrievePieces(
      &message,
      [&](const RecordId& id, uint64_t offset, uint64_t /*size*/) -> absl::StatusOr<std::string*> {
        std::string& record = (*records)[std::string(id.view())];
        if (offset != record.size()) return absl::OutOfRangeError("not the next piece");
        return &record;
      });
}

v1::RetrieveResponse WithPieces() {
  v1::RetrieveResponse message = Head();
  const struct {
    char id;
    uint64_t offset;
    size_t size;
  } kPieces[] = {{'a', 0, 1000}, {'b', 0, 1}, {'a', 1000, 77}, {'c', 0, 0}};
  for (const auto& p : kPieces) {
    auto* piece = message.add_pieces();
    piece->set_record_id(std::string(32, p.id));
    piece->set_offset(p.offset);
    for (size_t i = 0; i < p.size; ++i) piece->mutable_data()->push_back(static_cast<char>(i * 7));
  }
  return message;
}

TEST(RetrieveWireTest, ReadsWhatProtobufWroteHoweverItIsCut) {
  const v1::RetrieveResponse message = WithPieces();
  std::map<std::string, std::string> expected;
  for (const auto& piece : message.pieces()) expected[piece.record_id()] += piece.data();
  for (size_t size : {1, 2, 3, 7, 64, 1001, 100'000}) {
    grpc::ByteBuffer buffer = CutInto(message.SerializeAsString(), size);
    const absl::StatusOr<v1::RetrieveResponse> head = ParseRetrieveHead(&buffer);
    ASSERT_TRUE(head.ok()) << head.status();
    EXPECT_EQ(head->SerializeAsString(), Head().SerializeAsString());
    std::map<std::string, std::string> records;
    EXPECT_EQ(TakeInto(buffer, &records), absl::OkStatus());
    EXPECT_EQ(records, expected);
  }
}

TEST(RetrieveWireTest, RefusesWhatIsCutShort) {
  const std::string bytes = WithPieces().SerializeAsString();
  int refused = 0;
  for (size_t size = 0; size < bytes.size(); ++size) {
    v1::RetrieveResponse unused;
    const bool whole = unused.ParseFromString(bytes.substr(0, size));  // it ended between fields
    grpc::ByteBuffer buffer = CutInto(bytes.substr(0, size), 64);
    std::map<std::string, std::string> records;
    const bool read = ParseRetrieveHead(&buffer).ok() && TakeInto(buffer, &records).ok();
    EXPECT_EQ(read, whole) << size;
    refused += read ? 0 : 1;
  }
  EXPECT_GT(refused, 1000);
}

TEST(RetrieveWireTest, RefusesPiecesThatCannotBePlaced) {
  std::map<std::string, std::string> records;
  v1::RetrieveResponse message;
  auto* piece = message.add_pieces();
  piece->set_record_id("short");
  piece->set_data("data");
  absl::Status status = TakeInto(CutInto(message.SerializeAsString(), 64), &records);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(status.message()), testing::HasSubstr("record id of 5 bytes"));

  piece->set_record_id(std::string(32, 'a'));
  piece->set_offset(3);  // the receiver's own refusal comes through
  status = TakeInto(CutInto(message.SerializeAsString(), 64), &records);
  EXPECT_EQ(status.code(), absl::StatusCode::kOutOfRange);

  // data, then record_id: bytes would be placed before it is known where.
  const std::string body = std::string("\x1a\x01x\x0a\x20", 5) + std::string(32, 'a');
  status =
      TakeInto(CutInto(std::string("\x22") + static_cast<char>(body.size()) + body, 64), &records);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace memory3
