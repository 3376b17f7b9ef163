#include "transformer/chat_template.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "transformer/json.h"

namespace memory3 {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr int64_t kMax = 16 << 20;

std::unique_ptr<Tokenizer> Spm() {
  const std::string path = "transformer/testdata/spm_tiny/tokenizer.model";
  return *MakeSentencePieceTokenizer(*ReadSmallFile(path, kMax), path);
}
std::unique_ptr<Tokenizer> Bpe(const std::string& name, const std::string& bos) {
  const std::string path = "transformer/testdata/" + name + "/tokenizer.json";
  return *MakeBpeTokenizer(*ReadSmallFile(path, kMax), bos, "", path);
}

const std::vector<ChatMessage> kTalk = {{"system", "Be brief."},
                                        {"user", "Hi"},
                                        {"assistant", "Hello."},
                                        {"user", "Where is <|im_end|> the ship?"}};

// The ids with special tokens spelled out.
std::string Spelled(const Tokenizer& t, const std::vector<int32_t>& ids) {
  std::string out;
  for (const int32_t id : ids) out += t.IsSpecial(id) ? t.Piece(id) : t.TokenBytes(id);
  return out;
}

TEST(ChatTemplate, ChatMl) {
  const auto t = Bpe("bpe_llama3", "<|begin_of_text|>");
  const auto ids = EncodeChat(ChatTemplate::kChatMl, kTalk, *t);
  ASSERT_TRUE(ids.ok()) << ids.status();
  EXPECT_EQ(
      Spelled(*t, *ids),
      "<|begin_of_text|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
      "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nWhere is <|im_end|> the "
      "ship?<|im_end|>\n<|im_start|>assistant\n");
  // The message that spells <|im_end|> does not end there.
  EXPECT_EQ(std::count(ids->begin(), ids->end(), t->TokenId("<|im_end|>")), 4);
  EXPECT_EQ(std::count(ids->begin(), ids->end(), t->TokenId("<|im_start|>")), 5);
  const ChatStops stops = StopsOf(ChatTemplate::kChatMl, *t);
  EXPECT_THAT(stops.token_ids, ElementsAre(t->TokenId("<|im_end|>")));
  EXPECT_THAT(stops.strings, IsEmpty());
}

TEST(ChatTemplate, ChatMlWhereBosIsImStart) {
  const auto t = Bpe("bpe_digits", "<|im_start|>");
  const auto ids = EncodeChat(ChatTemplate::kChatMl, std::vector<ChatMessage>{{"user", "Hi"}}, *t);
  ASSERT_TRUE(ids.ok());
  EXPECT_EQ(Spelled(*t, *ids), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
}

TEST(ChatTemplate, ChatMlWithoutItsTokens) {
  const auto t = Spm();
  const auto ids = EncodeChat(ChatTemplate::kChatMl, std::vector<ChatMessage>{{"user", "Hi"}}, *t);
  ASSERT_TRUE(ids.ok());
  EXPECT_EQ(t->Decode(*ids), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
  EXPECT_THAT(StopsOf(ChatTemplate::kChatMl, *t).strings, ElementsAre("<|im_end|>"));
}

TEST(ChatTemplate, Llama2) {
  const auto t = Spm();
  const auto ids = EncodeChat(ChatTemplate::kLlama2, kTalk, *t);
  ASSERT_TRUE(ids.ok()) << ids.status();
  std::vector<int32_t> want = {t->bos_id()};
  const auto add = [&](std::string_view text) {
    for (const int32_t id : t->Encode(text)) want.push_back(id);
  };
  // Meta: bos, encode("[INST] … [/INST] answer "), eos, bos, encode("[INST] … [/INST]").
  add("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello. ");
  want.push_back(t->eos_id());
  want.push_back(t->bos_id());
  add("[INST] Where is <|im_end|> the ship? [/INST]");
  EXPECT_EQ(*ids, want);
}

TEST(ChatTemplate, Plain) {
  const auto t = Spm();
  const auto ids = EncodeChat(ChatTemplate::kPlain, kTalk, *t);
  ASSERT_TRUE(ids.ok());
  EXPECT_EQ((*ids)[0], t->bos_id());
  EXPECT_EQ(
      t->Decode(*ids),
      "Be brief.\n\nUser: Hi\nAssistant: Hello.\nUser: Where is <|im_end|> the ship?\nAssistant:");
  EXPECT_THAT(StopsOf(ChatTemplate::kPlain, *t).strings, ElementsAre("\nUser:"));
}

TEST(ChatTemplate, NamesTheMessageAtFault) {
  const auto t = Spm();
  const auto expect = [&](const std::vector<ChatMessage>& messages, const std::string& what) {
    const auto ids = EncodeChat(ChatTemplate::kPlain, messages, *t);
    ASSERT_FALSE(ids.ok());
    EXPECT_EQ(ids.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(ids.status().message()), HasSubstr(what));
  };
  expect({}, "messages: empty");
  expect({{"system", "x"}}, "messages[0].role: the last");
  expect({{"assistant", "x"}}, "messages[0].role: 'assistant' where 'user'");
  expect({{"user", "x"}, {"user", "y"}}, "messages[1].role");
  expect({{"user", "x"}, {"system", "y"}}, "messages[1].role: a system");
  expect({{"user", "x"}, {"assistant", "y"}}, "messages[1].role: the last");
  expect({{"tool", "x"}}, "messages[0].role: 'tool'");
}

TEST(ChatTemplate, Names) {
  for (const char* name : {"plain", "llama2", "chatml"}) {
    EXPECT_EQ(ChatTemplateName(*ParseChatTemplate(name)), name);
  }
  EXPECT_THAT(std::string(ParseChatTemplate("jinja").status().message()), HasSubstr("'jinja'"));
}

}  // namespace
}  // namespace memory3
