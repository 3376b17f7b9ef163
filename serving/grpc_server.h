// The gRPC side that both servers have: one service behind the address, TLS and limits of their
// flags, with reflection, grpc.health.v1 and keepalive.
//
// Thread-safety: StartGrpcServer from one thread; grpc::Server is thread-safe.
#pragma once

#include <grpcpp/impl/codegen/service_type.h>
#include <grpcpp/server.h>

#include <memory>

#include "absl/status/statusor.h"
#include "serving/flags.h"

namespace memory3 {

struct GrpcServer {
  std::unique_ptr<grpc::Server> server;
  int port = 0;
};

// Serves at once. Health knows "" as SERVING from the start; the caller sets the rest through
// GetHealthCheckService(). `service` must outlive the server.
// Errors: INVALID_ARGUMENT (flags that do not fit together, TLS files), UNAVAILABLE (an address
// that is taken, named).
absl::StatusOr<GrpcServer> StartGrpcServer(const ServingOptions& options, grpc::Service* service);

}  // namespace memory3
