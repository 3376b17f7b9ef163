#include "memory_server/retrieve_wire.h"

#include <grpcpp/impl/codegen/proto_utils.h>
#include <gtest/gtest.h>

#include <string>

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

}  // namespace
}  // namespace memory3
