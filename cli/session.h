// What every command of `memory3` is given: where the servers are, who asks, and how answers are
// printed.
//
// Thread-safety: the main thread.
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "google/protobuf/message.h"
#include "memory3/v1/inference.grpc.pb.h"
#include "memory_server/client.h"
#include "serving/credentials.h"

namespace memory3 {

struct Session {
  std::string memory_server = "localhost:7070";
  std::string inference_server = "localhost:7071";
  std::string api_key;
  ClientTls tls;
  bool json = false;
  int timeout_seconds = 30;  // of a call that answers once

  // Connect lazily. INVALID_ARGUMENT names a TLS file.
  absl::StatusOr<std::unique_ptr<MemoryClient>> OpenMemory() const;
  absl::StatusOr<std::unique_ptr<v1::InferenceService::Stub>> OpenInference() const;
  // Carries the key; `seconds` 0: no deadline.
  std::unique_ptr<grpc::ClientContext> NewContext(int seconds = 0) const;
};

// A message in proto3's JSON mapping, fields named as in the proto.
std::string ToJson(const google::protobuf::Message& message);
// The same as one line of output.
void PrintJson(const google::protobuf::Message& message);

// A failure with this payload has been told already: by a server that shares our output.
inline constexpr const char kToldAlready[] = "memory3/told-already";

// The exit code that stands for `status`: 0 OK, 1 any other failure, 3 not found, 4 a server cannot
// be reached or has no room, 5 not allowed (2 is a wrong command line, 130 an interrupt).
int ExitCode(const absl::Status& status);

}  // namespace memory3
