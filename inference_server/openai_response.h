// Our own answers as the OpenAI API's: protobuf in, JSON out.
//
// Beyond OpenAI's fields an answer that read memories carries `memory` (knowledge base, version,
// and for every 64-token chunk what it read), and every answer `timings`, milliseconds. Clients
// that do not know them ignore them. docs/http_api.md shows all of it.
//
// Thread-safety: functions; an AnswerStream belongs to one thread.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "inference_server/openai_request.h"
#include "memory3/v1/inference.pb.h"

namespace memory3 {

// What all parts of one answer share.
struct AnswerHeader {
  OpenAiEndpoint endpoint = OpenAiEndpoint::kCompletions;
  std::string id;       // "cmpl-…", "chatcmpl-…"
  std::string model;    // as the client called it
  int64_t created = 0;  // Unix seconds
};

// Adds an event to an answer that is given as a whole.
void AddEvent(const v1::GenerateResponse& event, v1::GenerateUnaryResponse* answer);

// The body of an answer that is not streamed; one of `answers` a choice.
std::string AnswerBody(const AnswerHeader& header,
                       std::span<const v1::GenerateUnaryResponse> answers);

// The events of a streamed answer as server-sent events, each "data: …\n\n", maybe none or several.
class AnswerStream {
 public:
  AnswerStream(AnswerHeader header, int choices, bool include_usage);

  std::string Event(int choice, const v1::GenerateResponse& event);
  // When every choice has had its Finish: the usage if wanted, and "[DONE]".
  std::string End();
  // Instead of all that is left.
  static std::string Error(const absl::Status& status);

 private:
  struct Choice {
    bool begun = false;
    size_t text_offset = 0;  // characters, of the next token with a logprob
  };

  const AnswerHeader header_;
  const bool include_usage_;
  std::vector<Choice> choices_;
  v1::Usage usage_;
};

std::string ModelsBody(const v1::GetModelResponse& model, int64_t created);
std::string ModelBody(const v1::GetModelResponse& model, const std::string& id, int64_t created);

// A status as HTTP says it.
struct HttpError {
  int status = 500;
  std::string body;  // {"error": {"message", "type", "param", "code"}}
};
HttpError ToHttpError(const absl::Status& status);

// The status that stands for "there is no such model here", with OpenAI's code for it.
absl::Status NoSuchModel(const std::string& asked, const std::string& served);

}  // namespace memory3
