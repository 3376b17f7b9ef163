// The memory server as an object: gRPC service, health, reflection, metrics endpoint, drain.
//
// Health (grpc.health.v1): "" and "memory3.v1.MemoryService" serve while the store reads,
// "memory3.v1.MemoryService.Write" only while it can also write.
//
// Thread-safety: Start and Shutdown from one thread; the rest from any.
#pragma once

#include <grpcpp/server.h>

#include <memory>
#include <string>
#include <thread>

#include "absl/status/statusor.h"
#include "absl/synchronization/notification.h"
#include "memory_server/memory_store.h"
#include "memory_server/metrics.h"
#include "memory_server/service.h"
#include "serving/flags.h"
#include "serving/metrics_page.h"

namespace memory3 {

inline constexpr char kMemoryServiceName[] = "memory3.v1.MemoryService";
inline constexpr char kMemoryWriteHealthName[] = "memory3.v1.MemoryService.Write";

class MemoryServer {
 public:
  // The store must outlive the server. Errors: INVALID_ARGUMENT (flags, key and TLS files),
  // UNAVAILABLE (an address that is taken, named).
  static absl::StatusOr<std::unique_ptr<MemoryServer>> Start(
      MemoryStore* store, const ServingOptions& serving, const RetrieveOptionsOfServer& retrieve);
  ~MemoryServer();

  int port() const { return port_; }  // of gRPC
  // 0: none.
  int metrics_port() const { return metrics_page_ != nullptr ? metrics_page_->port() : 0; }
  // Reads the API key file again; on an error the old keys stay.
  absl::Status ReloadApiKeys();
  // Stops taking requests, lets running ones end for up to `drain`, then cancels them.
  void Shutdown(absl::Duration drain);

 private:
  MemoryServer(MemoryStore* store, ServingOptions serving)
      : store_(store), serving_(std::move(serving)), metrics_(store) {}
  void WatchHealth();

  MemoryStore* const store_;
  const ServingOptions serving_;
  MemoryServerMetrics metrics_;
  std::unique_ptr<MemoryServiceImpl> service_;
  std::unique_ptr<MetricsPage> metrics_page_;
  std::unique_ptr<grpc::Server> server_;
  int port_ = 0;
  absl::Notification stopping_;
  std::thread health_watcher_;
};

}  // namespace memory3
