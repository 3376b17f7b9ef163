// The subcommands of `memory3`: each adds itself with its flags to the application and says, in
// `commands`, what to run when it was chosen.
//
// Thread-safety: the main thread.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <vector>

#include "absl/status/status.h"
#include "cli/session.h"

namespace memory3 {

struct Command {
  CLI::App* flags;
  std::function<absl::Status(const Session&)> run;
};
using Commands = std::vector<Command>;

// The type of an argument that names a knowledge base: so that completion offers those there are.
inline constexpr const char kKnowledgeBase[] = "KNOWLEDGE_BASE";

void AddKnowledgeBaseCommands(CLI::App& app, Commands& commands);
void AddSnapshotCommands(CLI::App& app, Commands& commands);
void AddStatusCommand(CLI::App& app, Commands& commands);
// After AddKnowledgeBaseCommands: adds `kb create` too.
void AddLoadCommand(CLI::App& app, Commands& commands);
void AddAskCommand(CLI::App& app, Commands& commands);
void AddServeCommand(CLI::App& app, Commands& commands);
void AddDemoCommand(CLI::App& app, Commands& commands);
void AddCompletionCommand(CLI::App& app, Commands& commands);

// Asks on the terminal; FAILED_PRECONDITION where there is none and `yes` was not given.
absl::Status Confirm(bool yes, const std::string& question);

}  // namespace memory3
