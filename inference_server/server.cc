#include "inference_server/server.h"

#include <grpcpp/health_check_service_interface.h>

#include <chrono>
#include <utility>

#include "serving/grpc_server.h"

namespace memory3 {
namespace {

constexpr absl::Duration kLastAnswers = absl::Seconds(2);

}  // namespace

absl::StatusOr<std::unique_ptr<InferenceServer>> InferenceServer::Start(
    Inference* inference, const ServingOptions& serving, const InferenceServiceOptions& options) {
  std::unique_ptr<InferenceServer> server(new InferenceServer(inference, serving));
  if (absl::Status status = server->ReloadApiKeys(); !status.ok()) return status;

  server->service_ = std::make_unique<InferenceServiceImpl>(inference, options);
  absl::StatusOr<GrpcServer> started = StartGrpcServer(serving, server->service_.get());
  if (!started.ok()) return started.status();
  server->server_ = std::move(started->server);
  server->port_ = started->port;
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
