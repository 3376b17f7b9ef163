#include "cli/session.h"

#include <google/protobuf/util/json_util.h>
#include <grpcpp/client_context.h>
#include <grpcpp/create_channel.h>

#include <chrono>
#include <cstdio>

namespace memory3 {

absl::StatusOr<std::unique_ptr<MemoryClient>> Session::OpenMemory() const {
  return MemoryClient::Create({.target = memory_server,
                               .api_key = api_key,
                               .tls = tls,
                               .timeout = absl::Seconds(timeout_seconds)});
}

absl::StatusOr<std::unique_ptr<v1::InferenceService::Stub>> Session::OpenInference() const {
  absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> credentials =
      MakeChannelCredentials(tls);
  if (!credentials.ok()) return credentials.status();
  return v1::InferenceService::NewStub(grpc::CreateChannel(inference_server, *credentials));
}

std::unique_ptr<grpc::ClientContext> Session::NewContext(int seconds) const {
  auto context = std::make_unique<grpc::ClientContext>();
  if (!api_key.empty()) context->AddMetadata("authorization", "Bearer " + api_key);
  if (seconds > 0)
    context->set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(seconds));
  return context;
}

std::string ToJson(const google::protobuf::Message& message) {
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  options.always_print_primitive_fields = true;
  std::string json;
  // Fails only for messages with Any of unknown types, which no message of ours has.
  (void)google::protobuf::util::MessageToJsonString(message, &json, options);
  return json;
}

void PrintJson(const google::protobuf::Message& message) { std::puts(ToJson(message).c_str()); }

int ExitCode(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return 0;
    case absl::StatusCode::kNotFound:
      return 3;
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kResourceExhausted:
      return 4;
    case absl::StatusCode::kUnauthenticated:
    case absl::StatusCode::kPermissionDenied:
      return 5;
    case absl::StatusCode::kCancelled:
      return 130;
    default:
      return 1;
  }
}

}  // namespace memory3
