// trainer_store: the commands of `trainer` that need FAISS or a memory server's client.
#include "trainer/command.h"

int main(int argc, char** argv) {
  return memory3::RunCommands(argc, argv, [](CLI::App* app, memory3::Commands* commands) {
    memory3::AddCodecCommand(app, commands);
    memory3::AddWriteCommand(app, commands);
  });
}
