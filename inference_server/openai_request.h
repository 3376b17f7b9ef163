// What clients of the OpenAI API send, as requests of our own: JSON in, protobuf out.
//
// Strict, as OpenAI's own servers are: a field that nobody knows is refused, so that a misspelt one
// is not silently without effect. Fields that concern OpenAI's service and not the text (user,
// metadata, …) are accepted; those that would change the text and are not supported are refused
// unless they say what is the case anyway (n = 1, tools = []). `null` is as good as absent. What is
// accepted beyond OpenAI's: the object `memory`, and top_k, min_p, repetition_penalty, min_tokens,
// stop_token_ids and ignore_eos as vLLM spells them. docs/http_api.md lists all of them.
//
// Errors: INVALID_ARGUMENT; the message begins with the field's name (OpenAiParam finds it).
// Thread-safety: functions.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "memory3/v1/inference.pb.h"
#include "transformer/chat_template.h"

namespace memory3 {

enum class OpenAiEndpoint : uint8_t { kCompletions, kChat };

inline constexpr int kMaxPrompts = 64;  // of one completion request

struct OpenAiRequest {
  OpenAiEndpoint endpoint = OpenAiEndpoint::kCompletions;
  std::string model;
  // One a choice. Completions: one for each prompt, all with the same options. Chat: one, whose
  // prompt is still to be made from `messages`.
  std::vector<v1::GenerateRequest> requests;
  std::vector<ChatMessage> messages;
  bool stream = false;
  bool include_usage = false;  // of a stream: a last chunk with the token counts
};

// `body`: the request's JSON. Limits of the model (vocabulary, context) are not checked here.
absl::StatusOr<OpenAiRequest> ParseOpenAiRequest(OpenAiEndpoint endpoint, std::string_view body);

// The field a message is about, by OpenAI's name ("max_tokens", "memory.min_score"); empty where it
// names none. Messages of the engine, which name protobuf fields, are understood as well.
std::string OpenAiParam(std::string_view message);

}  // namespace memory3
