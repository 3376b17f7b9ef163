// `trainer codec` and `trainer write`, which are another program's.
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "trainer/command.h"

namespace memory3 {
namespace {

absl::Status RunStoreProgram(char** argv) {
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  const std::string program = (self.parent_path() / "trainer_store").string();
  execv(program.c_str(), argv);
  return absl::UnimplementedError(absl::StrCat("needs the program ", program, " (",
                                               std::strerror(errno),
                                               "); builds without servers have none"));
}

}  // namespace

void AddStoreProgram(char** argv, CLI::App* app, Commands* commands) {
  constexpr std::pair<const char*, const char*> kCommands[] = {
      {"codec", "Trains the vq codec's codebook on a model's memories"},
      {"write", "Writes documents' memories into a knowledge base"}};
  for (const auto& [name, description] : kCommands) {
    CLI::App* flags = app->add_subcommand(name, description);
    flags->set_help_flag();  // the program's own says more
    flags->prefix_command();
    flags->allow_config_extras(true);
    commands->push_back({flags, [argv] { return RunStoreProgram(argv); }});
  }
}

}  // namespace memory3
