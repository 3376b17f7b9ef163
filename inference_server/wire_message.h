// Messages as they come off the wire, parsed so that a client is told what is wrong with them:
// gRPC itself answers INTERNAL for a string that is no UTF-8.
//
// Thread-safety: functions.
#pragma once

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>
#include <grpcpp/support/byte_buffer.h>

#include <optional>
#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace memory3 {

// INVALID_ARGUMENT names the field whose text is no UTF-8, or says that the bytes are no message of
// this type.
absl::Status ParseMessage(std::string_view bytes, google::protobuf::Message* message);
absl::Status ParseMessage(const grpc::ByteBuffer& buffer, google::protobuf::Message* message);

// The first string field that is no UTF-8, by path ("stopping.stop[1]", "prompt.text"; a oneof's
// name comes before its field's). Nothing: there is none, or the bytes end or break before it.
std::optional<std::string> FindBrokenText(std::string_view bytes,
                                          const google::protobuf::Descriptor& type);

grpc::ByteBuffer SerializeMessage(const google::protobuf::Message& message);

}  // namespace memory3
