// The flags both servers have, and the one way flags are given in memory3: on the command line, in
// the file named by --config (`name = value` lines), or as the environment variable MEMORY3_NAME
// (upper case); where several say something the first of these counts (CLI11's order).
//
// Thread-safety: used by main() before threads start.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

#include "absl/status/status.h"

namespace memory3 {

std::string EnvironmentName(
    const std::string& flag);  // "max_message_mb" → "MEMORY3_MAX_MESSAGE_MB"

// Adds --name with its environment variable. Returns the option for further checks (->check(…)).
template <typename T>
CLI::Option* AddFlag(CLI::App& app, const std::string& name, T& value, const std::string& help) {
  return app.add_option("--" + name, value, help)
      ->envname(EnvironmentName(name))
      ->capture_default_str();
}
// --name, --name=false.
CLI::Option* AddSwitch(CLI::App& app, const std::string& name, bool& value,
                       const std::string& help);

// What the network side of a server needs to know.
struct ServingOptions {
  std::string listen;                    // gRPC, "0.0.0.0:7070"; port 0 picks one
  std::string metrics_listen;            // Prometheus /metrics over HTTP; empty: none
  std::string tls_certificate, tls_key;  // PEM files; both or neither
  std::string tls_client_ca;  // PEM file: clients must show a certificate it signed (mutual TLS)
  std::string api_keys;       // file (serving/api_keys.h); empty: no keys. Read again on SIGHUP
  int max_message_mb = 16;
  int max_concurrent_streams = 1024;  // per connection
  int drain_seconds = 25;             // after SIGTERM, before running requests are cancelled
  std::string log_level = "info";
};

// Defaults: as in `options` when it is called.
void AddServingFlags(CLI::App& app, ServingOptions& options);
// What CLI11's own checks cannot see: flags that belong together. INVALID_ARGUMENT names them.
absl::Status CheckServingOptions(const ServingOptions& options);

// Parses; on --help, --version or a bad flag prints what there is to say, sets `exit_code` and
// answers false.
bool ParseFlags(CLI::App& app, int argc, char** argv, int& exit_code);

}  // namespace memory3
