#include "memory_server/retrieve_wire.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <google/protobuf/wire_format_lite.h>
#include <grpcpp/support/proto_buffer_reader.h>

#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"

namespace memory3 {
namespace {

using google::protobuf::internal::WireFormatLite;
using google::protobuf::io::CodedInputStream;
using google::protobuf::io::CodedOutputStream;
using Response = v1::RetrieveResponse;
using Piece = v1::RetrieveResponse::RecordPiece;

constexpr uint32_t LengthDelimited(int field) {
  return WireFormatLite::MakeTag(field, WireFormatLite::WIRETYPE_LENGTH_DELIMITED);
}
constexpr uint32_t Varint(int field) {
  return WireFormatLite::MakeTag(field, WireFormatLite::WIRETYPE_VARINT);
}

// All of a RecordPiece and its framing that stands before the data's bytes.
void AppendPieceHead(const WirePiece& piece, std::string& out) {
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

constexpr uint32_t kPiecesTag = LengthDelimited(Response::kPiecesFieldNumber);

absl::Status NoResponse() { return absl::DataLossError("the message is no RetrieveResponse"); }

// `size` bytes of the stream, part by part as the transport cut them.
bool Append(CodedInputStream& in, uint64_t size, std::string& out) {
  while (size > 0) {
    const void* data = nullptr;
    int available = 0;
    if (!in.GetDirectBufferPointer(&data, &available)) return false;
    const auto take = static_cast<int>(std::min<uint64_t>(size, available));
    out.append(static_cast<const char*>(data), take);
    if (!in.Skip(take)) return false;
    size -= take;
  }
  return true;
}

// A piece up to the stream's limit: id, offset, data.
absl::Status TakePiece(CodedInputStream& in, PlaceOfPiece place) {
  std::string id_bytes;
  uint64_t offset = 0;
  bool placed = false;
  const auto put = [&](uint64_t size) -> absl::Status {
    placed = true;
    const absl::StatusOr<RecordId> id = RecordId::FromBytes(id_bytes);
    if (!id.ok()) {
      return absl::DataLossError(
          absl::StrCat("a piece has a record id of ", id_bytes.size(), " bytes"));
    }
    const absl::StatusOr<std::string*> out = place(*id, offset, size);
    if (!out.ok()) return out.status();
    return Append(in, size, **out) ? absl::OkStatus() : NoResponse();
  };
  while (in.BytesUntilLimit() > 0) {
    const uint32_t tag = in.ReadTag();
    if (tag == 0) return NoResponse();
    const int field = WireFormatLite::GetTagFieldNumber(tag);
    if (placed && field <= Piece::kDataFieldNumber) {
      return absl::DataLossError("a piece's fields are not in order");
    }
    if (tag == LengthDelimited(Piece::kRecordIdFieldNumber)) {
      if (!WireFormatLite::ReadBytes(&in, &id_bytes)) return NoResponse();
    } else if (tag == Varint(Piece::kOffsetFieldNumber)) {
      if (!in.ReadVarint64(&offset)) return NoResponse();
    } else if (tag == LengthDelimited(Piece::kDataFieldNumber)) {
      uint32_t size = 0;
      if (!in.ReadVarint32(&size) || size > static_cast<uint32_t>(in.BytesUntilLimit()))
        return NoResponse();
      if (absl::Status status = put(size); !status.ok()) return status;
    } else if (!WireFormatLite::SkipField(&in, tag)) {
      return NoResponse();
    }
  }
  return placed ? absl::OkStatus() : put(0);
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

absl::StatusOr<Response> ParseRetrieveHead(grpc::ByteBuffer* message) {
  std::string head;
  {
    grpc::ProtoBufferReader slices(message);
    CodedInputStream in(&slices);
    google::protobuf::io::StringOutputStream out(&head);
    CodedOutputStream coded(&out);
    while (const uint32_t tag = in.ReadTag()) {
      const bool read = tag == kPiecesTag ? WireFormatLite::SkipField(&in, tag)
                                          : WireFormatLite::SkipField(&in, tag, &coded);
      if (!read) return NoResponse();
    }
    if (!slices.status().ok() || !in.ConsumedEntireMessage()) return NoResponse();
  }
  Response response;
  if (!response.ParseFromString(head)) return NoResponse();
  return response;
}

absl::Status TakeRetrievePieces(grpc::ByteBuffer* message, PlaceOfPiece place) {
  grpc::ProtoBufferReader slices(message);
  CodedInputStream in(&slices);
  while (const uint32_t tag = in.ReadTag()) {
    if (tag != kPiecesTag) {
      if (!WireFormatLite::SkipField(&in, tag)) return NoResponse();
      continue;
    }
    uint32_t size = 0;
    if (!in.ReadVarint32(&size) || size > INT32_MAX) return NoResponse();
    const CodedInputStream::Limit limit = in.PushLimit(static_cast<int>(size));
    if (absl::Status status = TakePiece(in, place); !status.ok()) return status;
    in.PopLimit(limit);
  }
  return in.ConsumedEntireMessage() ? absl::OkStatus() : NoResponse();
}

}  // namespace memory3
