#include "serving/grpc_server.h"

#include <grpc/support/log.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/server_builder.h>

#include "absl/strings/str_cat.h"
#include "serving/credentials.h"

namespace memory3 {
namespace {

// A client that vanished without a word is noticed within these.
constexpr int kKeepaliveMs = 20'000;
constexpr int kKeepaliveTimeoutMs = 10'000;

}  // namespace

absl::StatusOr<GrpcServer> StartGrpcServer(const ServingOptions& options, grpc::Service* service) {
  if (absl::Status status = CheckServingOptions(options); !status.ok()) return status;
  const absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> credentials =
      MakeServerCredentials(options);
  if (!credentials.ok()) return credentials.status();
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  GrpcServer result;
  builder.AddListeningPort(options.listen, *credentials, &result.port);
  builder.RegisterService(service);
  builder.SetMaxReceiveMessageSize(options.max_message_mb << 20);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, options.max_concurrent_streams);
  // A taken port is an error, not a shared one.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  // Of an address that cannot be had gRPC logs a line of its own insides; ours says it once.
  gpr_set_log_function([](gpr_log_func_args*) {});
  result.server = builder.BuildAndStart();
  gpr_set_log_function(nullptr);
  if (result.server == nullptr || result.port == 0) {
    return absl::UnavailableError(
        absl::StrCat("--listen ", options.listen, ": cannot listen there; is it taken?"));
  }
  return result;
}

}  // namespace memory3
