#include "memory_server/put_stream.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "memory_server/conversions.h"
#include "memory_server/retrieve_wire.h"

namespace memory3 {
namespace {

constexpr size_t kBatchBytes = 4 << 20;
constexpr size_t kBatchEntries = 1024;

}  // namespace

std::string PutStream::Name(const v1::Entry& entry) const {
  return absl::StrCat("entry ", taken_, " (document '", entry.source().document_id(), "', ordinal ",
                      entry.source().ordinal(), ")");
}

absl::Status PutStream::Take(v1::PutRequest& message) {
  switch (message.message_case()) {
    case v1::PutRequest::kEntry: {
      if (RecordIncomplete()) {
        return absl::InvalidArgumentError(absl::StrCat(
            Name(batch_.back().message), ": record_piece: ", batch_.back().record.size(), " of ",
            batch_.back().message.record_bytes(), " bytes came"));
      }
      if (batch_bytes_ >= kBatchBytes || batch_.size() >= kBatchEntries) {
        if (absl::Status status = PutBatch(); !status.ok()) return status;
      }
      ++taken_;
      Pending entry;
      entry.message = std::move(*message.mutable_entry());
      const absl::StatusOr<RecordId> id = RecordIdFromProto(entry.message.record_id(), "record_id");
      if (!id.ok()) {
        return absl::InvalidArgumentError(
            absl::StrCat(Name(entry.message), ": ", id.status().message()));
      }
      entry.record_id = *id;
      entry.record = std::move(*entry.message.mutable_record());
      if (!entry.record.empty() && entry.message.record_bytes() != 0 &&
          entry.message.record_bytes() != entry.record.size()) {
        return absl::InvalidArgumentError(absl::StrCat(Name(entry.message), ": record_bytes is ",
                                                       entry.message.record_bytes(),
                                                       " but record has ", entry.record.size()));
      }
      if (entry.message.record_bytes() > kMaxRecordBytes) {
        return absl::ResourceExhaustedError(absl::StrCat(Name(entry.message), ": record_bytes is ",
                                                         entry.message.record_bytes(),
                                                         ", the limit is ", kMaxRecordBytes));
      }
      batch_bytes_ += entry.record.size() + entry.message.ByteSizeLong();
      batch_.push_back(std::move(entry));
      return absl::OkStatus();
    }
    case v1::PutRequest::kRecordPiece: {
      const std::string& piece = message.record_piece();
      if (!RecordIncomplete()) {
        return absl::InvalidArgumentError(
            "record_piece: no entry before it waits for more of its record");
      }
      if (piece.size() > kMaxPieceBytes ||
          piece.size() > batch_.back().message.record_bytes() - batch_.back().record.size()) {
        return absl::InvalidArgumentError(absl::StrCat(
            Name(batch_.back().message), ": record_piece of ", piece.size(), " bytes is too long"));
      }
      batch_.back().record += piece;
      batch_bytes_ += piece.size();
      return absl::OkStatus();
    }
    case v1::PutRequest::kHeader:
      return absl::InvalidArgumentError("header: only the first message is one");
    case v1::PutRequest::MESSAGE_NOT_SET:
      break;
  }
  return absl::InvalidArgumentError("a message holds neither `entry` nor `record_piece`");
}

absl::Status PutStream::Finish() {
  if (RecordIncomplete()) {
    return absl::InvalidArgumentError(absl::StrCat(
        Name(batch_.back().message), ": the stream ended after ", batch_.back().record.size(),
        " of ", batch_.back().message.record_bytes(), " bytes of its record"));
  }
  return PutBatch();
}

absl::Status PutStream::PutBatch() {
  if (batch_.empty()) return absl::OkStatus();
  struct Owned {
    std::vector<Pending> messages;
    std::vector<NewEntry> entries;
  };
  const auto owned = std::make_shared<Owned>();
  owned->messages = std::exchange(batch_, {});
  batch_bytes_ = 0;
  owned->entries.reserve(owned->messages.size());
  for (const Pending& pending : owned->messages) {
    const v1::Entry& message = pending.message;
    owned->entries.push_back(
        {FromProto(message.source()),
         pending.record_id,
         {message.embedding().data(), static_cast<size_t>(message.embedding_size())},
         pending.record});
  }
  return put_(std::shared_ptr<const std::vector<NewEntry>>(owned, &owned->entries));
}

}  // namespace memory3
