// TLS credentials from PEM files, for servers and for clients.
#pragma once

#include <grpcpp/security/credentials.h>
#include <grpcpp/security/server_credentials.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "serving/flags.h"

namespace memory3 {

// Plain text where no certificate is configured. INVALID_ARGUMENT names a file that cannot be read.
absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeServerCredentials(
    const ServingOptions& options);

struct ClientTls {
  std::string ca;           // PEM file that signed the server's certificate; empty: plain text
  std::string certificate;  // PEM files of the client's own, for mutual TLS; both or neither
  std::string key;
};
absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeChannelCredentials(
    const ClientTls& tls);

}  // namespace memory3
