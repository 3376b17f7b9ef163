// The inference server as an object: gRPC service, health, reflection, metrics endpoint, drain.
//
// Health (grpc.health.v1): "memory3.v1.InferenceService" serves while requests are taken; "" too.
// Both are NOT_SERVING while the model is loaded and while the server drains.
//
// Thread-safety: Start, SetReady and Shutdown from one thread each, in this order; the rest from
// any.
#pragma once

#include <grpcpp/server.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "inference_server/inference_api.h"
#include "inference_server/service.h"
#include "serving/flags.h"
#include "serving/metrics_page.h"

namespace memory3 {

inline constexpr char kInferenceServiceName[] = "memory3.v1.InferenceService";

class InferenceServer {
 public:
  // Listens; `inference` need not serve yet and must outlive the server. Reads the API keys.
  // Errors: INVALID_ARGUMENT (flags, key and TLS files), UNAVAILABLE (an address that is taken,
  // named).
  static absl::StatusOr<std::unique_ptr<InferenceServer>> Start(
      Inference* inference, const ServingOptions& serving, const InferenceServiceOptions& options);
  ~InferenceServer();

  int port() const { return port_; }  // of gRPC
  int metrics_port() const { return metrics_page_ != nullptr ? metrics_page_->port() : 0; }
  // Says by health that requests are taken.
  void SetReady();
  // Reads the API key file again; on an error the old keys stay.
  absl::Status ReloadApiKeys();
  // Stops taking requests, lets running ones end for up to `drain`, then ends them with
  // UNAVAILABLE.
  void Shutdown(absl::Duration drain);

 private:
  InferenceServer(Inference* inference, ServingOptions serving)
      : inference_(inference), serving_(std::move(serving)) {}
  void SetHealth(bool serves);

  Inference* const inference_;
  const ServingOptions serving_;
  std::unique_ptr<InferenceServiceImpl> service_;
  std::unique_ptr<MetricsPage> metrics_page_;
  std::unique_ptr<grpc::Server> server_;
  int port_ = 0;
};

}  // namespace memory3
