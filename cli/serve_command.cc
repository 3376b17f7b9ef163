// memory3 serve: both servers, from one set of flags or one file.
#include <cstdio>
#include <fstream>
#include <memory>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "cli/command.h"
#include "cli/servers.h"

namespace memory3 {
namespace {

struct Arguments {
  std::string model, data, config;
  std::string memory_listen = "127.0.0.1:7070", inference_listen = "127.0.0.1:7071",
              http_listen = "127.0.0.1:8080";
  int patience_seconds = 600;
};

// Ours, and the file's in place of ours where it names the same.
absl::StatusOr<ServerFlags> ReadFlags(const Arguments& arguments) {
  ServerFlags flags = {
      .memory_server = {"--data=" + arguments.data, "--listen=" + arguments.memory_listen},
      .inference_server = {"--model=" + arguments.model, "--listen=" + arguments.inference_listen,
                           "--http_listen=" + arguments.http_listen,
                           "--memory=" + arguments.memory_listen}};
  if (arguments.config.empty()) return flags;
  std::ifstream file(arguments.config);
  if (!file) return absl::NotFoundError(absl::StrCat(arguments.config, ": cannot be read"));
  std::vector<CLI::ConfigItem> items;
  try {
    items = CLI::ConfigTOML().from_config(file);
  } catch (const CLI::Error& error) {
    return absl::InvalidArgumentError(absl::StrCat(arguments.config, ": ", error.what()));
  }
  for (const CLI::ConfigItem& item : items) {
    if (item.name == "++" || item.name == "--") continue;  // a section's begin and end
    const std::string section = item.parents.empty() ? "" : item.parents[0];
    std::vector<std::string>* server = section == "memory_server"      ? &flags.memory_server
                                       : section == "inference_server" ? &flags.inference_server
                                                                       : nullptr;
    if (server == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat(arguments.config, ": ", item.name, " stands in section [", section,
                       "]; there are [memory_server] and [inference_server]"));
    }
    // A flag given twice is an error to the servers: the file's takes the place of ours.
    const std::string start = absl::StrCat("--", item.name, "=");
    std::erase_if(*server, [&](const std::string& flag) { return absl::StartsWith(flag, start); });
    server->push_back(start + absl::StrJoin(item.inputs, ","));
  }
  return flags;
}

absl::Status Serve(const Session& session, const Arguments& arguments) {
  absl::StatusOr<ServerFlags> flags = ReadFlags(arguments);
  if (!flags.ok()) return flags.status();
  CatchInterrupts();
  absl::StatusOr<std::unique_ptr<Servers>> servers =
      Servers::Start(*flags, session.tls, absl::Seconds(arguments.patience_seconds));
  if (Interrupted()) return absl::OkStatus();
  if (!servers.ok()) return servers.status();
  const bool secure = !ServerFlags::ValueOf(flags->inference_server, "tls_certificate").empty();
  std::printf("Ready. The page: %s://%s/\nStop with Ctrl-C.\n", secure ? "https" : "http",
              Reachable(ServerFlags::ValueOf(flags->inference_server, "http_listen")).c_str());
  std::fflush(stdout);
  while (!Interrupted()) {
    if (absl::Status status = (*servers)->Running(); !status.ok()) return status;
    WaitForSignal(absl::Seconds(60));
  }
  return absl::OkStatus();
}

}  // namespace

void AddServeCommand(CLI::App& app, Commands& commands) {
  const auto arguments = std::make_shared<Arguments>();
  CLI::App* serve = app.add_subcommand("serve", "Run the memory server and the inference server");
  serve->add_option("--model", arguments->model, "Model directory")->envname("MEMORY3_MODEL");
  serve->add_option("--data", arguments->data, "Directory of the store; made if missing");
  serve->add_option(
      "--config", arguments->config,
      "TOML file with sections [memory_server] and [inference_server]: any flag of theirs");
  serve->add_option("--memory_listen", arguments->memory_listen, "Memory server, gRPC")
      ->capture_default_str();
  serve->add_option("--inference_listen", arguments->inference_listen, "Inference server, gRPC")
      ->capture_default_str();
  serve->add_option("--http_listen", arguments->http_listen, "Inference server, HTTP and the page")
      ->capture_default_str();
  serve
      ->add_option("--patience", arguments->patience_seconds,
                   "Seconds a server may take to be ready")
      ->capture_default_str();
  commands.push_back({serve, [=](const Session& session) { return Serve(session, *arguments); }});
}

}  // namespace memory3
