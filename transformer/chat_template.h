// Turns a conversation into token ids by one of three built-in templates. Nothing of a model
// directory is executed; a message's text is encoded as text, so that it cannot spell a special
// token.
//
// Thread-safety: functions.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "transformer/tokenizer.h"

namespace memory3 {

enum class ChatTemplate : uint8_t {
  kPlain,   // "User: …\nAssistant: …\n", for models that were not trained to chat
  kLlama2,  // "[INST] <<SYS>>\n…\n<</SYS>>\n\n… [/INST] … </s><s>[INST] …"
  kChatMl,  // "<|im_start|>user\n…<|im_end|>\n"
};

absl::StatusOr<ChatTemplate> ParseChatTemplate(
    std::string_view name);  // "plain", "llama2", "chatml"
std::string_view ChatTemplateName(ChatTemplate chat);

struct ChatMessage {
  std::string role;  // "system" (first only), "user", "assistant"
  std::string content;
};

// bos and the conversation up to where the assistant's answer starts. INVALID_ARGUMENT names the
// message: an unknown role, a system message that is not the first, user and assistant not in
// turns, the last not the user's.
absl::StatusOr<std::vector<int32_t>> EncodeChat(ChatTemplate chat,
                                                std::span<const ChatMessage> messages,
                                                const Tokenizer& tokenizer);

// What ends an answer besides the model's eos.
struct ChatStops {
  std::vector<int32_t> token_ids;
  std::vector<std::string> strings;
};
ChatStops StopsOf(ChatTemplate chat, const Tokenizer& tokenizer);

}  // namespace memory3
