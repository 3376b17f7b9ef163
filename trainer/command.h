// The subcommands of `trainer`: each adds itself with its flags to the application; the chosen
// one's `run` is called after parsing.
//
// Two programs share them: `trainer` has what runs anywhere, `trainer_store` what needs gRPC or
// FAISS. `trainer` runs `trainer_store`, which stands beside it, for these.
//
// Thread-safety: the main thread.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "transformer/device.h"
#include "transformer/tokenizer.h"

namespace memory3 {

struct Command {
  CLI::App* flags;
  std::function<absl::Status()> run;
};
using Commands = std::vector<Command>;

void AddTokenizerCommand(CLI::App* app, Commands* commands);
void AddPackCommand(CLI::App* app, Commands* commands);
void AddPretrainCommand(CLI::App* app, Commands* commands);
void AddFinetuneCommand(CLI::App* app, Commands* commands);
void AddExportCommand(CLI::App* app, Commands* commands);
void AddEvaluateCommand(CLI::App* app, Commands* commands);
void AddPlotCommand(CLI::App* app, Commands* commands);
// In `trainer`: `codec` and `write` by their names; running one runs trainer_store with all of
// `argv`.
void AddStoreProgram(char** argv, CLI::App* app, Commands* commands);
// In `trainer_store`.
void AddCodecCommand(CLI::App* app, Commands* commands);
void AddWriteCommand(CLI::App* app, Commands* commands);

// Parses, runs the command and says what went wrong on stderr; the process's exit code.
int RunCommands(int argc, char** argv, const std::function<void(CLI::App*, Commands*)>& add);

// --device and --threads.
struct DeviceFlags {
  std::string device = "cpu";
  int threads = 0;
  void AddTo(CLI::App* flags);
  absl::StatusOr<std::unique_ptr<Device>> Make() const;
};

// A directory's tokenizer (or a tokenizer.model file), whatever model it belongs to.
absl::StatusOr<std::unique_ptr<Tokenizer>> OpenAnyTokenizer(const std::string& path);

}  // namespace memory3
