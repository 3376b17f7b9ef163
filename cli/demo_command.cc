// memory3 demo: starts both servers, loads documents, asks questions with and without memory, sums
// up, and stops what it started.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "cli/command.h"
#include "cli/question.h"
#include "cli/servers.h"
#include "cli/text.h"
#include "cli/writing.h"
#include "nlohmann/json.hpp"
#include "trainer/qa_metrics.h"

namespace memory3 {
namespace {

constexpr const char kDemoBase[] = "demo";

struct Arguments {
  std::string model = "models/tiny", knowledge = "demo/knowledge",
              questions = "demo/questions.jsonl";
  std::string directory = "build/demo";
  std::string prompt = AskRequest().prompt;
  int shown = 5;
  uint32_t references = 1;  // a small model takes names from the others: demo/README.md
};

struct DemoQuestion {
  std::string question;
  std::vector<std::string> answers;
  std::string source;  // the document that holds the answer
};

// INVALID_ARGUMENT names file and line.
absl::StatusOr<std::vector<DemoQuestion>> ReadQuestions(const std::string& path) {
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(absl::StrCat(path, ": cannot be read"));
  std::vector<DemoQuestion> questions;
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    const nlohmann::json json = nlohmann::json::parse(line, nullptr, false);
    try {
      questions.push_back({json.at("question"), json.at("answers"), json.at("source")});
    } catch (const nlohmann::json::exception& error) {
      return absl::InvalidArgumentError(absl::StrCat(path, ":", number, ": ", error.what()));
    }
  }
  if (questions.empty()) return absl::InvalidArgumentError(absl::StrCat(path, ": no questions"));
  return questions;
}

struct Totals {
  int with = 0, without = 0;
  int source = 0;     // right with memory, and the source that holds it was read
  int retrieved = 0;  // the source was read, whatever the answer
  AnswerSpeed speed;  // with memory
};

absl::StatusOr<Totals> AskAll(const Session& session, const Arguments& arguments,
                              const std::vector<DemoQuestion>& questions, Servers& servers) {
  absl::StatusOr<std::unique_ptr<v1::InferenceService::Stub>> stub = session.OpenInference();
  if (!stub.ok()) return stub.status();
  Totals totals;
  for (size_t i = 0; i < questions.size(); ++i) {
    if (Interrupted()) return absl::CancelledError("interrupted");
    if (absl::Status status = servers.Running(); !status.ok()) return status;
    AskRequest question;
    question.text = questions[i].question;
    question.knowledge_base = kDemoBase;
    question.prompt = arguments.prompt;
    question.max_tokens = 24;
    question.references_per_chunk = arguments.references;
    const auto nowhere = [](std::string_view) {};
    const absl::StatusOr<Answer> with = Ask(session, **stub, question, nowhere);
    if (!with.ok()) return with.status();
    question.memory = false;
    const absl::StatusOr<Answer> without = Ask(session, **stub, question, nowhere);
    if (!without.ok()) return without.status();

    const bool right = ExactMatch(with->text, questions[i].answers) == 1;
    const bool right_without = ExactMatch(without->text, questions[i].answers) == 1;
    const bool source_shown = std::any_of(
        with->sources.begin(), with->sources.end(),
        [&](const ReadSource& read) { return read.source.document_id() == questions[i].source; });
    totals.with += right;
    totals.without += right_without;
    totals.source += right && source_shown;
    totals.retrieved += source_shown;
    totals.speed.Add(with->finish);

    if (static_cast<int>(i) < arguments.shown) {
      std::vector<std::string> titles;
      for (const ReadSource& read : with->sources) titles.push_back(read.source.title());
      std::printf("\n%s\n  with memory  %s %s\n  without      %s %s\n  read         %s\n",
                  question.text.c_str(), right ? "✓" : "✗", with->text.c_str(),
                  right_without ? "✓" : "✗", without->text.c_str(),
                  absl::StrJoin(titles, ", ").c_str());
      std::fflush(stdout);
    }
  }
  return totals;
}

absl::Status Demo(Session session, const Arguments& arguments) {
  absl::StatusOr<std::vector<DemoQuestion>> questions = ReadQuestions(arguments.questions);
  if (!questions.ok()) return questions.status();
  if (!std::filesystem::exists(arguments.model + "/config.json"))
    return absl::NotFoundError(
        absl::StrCat(arguments.model, ": no model there (config.json is missing)"));
  WritingFlags writing;
  writing.model = arguments.model;
  writing.writing.knowledge_base = kDemoBase;
  writing.writing.description = "The demo's documents";
  std::error_code error;
  for (const auto& file : std::filesystem::directory_iterator(arguments.knowledge, error))
    if (file.path().extension() == ".jsonl") writing.writing.inputs.push_back(file.path().string());
  if (error || writing.writing.inputs.empty())
    return absl::NotFoundError(absl::StrCat(arguments.knowledge, ": no .jsonl files there"));
  std::sort(writing.writing.inputs.begin(), writing.writing.inputs.end());
  const std::string data = arguments.directory + "/data";
  std::filesystem::remove_all(data, error);  // ours, of an earlier run
  std::filesystem::create_directories(data, error);
  if (error) return absl::FailedPreconditionError(absl::StrCat(data, ": ", error.message()));

  CatchInterrupts();
  absl::StatusOr<std::string> memory = FreeAddress(), inference = FreeAddress();
  if (!memory.ok()) return memory.status();
  if (!inference.ok()) return inference.status();
  session.memory_server = *memory;
  session.inference_server = *inference;
  session.api_key.clear();
  session.tls = {};
  std::printf("Starting both servers…\n");
  std::fflush(stdout);
  absl::StatusOr<std::unique_ptr<Servers>> servers =
      Servers::Start({.memory_server = {"--data=" + data, "--listen=" + *memory},
                      .inference_server = {"--model=" + arguments.model, "--memory=" + *memory,
                                           "--listen=" + *inference}},
                     session.tls, absl::Minutes(2), arguments.directory);
  if (!servers.ok()) return servers.status();
  const absl::StatusOr<MemoryWritingResult> loaded = LoadDocuments(session, writing, session.json);
  if (!loaded.ok()) return loaded.status();
  std::printf("Loaded %s references.\n",
              HumanCount(static_cast<uint64_t>(loaded->progress.counts.references)).c_str());
  absl::StatusOr<Totals> totals = AskAll(session, arguments, *questions, **servers);
  if (!totals.ok()) return totals.status();

  const int64_t references = std::max<int64_t>(loaded->progress.counts.references, 1);
  const nlohmann::json report = {
      {"questions", questions->size()},
      {"correct_with_memory", totals->with},
      {"correct_without_memory", totals->without},
      {"correct_source", totals->source},
      {"recall", static_cast<double>(totals->retrieved) / static_cast<double>(questions->size())},
      {"ttft_ms", totals->speed.MedianFirstTokenMs()},
      {"tokens_per_s", totals->speed.TokensPerSecond()},
      {"bytes_per_memory", loaded->record_bytes / references}};
  const std::string path = arguments.directory + "/report.json";
  std::ofstream out(path);
  out << report.dump(2) << "\n";
  if (!out.flush()) return absl::FailedPreconditionError(absl::StrCat(path, ": cannot be written"));
  if (session.json) {
    std::puts(report.dump().c_str());
    return absl::OkStatus();
  }
  std::printf(
      "\n%zu questions: %d right with memory, %d without; of those right, %d show the source that "
      "holds the answer. For %d of all questions that source was read.\nFirst token after %.0f ms "
      "(median), %.0f tokens/s, %s a memory. %s\n",
      questions->size(), totals->with, totals->without, totals->source, totals->retrieved,
      totals->speed.MedianFirstTokenMs(), totals->speed.TokensPerSecond(),
      HumanBytes(static_cast<uint64_t>(loaded->record_bytes / references)).c_str(), path.c_str());
  return absl::OkStatus();
}

}  // namespace

void AddDemoCommand(CLI::App& app, Commands& commands) {
  const auto arguments = std::make_shared<Arguments>();
  CLI::App* demo = app.add_subcommand(
      "demo", "Start both servers, load the demo's documents, ask, sum up, stop everything");
  demo->add_option("--model", arguments->model, "Model directory")->capture_default_str();
  demo->add_option("--knowledge", arguments->knowledge, "Directory of .jsonl documents")
      ->capture_default_str();
  demo->add_option("--questions", arguments->questions, ".jsonl of question, answers, source")
      ->capture_default_str();
  demo->add_option("--directory", arguments->directory, "Where the store, logs and report.json go")
      ->capture_default_str();
  demo->add_option("--prompt", arguments->prompt, "How a question is put; {} stands for it")
      ->capture_default_str();
  demo->add_option("--references", arguments->references, "Read for each 64 tokens")
      ->capture_default_str();
  demo->add_option("--shown", arguments->shown, "Questions shown side by side")
      ->capture_default_str();
  commands.push_back({demo, [=](const Session& session) { return Demo(session, *arguments); }});
}

}  // namespace memory3
