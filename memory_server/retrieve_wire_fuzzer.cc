// Any bytes, cut anywhere, are read as Protobuf reads them, or refused; never a crash.
#include <cstdint>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "memory_server/retrieve_wire.h"

// The first byte says how long the transport's slices are, the rest is the message.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using memory3::v1::RetrieveResponse;
  if (size == 0) return 0;
  const std::string bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  std::vector<grpc::Slice> slices;
  for (size_t at = 0; at < bytes.size(); at += data[0] + 1)
    slices.emplace_back(bytes.substr(at, data[0] + 1));
  grpc::ByteBuffer message(slices.data(), slices.size());

  const auto head = memory3::ParseRetrieveHead(&message);
  std::vector<std::pair<std::string, std::string>> pieces;  // id and offset, bytes
  pieces.reserve(bytes.size());                             // their addresses are given away
  const absl::Status taken = memory3::TakeRetrievePieces(
      &message,
      [&](const memory3::RecordId& id, uint64_t offset, uint64_t) -> absl::StatusOr<std::string*> {
        pieces.emplace_back(id.ToHex() + std::to_string(offset), "");
        return &pieces.back().second;
      });
  RetrieveResponse expected;
  if (!expected.ParseFromString(bytes)) {
    if (head.ok() && taken.ok()) std::abort();
    return 0;
  }
  if (!head.ok() || !taken.ok()) return 0;  // a piece without a proper id, say
  if (static_cast<size_t>(expected.pieces_size()) != pieces.size()) std::abort();
  for (int i = 0; i < expected.pieces_size(); ++i) {
    const auto& piece = expected.pieces(i);
    const auto id = memory3::RecordId::FromBytes(piece.record_id());
    if (!id.ok() || pieces[i].first != id->ToHex() + std::to_string(piece.offset()) ||
        pieces[i].second != piece.data())
      std::abort();
  }
  expected.clear_pieces();
  if (expected.SerializeAsString() != head->SerializeAsString()) std::abort();
  return 0;
}
