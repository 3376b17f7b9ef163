#include "memory_server/server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/resource_quota.h>
#include <grpcpp/server_builder.h>
#include <spdlog/spdlog.h>

#include <chrono>
#include <exception>
#include <utility>

#include "absl/strings/str_cat.h"
#include "serving/credentials.h"

namespace memory3 {
namespace {

constexpr absl::Duration kHealthInterval = absl::Milliseconds(250);

}  // namespace

absl::StatusOr<std::unique_ptr<MemoryServer>> MemoryServer::Start(
    MemoryStore* store, const ServingOptions& serving, const RetrieveOptionsOfServer& retrieve) {
  if (absl::Status status = CheckServingOptions(serving); !status.ok()) return status;
  const absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> credentials =
      MakeServerCredentials(serving);
  if (!credentials.ok()) return credentials.status();
  ApiKeys keys;
  if (!serving.api_keys.empty()) {
    absl::StatusOr<ApiKeys> loaded = ApiKeys::Load(serving.api_keys);
    if (!loaded.ok()) return loaded.status();
    keys = *std::move(loaded);
  }

  std::unique_ptr<MemoryServer> server(new MemoryServer(store, serving));
  server->service_ =
      std::make_unique<MemoryServiceImpl>(store, &server->metrics_, std::move(keys), retrieve);
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  builder.AddListeningPort(serving.listen, *credentials, &server->port_);
  builder.RegisterService(server->service_.get());
  builder.SetMaxReceiveMessageSize(serving.max_message_mb << 20);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, serving.max_concurrent_streams);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT,
                             0);  // a taken port is an error, not a shared one
  server->server_ = builder.BuildAndStart();
  if (server->server_ == nullptr || server->port_ == 0) {
    return absl::UnavailableError(
        absl::StrCat("--listen ", serving.listen, ": cannot listen there; is it taken?"));
  }
  if (!serving.metrics_listen.empty()) {
    try {
      server->exposer_ =
          std::make_unique<prometheus::Exposer>(serving.metrics_listen, /*num_threads=*/1);
    } catch (const std::exception& error) {
      return absl::UnavailableError(
          absl::StrCat("--metrics_listen ", serving.metrics_listen, ": ", error.what()));
    }
    const std::vector<int> ports = server->exposer_->GetListeningPorts();
    if (!ports.empty()) server->metrics_port_ = ports.front();
    server->exposer_->RegisterCollectable(server->metrics_.registry());
    server->exposer_->RegisterCollectable(server->metrics_.store_gauges());
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
