// Any bytes as a request's body: an error that says what, or a request that can be sent on.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "inference_server/openai_request.h"
#include "inference_server/openai_response.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view body(reinterpret_cast<const char*>(data), size);
  for (const auto endpoint :
       {memory3::OpenAiEndpoint::kCompletions, memory3::OpenAiEndpoint::kChat}) {
    const auto request = memory3::ParseOpenAiRequest(endpoint, body);
    if (!request.ok()) {
      if (memory3::ToHttpError(request.status()).status != 400) std::abort();
      continue;
    }
    const bool chat = endpoint == memory3::OpenAiEndpoint::kChat;
    if (request->requests.empty() || chat == request->messages.empty()) std::abort();
    for (const auto& one : request->requests) {
      if (chat != (one.prompt_case() == one.PROMPT_NOT_SET)) std::abort();
      if (one.SerializeAsString().empty()) std::abort();  // also refuses broken UTF-8
    }
  }
  return 0;
}
