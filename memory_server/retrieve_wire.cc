#include "memory_server/retrieve_wire.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <google/protobuf/wire_format_lite.h>

#include <string>
#include <vector>

namespace memory3 {
namespace {

using google::protobuf::internal::WireFormatLite;
using google::protobuf::io::CodedOutputStream;

constexpr uint32_t LengthDelimited(int field) {
  return WireFormatLite::MakeTag(field, WireFormatLite::WIRETYPE_LENGTH_DELIMITED);
}
constexpr uint32_t Varint(int field) {
  return WireFormatLite::MakeTag(field, WireFormatLite::WIRETYPE_VARINT);
}

// All of a RecordPiece and its framing that stands before the data's bytes.
void AppendPieceHead(const WirePiece& piece, std::string& out) {
  using Response = v1::RetrieveResponse;
  using Piece = v1::RetrieveResponse::RecordPiece;
  std::string body;
  {
    google::protobuf::io::StringOutputStream stream(&body);
    CodedOutputStream coded(&stream);
    coded.WriteTag(LengthDelimited(Piece::kRecordIdFieldNumber));
    coded.WriteVarint32(static_cast<uint32_t>(piece.record_id.bytes.size()));
    coded.WriteRaw(piece.record_id.bytes.data(), static_cast<int>(piece.record_id.bytes.size()));
    if (piece.offset != 0) {
      coded.WriteTag(Varint(Piece::kOffsetFieldNumber));
      coded.WriteVarint64(piece.offset);
    }
    coded.WriteTag(LengthDelimited(Piece::kDataFieldNumber));
    coded.WriteVarint32(static_cast<uint32_t>(piece.data.size()));
  }
  google::protobuf::io::StringOutputStream stream(&out);
  CodedOutputStream coded(&stream);
  coded.WriteTag(LengthDelimited(Response::kPiecesFieldNumber));
  coded.WriteVarint32(static_cast<uint32_t>(body.size() + piece.data.size()));
  coded.WriteString(body);
}

grpc::Slice SliceOf(std::string_view data, const std::shared_ptr<const void>& owner) {
  auto* held = new std::shared_ptr<const void>(owner);
  return {const_cast<char*>(data.data()), data.size(),
          [](void* user) { delete static_cast<std::shared_ptr<const void>*>(user); }, held};
}

}  // namespace

grpc::ByteBuffer SerializeRetrieveResponse(const v1::RetrieveResponse& head,
                                           std::span<const WirePiece> pieces) {
  std::vector<grpc::Slice> slices;
  slices.reserve(2 * pieces.size() + 1);
  std::string framing = head.SerializeAsString();
  for (const WirePiece& piece : pieces) {
    AppendPieceHead(piece, framing);
    slices.emplace_back(framing);
    slices.push_back(SliceOf(piece.data, piece.owner));
    framing.clear();
  }
  if (!framing.empty()) slices.emplace_back(framing);
  return {slices.data(), slices.size()};
}

}  // namespace memory3
