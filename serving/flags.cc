#include "serving/flags.h"

#include <cctype>

namespace memory3 {

std::string EnvironmentName(const std::string& flag) {
  std::string variable = "MEMORY3_" + flag;
  for (char& c : variable) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  return variable;
}

CLI::Option* AddSwitch(CLI::App& app, const std::string& name, bool& value,
                       const std::string& help) {
  return app.add_flag("--" + name, value, help)->envname(EnvironmentName(name));
}

void AddServingFlags(CLI::App& app, ServingOptions& options) {
  app.set_config("--config", "", "File of `name = value` lines")->envname("MEMORY3_CONFIG");
  AddFlag(app, "listen", options.listen, "Address of the gRPC service, HOST:PORT");
  AddFlag(app, "metrics_listen", options.metrics_listen,
          "Address of Prometheus' /metrics, HOST:PORT; empty: none");
  AddFlag(app, "tls_certificate", options.tls_certificate,
          "PEM file with the server's certificate chain");
  AddFlag(app, "tls_key", options.tls_key, "PEM file with the server's private key");
  AddFlag(app, "tls_client_ca", options.tls_client_ca,
          "PEM file: clients must show a certificate signed by it");
  AddFlag(app, "api_keys", options.api_keys,
          "JSON file with the hashes of the API keys; read again on SIGHUP");
  AddFlag(app, "max_message_mb", options.max_message_mb, "Largest message taken, MiB")
      ->check(CLI::Range(1, 256));
  AddFlag(app, "max_concurrent_streams", options.max_concurrent_streams,
          "Calls at a time per connection")
      ->check(CLI::Range(1, 1 << 20));
  AddFlag(app, "drain_seconds", options.drain_seconds,
          "How long running calls may take to end after SIGTERM")
      ->check(CLI::Range(0, 3600));
  AddFlag(app, "log_level", options.log_level, "trace, debug, info, warn, error")
      ->check(CLI::IsMember({"trace", "debug", "info", "warn", "error"}));
}

absl::Status CheckServingOptions(const ServingOptions& options) {
  if (options.tls_certificate.empty() != options.tls_key.empty()) {
    return absl::InvalidArgumentError("--tls_certificate and --tls_key go together");
  }
  if (!options.tls_client_ca.empty() && options.tls_certificate.empty()) {
    return absl::InvalidArgumentError("--tls_client_ca needs --tls_certificate and --tls_key");
  }
  return absl::OkStatus();
}

bool ParseFlags(CLI::App& app, int argc, char** argv, int& exit_code) {
  try {
    app.parse(argc, argv);
    return true;
  } catch (const CLI::ParseError& error) {
    exit_code = app.exit(error);
    return false;
  }
}

}  // namespace memory3
