// The subcommands of `trainer`: each adds itself with its flags to the application; the chosen
// one's `run` is called after parsing.
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
