// memory3 ask: a question to a model that reads a knowledge base, with the sources it read.
#include <cstdio>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "cli/command.h"
#include "cli/question.h"
#include "cli/text.h"
#include "serving/duration.h"

namespace memory3 {
namespace {

struct Arguments {
  AskRequest question;
  std::string stop = "\\n";
  bool no_memory = false, compare = false;
};

void PrintFigures(const Answer& answer) {
  AnswerSpeed speed;
  speed.Add(answer.finish);
  const double rate = speed.TokensPerSecond();
  std::printf("  %u tokens; first after %.0f ms%s; waited %.0f ms for memories\n",
              answer.finish.usage().completion_tokens(), speed.MedianFirstTokenMs(),
              rate > 0 ? absl::StrCat(", then ", static_cast<int>(rate), " tokens/s").c_str() : "",
              Milliseconds(answer.finish.timings().retrieve()));
}

void PrintSources(const Answer& answer) {
  if (answer.unavailable) std::puts("  The memory server could not be reached: answered without.");
  int number = 0;
  for (const ReadSource& read : answer.sources) {
    const v1::Source& source = read.source;
    std::printf("  [%d] %s%s, characters %llu-%llu, score %.3f\n", ++number,
                source.title().empty() ? source.document_id().c_str() : source.title().c_str(),
                source.uri().empty() ? "" : absl::StrCat(" <", source.uri(), ">").c_str(),
                static_cast<unsigned long long>(source.char_begin()),
                static_cast<unsigned long long>(source.char_end()), read.score);
  }
}

absl::Status AskOnce(const Session& session, v1::InferenceService::Stub& stub,
                     const AskRequest& question) {
  absl::StatusOr<Answer> answer = Ask(
      session, stub, question,
      [&](std::string_view piece) {
        if (session.json) return;
        std::fwrite(piece.data(), 1, piece.size(), stdout);
        std::fflush(stdout);
      },
      [&](const v1::GenerateResponse& event) {
        if (session.json) PrintJson(event);
      });
  if (!answer.ok()) return answer.status();
  if (session.json) return absl::OkStatus();
  std::puts("");
  PrintFigures(*answer);
  PrintSources(*answer);
  return absl::OkStatus();
}

absl::Status RunAsk(const Session& session, Arguments arguments) {
  absl::StatusOr<std::unique_ptr<v1::InferenceService::Stub>> stub = session.OpenInference();
  if (!stub.ok()) return stub.status();
  AskRequest& question = arguments.question;
  question.stop.clear();
  if (!arguments.stop.empty())
    question.stop.push_back(arguments.stop == "\\n" ? "\n" : arguments.stop);
  if (!arguments.compare) {
    question.memory = !arguments.no_memory;
    return AskOnce(session, **stub, question);
  }
  for (const bool memory : {true, false}) {
    if (!session.json) std::printf("%s\n", memory ? "With memory:" : "\nWithout:");
    question.memory = memory;
    if (absl::Status status = AskOnce(session, **stub, question); !status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace

void AddAskCommand(CLI::App& app, Commands& commands) {
  const auto arguments = std::make_shared<Arguments>();
  AskRequest& question = arguments->question;
  CLI::App* ask = app.add_subcommand("ask", "Ask a question; the answer streams, with its sources");
  ask->add_option("KB", question.knowledge_base, "Knowledge base, name or alias")
      ->required()
      ->type_name(kKnowledgeBase);
  ask->add_option("QUESTION", question.text)->required();
  CLI::Option* no_memory =
      ask->add_flag("--no_memory", arguments->no_memory, "Do not read the knowledge base");
  ask->add_flag("--compare", arguments->compare, "Answer twice: with memory, and without")
      ->excludes(no_memory);
  ask->add_option("--references", question.references_per_chunk,
                  "Read for each 64 tokens; default: the model's");
  ask->add_option("--max_tokens", question.max_tokens, "Longest answer")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  ask->add_option("--temperature", question.temperature, "0: the likeliest token")
      ->check(CLI::Range(0.0F, 100.0F))
      ->capture_default_str();
  ask->add_option("--prompt", question.prompt, "How the question is put; {} stands for it")
      ->capture_default_str();
  ask->add_option("--stop", arguments->stop, "Text that ends the answer; empty: none")
      ->capture_default_str();
  commands.push_back({ask, [=](const Session& session) { return RunAsk(session, *arguments); }});
}

}  // namespace memory3
