#include "serving/credentials.h"

#include <fstream>
#include <sstream>

#include "absl/strings/str_cat.h"

namespace memory3 {
namespace {

absl::StatusOr<std::string> ReadPem(const std::string& path) {
  std::ifstream in(path);
  std::stringstream text;
  text << in.rdbuf();
  if (!in || text.str().find("-----BEGIN") == std::string::npos) {
    return absl::InvalidArgumentError(absl::StrCat("TLS: cannot read a PEM file at ", path));
  }
  return text.str();
}

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeServerCredentials(
    const ServingOptions& options) {
  if (options.tls_certificate.empty()) return grpc::InsecureServerCredentials();
  const absl::StatusOr<std::string> certificate = ReadPem(options.tls_certificate);
  if (!certificate.ok()) return certificate.status();
  const absl::StatusOr<std::string> key = ReadPem(options.tls_key);
  if (!key.ok()) return key.status();
  grpc::SslServerCredentialsOptions ssl;
  ssl.pem_key_cert_pairs.push_back({*key, *certificate});
  if (!options.tls_client_ca.empty()) {
    const absl::StatusOr<std::string> ca = ReadPem(options.tls_client_ca);
    if (!ca.ok()) return ca.status();
    ssl.pem_root_certs = *ca;
    ssl.client_certificate_request = GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY;
  }
  return grpc::SslServerCredentials(ssl);
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeChannelCredentials(
    const ClientTls& tls) {
  if (tls.ca.empty()) return grpc::InsecureChannelCredentials();
  const absl::StatusOr<std::string> ca = ReadPem(tls.ca);
  if (!ca.ok()) return ca.status();
  grpc::SslCredentialsOptions ssl;
  ssl.pem_root_certs = *ca;
  if (!tls.certificate.empty()) {
    const absl::StatusOr<std::string> certificate = ReadPem(tls.certificate);
    if (!certificate.ok()) return certificate.status();
    const absl::StatusOr<std::string> key = ReadPem(tls.key);
    if (!key.ok()) return key.status();
    ssl.pem_cert_chain = *certificate;
    ssl.pem_private_key = *key;
  }
  return grpc::SslCredentials(ssl);
}

}  // namespace memory3
