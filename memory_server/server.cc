#include "memory_server/server.h"

#include <grpcpp/health_check_service_interface.h>
#include <spdlog/spdlog.h>

#include <chrono>
#include <utility>

#include "serving/grpc_server.h"

namespace memory3 {
namespace {

constexpr absl::Duration kHealthInterval = absl::Milliseconds(250);

}  // namespace

absl::StatusOr<std::unique_ptr<MemoryServer>> MemoryServer::Start(
    MemoryStore* store, const ServingOptions& serving, const RetrieveOptionsOfServer& retrieve) {
  std::unique_ptr<MemoryServer> server(new MemoryServer(store, serving));
  server->service_ = std::make_unique<MemoryServiceImpl>(store, &server->metrics_, retrieve);
  if (absl::Status status = server->ReloadApiKeys(); !status.ok()) return status;
  absl::StatusOr<GrpcServer> started = StartGrpcServer(serving, server->service_.get());
  if (!started.ok()) return started.status();
  server->server_ = std::move(started->server);
  server->port_ = started->port;
  if (!serving.metrics_listen.empty()) {
    absl::StatusOr<std::unique_ptr<MetricsPage>> page = MetricsPage::Start(
        serving.metrics_listen, [metrics = &server->metrics_] { return metrics->Text(); });
    if (!page.ok()) return page.status();
    server->metrics_page_ = *std::move(page);
  }
  server->health_watcher_ = std::thread([s = server.get()] { s->WatchHealth(); });
  return server;
}

MemoryServer::~MemoryServer() { Shutdown(absl::ZeroDuration()); }

absl::Status MemoryServer::ReloadApiKeys() {
  if (serving_.api_keys.empty()) return absl::OkStatus();
  absl::StatusOr<ApiKeys> keys = ApiKeys::Load(serving_.api_keys);
  if (!keys.ok()) return keys.status();
  service_->SetApiKeys(*std::move(keys));
  return absl::OkStatus();
}

void MemoryServer::WatchHealth() {
  grpc::HealthCheckServiceInterface* health = server_->GetHealthCheckService();
  health->SetServingStatus(kMemoryServiceName, true);
  bool logged_writable = true;
  do {
    const absl::Status writable = store_->Writable();
    health->SetServingStatus(kMemoryWriteHealthName, writable.ok());
    if (writable.ok() != logged_writable) {
      if (writable.ok()) {
        spdlog::info("the store can write again");
      } else {
        spdlog::error("the store cannot write, reads go on: {}", std::string(writable.message()));
      }
      logged_writable = writable.ok();
    }
  } while (!stopping_.WaitForNotificationWithTimeout(kHealthInterval));
}

void MemoryServer::Shutdown(absl::Duration drain) {
  if (stopping_.HasBeenNotified()) return;
  stopping_.Notify();
  if (health_watcher_.joinable()) health_watcher_.join();
  if (server_ != nullptr) {
    if (auto* health = server_->GetHealthCheckService()) health->Shutdown();
    service_->Drain(drain);
    // Time for the last answers to leave; not the time to drain: gRPC would spend it waiting for
    // idle clients to close their connections.
    server_->Shutdown(std::chrono::system_clock::now() + std::chrono::milliseconds(200));
    server_->Wait();
  }
}

}  // namespace memory3
