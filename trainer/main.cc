// trainer: from text to a model that uses memory. `trainer --help` lists the commands.
#include <cctype>
#include <iostream>

#include "trainer/command.h"

namespace {

// Every flag also from the environment: --save_every as MEMORY3_TRAINER_SAVE_EVERY.
void NameEnvironment(CLI::App* flags) {
  for (CLI::Option* option : flags->get_options()) {
    const std::vector<std::string> names = option->get_lnames();
    if (names.empty() || names[0] == "help" || names[0] == "config") continue;
    std::string name = "MEMORY3_TRAINER_" + names[0];
    for (char& c : name) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
    option->envname(name);
  }
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Trains models that write and read explicit memory.", "trainer");
  app.require_subcommand(1);
  app.set_config("--config", "", "A TOML file of flags, a section for each command");
  memory3::Commands commands;
  memory3::AddTokenizerCommand(&app, &commands);
  memory3::AddPackCommand(&app, &commands);
  memory3::AddPretrainCommand(&app, &commands);
  memory3::AddFinetuneCommand(&app, &commands);
  memory3::AddExportCommand(&app, &commands);
  memory3::AddEvaluateCommand(&app, &commands);
  memory3::AddPlotCommand(&app, &commands);
  for (const memory3::Command& command : commands) NameEnvironment(command.flags);
  CLI11_PARSE(app, argc, argv);
  for (const memory3::Command& command : commands) {
    if (!command.flags->parsed()) continue;
    const absl::Status status = command.run();
    if (status.ok()) return 0;
    std::cerr << "trainer " << command.flags->get_name() << ": " << status.message() << "\n";
    return 1;
  }
  return 1;
}
