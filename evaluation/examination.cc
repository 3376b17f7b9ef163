#include "evaluation/examination.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "cli/server_process.h"
#include "cli/text.h"
#include "serving/status.h"
#include "trainer/progress.h"
#include "trainer/qa_metrics.h"

namespace memory3 {
namespace {

constexpr int kLongestAnswer = 24;  // tokens

struct GoldScore {
  double log_likelihood = 0;
  int64_t tokens = 0;
};

absl::StatusOr<GoldScore> ScoreAnswer(const Session& session, v1::InferenceService::Stub& stub,
                                      const AskRequest& question, const std::string& answer) {
  v1::ScoreRequest request;
  request.set_text(PromptOf(question));
  request.set_continuation_text(absl::StrCat(" ", answer));
  *request.mutable_memory() = MemoryOptionsOf(question);
  v1::ScoreResponse response;
  const std::unique_ptr<grpc::ClientContext> context = session.NewContext();
  if (absl::Status status = FromGrpc(stub.Score(context.get(), request, &response)); !status.ok())
    return status;
  return GoldScore{response.log_likelihood(), response.token_logprobs_size()};
}

// A reference of the answer's article, of any of its paragraphs.
bool HoldsTheAnswer(const Answer& read, const EvaluationQuestion& asked) {
  return std::any_of(read.sources.begin(), read.sources.end(), [&](const ReadSource& one) {
    return one.source.title() == asked.title &&
           HoldsAnswer(one.source.text(), asked.question.answer);
  });
}

// The question behind the texts of what was read for it, best last.
std::string WithTexts(const Answer& read, const std::string& prompt) {
  std::string text;
  for (auto one = read.sources.rbegin(); one != read.sources.rend(); ++one)
    absl::StrAppend(&text, one->source.text(), "\n");
  return text + prompt;
}

}  // namespace

absl::Status Examine(const Session& session, v1::InferenceService::Stub& stub,
                     const EvaluationSet& set, const ReadingMode& mode, const std::string& prompt,
                     EvaluationRow* row) {
  const auto nowhere = [](std::string_view) {};
  AnswerSpeed speed;
  double log_likelihood = 0;
  int64_t gold_tokens = 0, found = 0;
  row->questions = 0;
  row->em = row->f1 = 0;
  Progress progress(absl::StrCat(set.name, " ", row->mode), "questions");
  for (const EvaluationQuestion& asked : set.questions) {
    if (Interrupted()) return absl::CancelledError("interrupted");
    AskRequest question;
    question.text = asked.question.question;
    question.prompt = prompt;
    question.max_tokens = kLongestAnswer;
    question.knowledge_base = mode.knowledge_base;
    question.references_per_chunk = mode.references_per_chunk;
    question.with_text = true;
    if (mode.gold) question.document_ids = {asked.document_id};
    if (mode.as_text) {
      question.max_tokens = 1;
      const absl::StatusOr<Answer> read = Ask(session, stub, question, nowhere);
      if (!read.ok()) return read.status();
      found += HoldsTheAnswer(*read, asked) ? 1 : 0;
      question = {.text = WithTexts(*read, PromptOf(question)),
                  .memory = false,
                  .prompt = "{}",
                  .max_tokens = kLongestAnswer};
    }
    const absl::StatusOr<Answer> answer = Ask(session, stub, question, nowhere);
    if (!answer.ok()) return answer.status();
    if (answer->unavailable)
      return absl::UnavailableError("the memory server could not be reached");
    const absl::StatusOr<GoldScore> gold =
        ScoreAnswer(session, stub, question, asked.question.answer);
    if (!gold.ok()) return gold.status();

    ++row->questions;
    row->em += ExactMatch(answer->text, asked.question.answers);
    row->f1 += AnswerF1(answer->text, asked.question.answers);
    if (!mode.as_text) found += HoldsTheAnswer(*answer, asked) ? 1 : 0;
    log_likelihood += gold->log_likelihood;
    gold_tokens += gold->tokens;
    speed.Add(answer->finish);
    progress.Update(row->questions, static_cast<int64_t>(set.questions.size()));
  }
  if (row->questions == 0)
    return absl::InvalidArgumentError(absl::StrCat(set.name, ": no question"));
  const auto questions = static_cast<double>(row->questions);
  row->em /= questions;
  row->f1 /= questions;
  row->nll = gold_tokens > 0 ? -log_likelihood / static_cast<double>(gold_tokens) : 0;
  if (!mode.knowledge_base.empty()) row->recall = static_cast<double>(found) / questions;
  row->ttft_ms = speed.MedianFirstTokenMs();
  row->tokens_per_s = speed.TokensPerSecond();
  return absl::OkStatus();
}

}  // namespace memory3
