// RetrieveResponse on the wire without copying records. The sender's head is serialised by
// Protobuf, its pieces are gRPC slices that point into the store's pinned memory and let go of it
// once sent. The receiver's head is parsed by Protobuf, the pieces' bytes are copied once, from
// what the transport received to where the caller wants them.
//
// Thread-safety: free functions; the owner of a piece is released on any gRPC thread.
#pragma once

#include <grpcpp/support/byte_buffer.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "memory/record.h"
#include "memory3/v1/memory.pb.h"

namespace memory3 {

inline constexpr int64_t kMaxPieceBytes = int64_t{1} << 20;

// Part of a record: data lives at least as long as `owner`.
struct WirePiece {
  RecordId record_id;
  uint64_t offset = 0;
  std::string_view data;  // at most kMaxPieceBytes
  std::shared_ptr<const void> owner;
};

// `head` with `pieces` appended to RetrieveResponse.pieces, as one message. `head.pieces` is empty.
grpc::ByteBuffer SerializeRetrieveResponse(const v1::RetrieveResponse& head,
                                           std::span<const WirePiece> pieces);

// All of a message but its pieces, which stay in `message`. DATA_LOSS: it is no RetrieveResponse.
absl::StatusOr<v1::RetrieveResponse> ParseRetrieveHead(grpc::ByteBuffer* message);

// The message's pieces, in order. `place` is told each one's record, offset and size, and answers
// the string onto which its bytes are to be appended; an error of its ends the reading. DATA_LOSS:
// the message is no RetrieveResponse, or its fields are in no order that a Protobuf writer uses.
using PlaceOfPiece =
    absl::FunctionRef<absl::StatusOr<std::string*>(const RecordId&, uint64_t, uint64_t)>;
absl::Status TakeRetrievePieces(grpc::ByteBuffer* message, PlaceOfPiece place);

}  // namespace memory3
