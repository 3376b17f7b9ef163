#include "inference_server/server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/server_builder.h>

#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "serving/credentials.h"

namespace memory3 {
namespace {

// A client that vanished without a word is noticed within these.
constexpr int kKeepaliveMs = 20'000;
constexpr int kKeepaliveTimeoutMs = 10'000;
constexpr absl::Duration kLastAnswers = absl::Seconds(2);

}  // namespace

absl::StatusOr<std::unique_ptr<InferenceServer>> InferenceServer::Start(
    Inference* inference, const ServingOptions& serving, const InferenceServiceOptions& options) {
  if (absl::Status status = CheckServingOptions(serving); !status.ok()) return status;
  const absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> credentials =
      MakeServerCredentials(serving);
  if (!credentials.ok()) return credentials.status();
  std::unique_ptr<InferenceServer> server(new InferenceServer(inference, serving));
  if (absl::Status status = server->ReloadApiKeys(); !status.ok()) return status;

  server->service_ = std::make_unique<InferenceServiceImpl>(inference, options);
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  builder.AddListeningPort(serving.listen, *credentials, &server->port_);
  builder.RegisterService(server->service_.get());
  builder.SetMaxReceiveMessageSize(serving.max_message_mb << 20);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, serving.max_concurrent_streams);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT,
                             0);  // a taken port is an error, not a shared one
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  server->server_ = builder.BuildAndStart();
  if (server->server_ == nullptr || server->port_ == 0) {
    return absl::UnavailableError(
        absl::StrCat("--listen ", serving.listen, ": cannot listen there; is it taken?"));
  }
  server->SetHealth(false);
  if (!serving.metrics_listen.empty()) {
    absl::StatusOr<std::unique_ptr<MetricsPage>> page = MetricsPage::Start(
        serving.metrics_listen, [inference] { return inference->MetricsText(); });
    if (!page.ok()) return page.status();
    server->metrics_page_ = *std::move(page);
  }
  return server;
}

InferenceServer::~InferenceServer() { Shutdown(absl::ZeroDuration()); }

void InferenceServer::SetHealth(bool serves) {
  grpc::HealthCheckServiceInterface* health = server_->GetHealthCheckService();
  health->SetServingStatus(serves);
  health->SetServingStatus(kInferenceServiceName, serves);
}

void InferenceServer::SetReady() { SetHealth(true); }

absl::Status InferenceServer::ReloadApiKeys() {
  if (serving_.api_keys.empty()) return absl::OkStatus();
  absl::StatusOr<ApiKeys> keys = ApiKeys::Load(serving_.api_keys);
  if (!keys.ok()) return keys.status();
  inference_->SetApiKeys(*std::move(keys));
  return absl::OkStatus();
}

void InferenceServer::Shutdown(absl::Duration drain) {
  if (server_ == nullptr) return;
  SetHealth(false);
  inference_->Drain(drain);
  // Time for the last answers to leave. (gRPC's own Shutdown would spend it waiting for idle
  // clients to close their connections.)
  service_->AwaitNoCalls(kLastAnswers);
  server_->Shutdown(std::chrono::system_clock::now());
  server_->Wait();
  server_ = nullptr;
  service_ = nullptr;
}

}  // namespace memory3
