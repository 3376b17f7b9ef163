// memory3: the command people type. `memory3 --help` lists the commands.
#include <cstdio>
#include <string>

#include "cli/command.h"

namespace {

constexpr const char kFooter[] = R"(
A first session:
  memory3 serve --model models/tiny --data /var/lib/memory3      both servers, and a page to try
  memory3 load atlas documents.jsonl --model models/tiny         makes the knowledge base "atlas"
  memory3 ask atlas "Who designed the Atomium?" --compare        with memory, and without

Every command takes --json (a JSON object a line, in proto3's mapping of the API's messages).
Exit codes: 0 done, 1 failed, 2 wrong command line, 3 not found, 4 a server cannot be reached or
has no room, 5 not allowed, 130 interrupted.)";

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Knowledge for a language model: load it, ask it, look after it.", "memory3");
  memory3::Session session;
  app.set_version_flag("--version", MEMORY3_VERSION);
  app.footer(kFooter);
  app.require_subcommand(1);
  app.fallthrough();
  app.add_option("--memory_server", session.memory_server, "Where the memory server is")
      ->envname("MEMORY3_MEMORY_SERVER")
      ->capture_default_str();
  app.add_option("--inference_server", session.inference_server, "Where the inference server is")
      ->envname("MEMORY3_INFERENCE_SERVER")
      ->capture_default_str();
  app.add_option("--api_key", session.api_key, "API key, where the servers want one")
      ->envname("MEMORY3_API_KEY");
  app.add_option("--tls_ca", session.tls.ca, "PEM file that signed the servers' certificates")
      ->envname("MEMORY3_TLS_CA");
  app.add_option("--client_certificate", session.tls.certificate, "PEM file, for mutual TLS")
      ->envname("MEMORY3_CLIENT_CERTIFICATE");
  app.add_option("--client_key", session.tls.key, "PEM file, for mutual TLS")
      ->envname("MEMORY3_CLIENT_KEY");
  app.add_option("--timeout", session.timeout_seconds, "Seconds a single call may take")
      ->check(CLI::Range(1, 86400))
      ->capture_default_str();
  app.add_flag("--json", session.json, "For programs: a JSON object a line");

  memory3::Commands commands;
  memory3::AddKnowledgeBaseCommands(app, commands);
  memory3::AddLoadCommand(app, commands);
  memory3::AddAskCommand(app, commands);
  memory3::AddSnapshotCommands(app, commands);
  memory3::AddStatusCommand(app, commands);
  memory3::AddServeCommand(app, commands);
  memory3::AddDemoCommand(app, commands);
  memory3::AddCompletionCommand(app, commands);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  for (const memory3::Command& command : commands) {
    if (!command.flags->parsed()) continue;
    const absl::Status status = command.run(session);
    if (!status.ok() && !status.GetPayload(memory3::kToldAlready).has_value())
      std::fprintf(stderr, "memory3: %s\n", std::string(status.message()).c_str());
    return memory3::ExitCode(status);
  }
  return 2;
}
