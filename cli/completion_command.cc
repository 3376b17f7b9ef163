// memory3 completion: a bash script made from the commands as they are.
#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "cli/command.h"

namespace memory3 {
namespace {

// First %s: a case for each command's path; second: a case for each path's words; third: the paths
// whose arguments name a knowledge base.
constexpr const char kScript[] = R"(_memory3() {
  local current=${COMP_WORDS[COMP_CWORD]} path="" word words="" bases=""
  for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
    case "${path:+$path }$word" in
%s    esac
  done
  case "$path" in
%s  esac
  case "$path" in
    %s)
      [[ $current == -* ]] || bases=$("${COMP_WORDS[0]}" --timeout 2 kb list --names 2>/dev/null) ;;
  esac
  COMPREPLY=($(compgen -W "$words $bases" -- "$current"))
}
complete -o default -F _memory3 memory3
)";

std::vector<std::string> LongFlags(const CLI::App& app) {
  std::vector<std::string> flags;
  for (const CLI::Option* option : app.get_options())
    for (const std::string& name : option->get_lnames()) flags.push_back("--" + name);
  return flags;
}

bool NamesKnowledgeBase(const CLI::App& app) {
  const std::vector<const CLI::Option*> named = app.get_options([](const CLI::Option* option) {
    return option->get_positional() && option->get_type_name() == kKnowledgeBase;
  });
  return !named.empty();
}

struct PathWords {
  std::string path;  // "kb list"; empty: no command yet
  std::vector<std::string> words;
  bool names_knowledge_base = false;
};

void Collect(const CLI::App& app, const std::string& path, std::vector<PathWords>& all) {
  const std::vector<const CLI::App*> commands =
      app.get_subcommands([](const CLI::App*) { return true; });
  PathWords own = {
      .path = path, .words = LongFlags(app), .names_knowledge_base = NamesKnowledgeBase(app)};
  for (const CLI::App* command : commands) own.words.push_back(command->get_name());
  all.push_back(std::move(own));
  for (const CLI::App* command : commands)
    Collect(*command,
            path.empty() ? command->get_name() : absl::StrCat(path, " ", command->get_name()), all);
}

}  // namespace

void AddCompletionCommand(CLI::App& app, Commands& commands) {
  CLI::App* completion =
      app.add_subcommand("completion", "Completion for bash: source <(memory3 completion)");
  commands.push_back(
      {completion, [&app](const Session&) {
         std::vector<PathWords> all;
         Collect(app, "", all);
         const std::string common = absl::StrJoin(LongFlags(app), " ");
         std::string paths, words;
         std::vector<std::string> bases;
         for (const PathWords& one : all) {
           if (!one.path.empty())
             absl::StrAppend(&paths, "      \"", one.path, "\") path=\"", one.path, "\" ;;\n");
           if (one.names_knowledge_base) bases.push_back(absl::StrCat("\"", one.path, "\""));
           absl::StrAppend(&words, "    \"", one.path, "\") words=\"",
                           absl::StrJoin(one.words, " "),
                           one.path.empty() ? "" : absl::StrCat(" ", common), "\" ;;\n");
         }
         std::printf(kScript, paths.c_str(), words.c_str(), absl::StrJoin(bases, " | ").c_str());
         return absl::OkStatus();
       }});
}

}  // namespace memory3
