#include "trainer/command.h"

#include <cctype>
#include <iostream>

namespace memory3 {
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

int RunCommands(int argc, char** argv, const std::function<void(CLI::App*, Commands*)>& add) {
  CLI::App app("Trains models that write and read explicit memory.", "trainer");
  app.require_subcommand(1);
  app.set_config("--config", "", "A TOML file of flags, a section for each command");
  Commands commands;
  add(&app, &commands);
  for (const Command& command : commands) NameEnvironment(command.flags);
  CLI11_PARSE(app, argc, argv);
  for (const Command& command : commands) {
    if (!command.flags->parsed()) continue;
    const absl::Status status = command.run();
    if (status.ok()) return 0;
    std::cerr << "trainer " << command.flags->get_name() << ": " << status.message() << "\n";
    return 1;
  }
  return 1;
}

}  // namespace memory3
