#include "cli/question.h"

#include <algorithm>
#include <tuple>

#include "absl/strings/str_replace.h"
#include "serving/duration.h"
#include "serving/status.h"

namespace memory3 {
namespace {

v1::GenerateRequest ToRequest(const AskRequest& question) {
  v1::GenerateRequest request;
  request.set_text(PromptOf(question));
  *request.mutable_memory() = MemoryOptionsOf(question);
  request.mutable_sampling()->set_temperature(question.temperature);
  v1::StopOptions& stopping = *request.mutable_stopping();
  stopping.set_max_new_tokens(static_cast<uint32_t>(question.max_tokens));
  for (const std::string& stop : question.stop) stopping.add_stop(stop);
  return request;
}

void AddSources(const v1::ChunkProvenance& chunk, Answer& answer) {
  answer.unavailable = answer.unavailable || chunk.unavailable();
  for (const v1::ChunkProvenance::Memory& memory : chunk.memories()) {
    for (const v1::Source& source : memory.sources()) {
      const auto same = [&](const ReadSource& other) {
        return std::tuple(other.source.document_id(), other.source.ordinal()) ==
               std::tuple(source.document_id(), source.ordinal());
      };
      const auto found = std::find_if(answer.sources.begin(), answer.sources.end(), same);
      if (found == answer.sources.end()) {
        answer.sources.push_back({source, memory.score()});
      } else {
        found->score = std::max(found->score, memory.score());
      }
    }
  }
}

}  // namespace

void AnswerSpeed::Add(const v1::Finish& finish) {
  first_token_ms_.push_back(Milliseconds(finish.timings().time_to_first_token()));
  decode_ms_ += Milliseconds(finish.timings().decode());
  // The first token comes out of the prefill.
  decoded_tokens_ += std::max(1U, finish.usage().completion_tokens()) - 1;
}

double AnswerSpeed::MedianFirstTokenMs() const {
  if (first_token_ms_.empty()) return 0;
  std::vector<double> values = first_token_ms_;
  const auto middle = values.begin() + static_cast<ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

double AnswerSpeed::TokensPerSecond() const {
  return decode_ms_ > 0 ? 1000 * static_cast<double>(decoded_tokens_) / decode_ms_ : 0;
}

std::string PromptOf(const AskRequest& question) {
  return absl::StrReplaceAll(question.prompt, {{"{}", question.text}});
}

v1::MemoryOptions MemoryOptionsOf(const AskRequest& question) {
  v1::MemoryOptions memory;
  memory.set_enabled(question.memory && !question.knowledge_base.empty());
  if (!memory.enabled()) return memory;
  memory.set_knowledge_base(question.knowledge_base);
  if (question.references_per_chunk.has_value())
    memory.set_references_per_chunk(*question.references_per_chunk);
  for (const std::string& id : question.document_ids) memory.mutable_filter()->add_document_ids(id);
  memory.set_with_text(question.with_text);
  return memory;
}

absl::StatusOr<Answer> Ask(const Session& session, v1::InferenceService::Stub& stub,
                           const AskRequest& question,
                           const std::function<void(std::string_view)>& piece,
                           const std::function<void(const v1::GenerateResponse&)>& event) {
  const std::unique_ptr<grpc::ClientContext> context = session.NewContext();
  const auto reader = stub.Generate(context.get(), ToRequest(question));
  Answer answer;
  v1::GenerateResponse response;
  while (reader->Read(&response)) {
    if (event) event(response);
    switch (response.event_case()) {
      case v1::GenerateResponse::kDelta: {
        std::string_view text = response.delta().text();
        if (answer.text.empty())  // the space between "Answer:" and the answer
          text.remove_prefix(std::min(text.find_first_not_of(' '), text.size()));
        answer.text += text;
        if (!text.empty()) piece(text);
        break;
      }
      case v1::GenerateResponse::kProvenance:
        AddSources(response.provenance(), answer);
        break;
      case v1::GenerateResponse::kFinish:
        answer.finish = response.finish();
        break;
      default:
        break;
    }
  }
  if (absl::Status status = FromGrpc(reader->Finish()); !status.ok()) return status;
  std::stable_sort(answer.sources.begin(), answer.sources.end(),
                   [](const ReadSource& a, const ReadSource& b) { return a.score > b.score; });
  return answer;
}

}  // namespace memory3
