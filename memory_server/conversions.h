// Between the store's types (memory_store.h) and the wire's (proto/memory3/v1). What arrives is
// checked here only as far as its form goes (sizes of ids, known enums); the store checks its
// meaning. Both servers link it: it needs neither gRPC nor a database.
//
// Thread-safety: free functions.
// Errors: INVALID_ARGUMENT naming the field.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "memory3/v1/memory.pb.h"
#include "memory_server/memory_store.h"

namespace memory3 {

// Empty: no codec of memory/codec.h (a caller's own error, which depends on who sent it).
std::optional<CodecId> FromProto(v1::Codec codec);

absl::StatusOr<KnowledgeBaseSpec> FromProto(const v1::KnowledgeBaseSpec& proto);
v1::KnowledgeBaseSpec ToProto(const KnowledgeBaseSpec& spec);
v1::KnowledgeBase ToProto(const KnowledgeBaseInfo& info);
v1::Version ToProto(const VersionInfo& info);
v1::Source ToProto(const Source& source);
Source FromProto(const v1::Source& proto);
Filter FromProto(const v1::Filter& proto);
v1::Document ToProto(const DocumentInfo& info);
v1::Load ToProto(const LoadInfo& info);
v1::Snapshot ToProto(const SnapshotInfo& info);

absl::StatusOr<RecordId> RecordIdFromProto(std::string_view bytes, std::string_view field);
// Ids concatenated, 32 bytes each.
absl::StatusOr<std::vector<RecordId>> RecordIdsFromProto(std::string_view bytes,
                                                         std::string_view field);

google::protobuf::Timestamp ToProto(absl::Time time);
google::protobuf::Duration ToProto(absl::Duration duration);
absl::Duration FromProto(const google::protobuf::Duration& duration);

}  // namespace memory3
