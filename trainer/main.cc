// trainer: from text to a model that uses memory. `trainer --help` lists the commands.
#include "trainer/command.h"

int main(int argc, char** argv) {
  return memory3::RunCommands(argc, argv, [argv](CLI::App* app, memory3::Commands* commands) {
    memory3::AddTokenizerCommand(app, commands);
    memory3::AddPackCommand(app, commands);
    memory3::AddPretrainCommand(app, commands);
    memory3::AddFinetuneCommand(app, commands);
    memory3::AddExportCommand(app, commands);
    memory3::AddEvaluateCommand(app, commands);
    memory3::AddPlotCommand(app, commands);
    memory3::AddStoreProgram(argv, app, commands);
  });
}
