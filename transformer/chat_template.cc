#include "transformer/chat_template.h"

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace memory3 {
namespace {

constexpr char kImStart[] = "<|im_start|>";
constexpr char kImEnd[] = "<|im_end|>";

absl::Status CheckMessages(std::span<const ChatMessage> messages) {
  if (messages.empty()) return absl::InvalidArgumentError("messages: empty");
  size_t turn = 0;
  for (size_t i = 0; i < messages.size(); ++i) {
    const std::string& role = messages[i].role;
    if (role == "system") {
      if (i == 0) continue;
      return absl::InvalidArgumentError(
          absl::StrCat("messages[", i, "].role: a system message must be the first"));
    }
    if (role != "user" && role != "assistant") {
      return absl::InvalidArgumentError(
          absl::StrCat("messages[", i, "].role: '", role, "' is none of system, user, assistant"));
    }
    const char* expected = turn++ % 2 == 0 ? "user" : "assistant";
    if (role != expected) {
      return absl::InvalidArgumentError(
          absl::StrCat("messages[", i, "].role: '", role, "' where '", expected, "' is due"));
    }
  }
  if (messages.back().role != "user") {
    return absl::InvalidArgumentError(absl::StrCat("messages[", messages.size() - 1,
                                                   "].role: the last message must be the user's"));
  }
  return absl::OkStatus();
}

// Collects text and special tokens; text between two special tokens is encoded in one piece.
class Writer {
 public:
  explicit Writer(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

  void Text(std::string_view text) { text_ += text; }
  void Token(int32_t id) {
    Flush();
    ids_.push_back(id);
  }
  // The token of this spelling, or the spelling where the tokenizer has no such special token.
  void Special(std::string_view spelling) {
    const int32_t id = tokenizer_.TokenId(spelling);
    if (tokenizer_.IsSpecial(id)) {
      Token(id);
    } else {
      Text(spelling);
    }
  }
  std::vector<int32_t> Finish() {
    Flush();
    return std::move(ids_);
  }

 private:
  void Flush() {
    if (text_.empty()) return;
    for (const int32_t id : tokenizer_.Encode(text_)) ids_.push_back(id);
    text_.clear();
  }

  const Tokenizer& tokenizer_;
  std::string text_;
  std::vector<int32_t> ids_;
};

std::string_view Stripped(std::string_view text) {
  constexpr std::string_view kSpace = " \t\r\n\v\f";
  const size_t begin = text.find_first_not_of(kSpace);
  if (begin == std::string_view::npos) return "";
  return text.substr(begin, text.find_last_not_of(kSpace) + 1 - begin);
}

void WritePlain(std::span<const ChatMessage> messages, Writer* w) {
  for (const ChatMessage& m : messages) {
    if (m.role == "system") {
      w->Text(absl::StrCat(m.content, "\n\n"));
    } else {
      w->Text(absl::StrCat(m.role == "user" ? "User: " : "Assistant: ", m.content, "\n"));
    }
  }
  w->Text("Assistant:");
}

// As Meta's own code for Llama 2: every exchange begins with bos and ends with eos.
void WriteLlama2(std::span<const ChatMessage> messages, const Tokenizer& tokenizer, Writer* w) {
  std::string system;
  bool first = true;
  for (const ChatMessage& m : messages) {
    if (m.role == "system") {
      system = absl::StrCat("<<SYS>>\n", m.content, "\n<</SYS>>\n\n");
    } else if (m.role == "user") {
      if (!first) w->Token(tokenizer.bos_id());
      w->Text(absl::StrCat("[INST] ", std::string(Stripped(std::exchange(system, "") + m.content)),
                           " [/INST]"));
      first = false;
    } else {
      w->Text(absl::StrCat(" ", std::string(Stripped(m.content)), " "));
      if (tokenizer.eos_id() >= 0) w->Token(tokenizer.eos_id());
    }
  }
}

void WriteChatMl(std::span<const ChatMessage> messages, Writer* w) {
  for (const ChatMessage& m : messages) {
    w->Special(kImStart);
    w->Text(absl::StrCat(m.role, "\n", m.content));
    w->Special(kImEnd);
    w->Text("\n");
  }
  w->Special(kImStart);
  w->Text("assistant\n");
}

}  // namespace

absl::StatusOr<ChatTemplate> ParseChatTemplate(std::string_view name) {
  for (const ChatTemplate chat :
       {ChatTemplate::kPlain, ChatTemplate::kLlama2, ChatTemplate::kChatMl}) {
    if (ChatTemplateName(chat) == name) return chat;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("chat template '", std::string(name), "' is none of plain, llama2, chatml"));
}

std::string_view ChatTemplateName(ChatTemplate chat) {
  switch (chat) {
    case ChatTemplate::kPlain:
      return "plain";
    case ChatTemplate::kLlama2:
      return "llama2";
    case ChatTemplate::kChatMl:
      return "chatml";
  }
  return "";
}

absl::StatusOr<std::vector<int32_t>> EncodeChat(ChatTemplate chat,
                                                std::span<const ChatMessage> messages,
                                                const Tokenizer& tokenizer) {
  if (auto status = CheckMessages(messages); !status.ok()) return status;
  Writer w(tokenizer);
  // Some models' bos is <|im_start|>: it comes once.
  if (chat != ChatTemplate::kChatMl || tokenizer.bos_id() != tokenizer.TokenId(kImStart)) {
    w.Token(tokenizer.bos_id());
  }
  switch (chat) {
    case ChatTemplate::kPlain:
      WritePlain(messages, &w);
      break;
    case ChatTemplate::kLlama2:
      WriteLlama2(messages, tokenizer, &w);
      break;
    case ChatTemplate::kChatMl:
      WriteChatMl(messages, &w);
      break;
  }
  return w.Finish();
}

ChatStops StopsOf(ChatTemplate chat, const Tokenizer& tokenizer) {
  ChatStops stops;
  if (chat == ChatTemplate::kPlain) {
    stops.strings.emplace_back("\nUser:");
  } else if (chat == ChatTemplate::kChatMl) {
    if (const int32_t id = tokenizer.TokenId(kImEnd); tokenizer.IsSpecial(id)) {
      stops.token_ids.push_back(id);
    } else {
      stops.strings.emplace_back(kImEnd);
    }
  }
  return stops;
}

}  // namespace memory3
