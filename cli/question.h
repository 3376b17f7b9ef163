// One question put to the inference server, its answer streamed, with what was read for it.
//
// Thread-safety: Ask from any thread, with a stub of its own or shared.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "cli/session.h"
#include "trainer/qa_data.h"

namespace memory3 {

struct AskRequest {
  std::string text;
  std::string knowledge_base;  // empty: none
  bool memory = true;
  // How a question becomes a prompt; {} stands for it.
  std::string prompt = QaPrompt("{}");  // as models are trained to be asked
  int max_tokens = 64;
  float temperature = 0;
  std::vector<std::string> stop = {"\n"};
  std::optional<uint32_t> references_per_chunk;  // default: the model's
  std::vector<std::string> document_ids;         // only these documents are read; empty: all
  bool with_text = false;                        // sources carry the references' text
};

struct ReadSource {
  v1::Source source;
  float score = 0;
};

struct Answer {
  std::string text;
  std::vector<ReadSource> sources;  // of all chunks, each document's range once, by falling score
  bool unavailable = false;         // a chunk went without: the memory server could not be reached
  v1::Finish finish;
};

// The speed of answers, by the server's clock.
class AnswerSpeed {
 public:
  void Add(const v1::Finish& finish);
  double MedianFirstTokenMs() const;  // 0: no answer yet
  double TokensPerSecond() const;     // while decoding; 0: nothing was decoded

 private:
  std::vector<double> first_token_ms_;
  double decode_ms_ = 0;
  uint64_t decoded_tokens_ = 0;
};

std::string PromptOf(const AskRequest& question);
v1::MemoryOptions MemoryOptionsOf(const AskRequest& question);

// `piece` is given the answer's text as it comes; `event` (may be null) every message as it is.
absl::StatusOr<Answer> Ask(const Session& session, v1::InferenceService::Stub& stub,
                           const AskRequest& question,
                           const std::function<void(std::string_view)>& piece,
                           const std::function<void(const v1::GenerateResponse&)>& event = nullptr);

}  // namespace memory3
