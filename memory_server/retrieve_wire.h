// RetrieveResponse on the wire without copying records: the message's head is serialised by
// Protobuf, the pieces are gRPC slices that point into the store's pinned memory and let go of it
// once sent.
//
// Thread-safety: free functions; the owner of a piece is released on any gRPC thread.
#pragma once

#include <grpcpp/support/byte_buffer.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

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

}  // namespace memory3
