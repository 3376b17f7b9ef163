#include "transformer/tokenizer.h"

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "transformer/json.h"
#include "transformer/tokenizer_pretokenize.h"
#include "transformer/tokenizer_utf8.h"

namespace memory3 {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int64_t kMax = 64 << 20;
const char* const kBpe[] = {"bpe_llama3", "bpe_qwen2", "bpe_gpt2", "bpe_digits"};

const json& Goldens() {
  static const auto* goldens =
      new json(*ParseJson(*ReadSmallFile("transformer/testdata/tokenizers.json", kMax), "goldens"));
  return *goldens;
}

ModelConfig Config(int vocab_size) {
  ModelConfig c;
  c.vocab_size = vocab_size;
  return c;
}

std::unique_ptr<Tokenizer> OpenBpe(const std::string& name) {
  auto t = OpenTokenizer("transformer/testdata/" + name, Config(1000));
  EXPECT_TRUE(t.ok()) << t.status();
  return t.ok() ? *std::move(t) : nullptr;
}

void ExpectStreamIsDecode(const Tokenizer& t, const std::vector<int32_t>& ids) {
  DecodeStream stream(&t, /*at_start=*/true);
  std::string text;
  for (const int32_t id : ids) {
    const std::string delta = stream.Push(id);
    for (size_t at = 0; at < delta.size();) {
      const Utf8Char c = NextUtf8(std::string_view(delta).substr(at));
      ASSERT_EQ(c.kind, Utf8Char::Kind::kValid);
      at += c.length;
    }
    text += delta;
  }
  text += stream.Finish();
  EXPECT_EQ(text, t.Decode(ids));
}

TEST(BpeTokenizer, GivesTheIdsOfTokenizers) {
  for (const char* name : kBpe) {
    const auto t = OpenBpe(name);
    ASSERT_NE(t, nullptr);
    const json& golden = Goldens()["bpe"][name];
    EXPECT_EQ(t->vocab_size(), golden["vocab_size"]);
    for (size_t i = 0; i < Goldens()["texts"].size(); ++i) {
      const std::string text = Goldens()["texts"][i];
      EXPECT_EQ(t->Encode(text), golden["text"][i].get<std::vector<int32_t>>())
          << name << ": " << text;
      EXPECT_EQ(t->Encode(text, SpecialTokens::kParse),
                golden["parsed"][i].get<std::vector<int32_t>>())
          << name << ": " << text;
      // Byte-level BPE loses nothing.
      EXPECT_EQ(t->Decode(t->Encode(text)), text) << name;
    }
  }
}

TEST(BpeTokenizer, DecodesAsTokenizers) {
  for (const char* name : kBpe) {
    const auto t = OpenBpe(name);
    ASSERT_NE(t, nullptr);
    for (const json& d : Goldens()["bpe"][name]["decoded"]) {
      const auto ids = d["ids"].get<std::vector<int32_t>>();
      EXPECT_EQ(t->Decode(ids), d["text"].get<std::string>()) << name << " " << d["ids"];
      ExpectStreamIsDecode(*t, ids);
    }
  }
}

TEST(BpeTokenizer, KnowsItsSpecialTokens) {
  const auto t = OpenBpe("bpe_llama3");
  ASSERT_NE(t, nullptr);
  EXPECT_EQ(t->bos_id(), 420);
  EXPECT_EQ(t->eos_id(), 421);
  EXPECT_EQ(t->Piece(420), "<|begin_of_text|>");
  EXPECT_EQ(t->TokenId("<|im_start|>"), 422);
  EXPECT_TRUE(t->IsSpecial(422));
  EXPECT_FALSE(t->IsSpecial(424));  // <tool>: added, not special
  EXPECT_EQ(t->TokenBytes(422), "");
  EXPECT_EQ(t->TokenBytes(424), "<tool>");
  EXPECT_EQ(t->TokenBytes(-1), "");
  EXPECT_EQ(t->TokenBytes(1 << 30), "");
  EXPECT_EQ(t->Piece(1 << 30), "");
  EXPECT_EQ(t->TokenId("no such piece"), -1);
  EXPECT_EQ(PrefixTokenIds(*t)[0], 420);
  EXPECT_EQ(t->Decode(PrefixTokenIds(*t)), "Reference:");
}

TEST(BpeTokenizer, EncodesAnyBytes) {
  std::mt19937 random(11);
  for (const char* name : kBpe) {
    const auto t = OpenBpe(name);
    ASSERT_NE(t, nullptr);
    for (int round = 0; round < 200; ++round) {
      std::string text(random() % 40, '\0');
      for (char& c : text) c = static_cast<char>(random());
      std::string back;
      for (const int32_t id : t->Encode(text)) back += t->TokenBytes(id);
      EXPECT_EQ(back, text);
    }
    // One word of a megabyte.
    const std::string word(1 << 20, 'a');
    EXPECT_EQ(t->Decode(t->Encode(word)), word);
  }
}

class BadBpe : public testing::Test {
 protected:
  json j_ = json::parse(*ReadSmallFile("transformer/testdata/bpe_llama3/tokenizer.json", kMax));

  void ExpectRefused(const std::string& field, const std::string& why = "",
                     const std::string& bos = "<|begin_of_text|>") {
    const auto t = MakeBpeTokenizer(j_.dump(), bos, "", "dir/tokenizer.json");
    ASSERT_FALSE(t.ok()) << field;
    EXPECT_EQ(t.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(t.status().message()), HasSubstr("dir/tokenizer.json: " + field));
    EXPECT_THAT(std::string(t.status().message()), HasSubstr(why));
  }
};

TEST_F(BadBpe, TheUntouchedOneIsFine) {
  EXPECT_TRUE(MakeBpeTokenizer(j_.dump(), "<|begin_of_text|>", "", "x").ok());
}
TEST_F(BadBpe, NoBos) {
  ExpectRefused("bos_token", "none", "");
  ExpectRefused("bos_token", "<s>", "<s>");
}
TEST_F(BadBpe, OtherModel) {
  j_["model"]["type"] = "Unigram";
  ExpectRefused("model.type");
}
TEST_F(BadBpe, Dropout) {
  j_["model"]["dropout"] = 0.1;
  ExpectRefused("model.dropout");
}
TEST_F(BadBpe, Suffix) {
  j_["model"]["end_of_word_suffix"] = "</w>";
  ExpectRefused("model.end_of_word_suffix");
}
TEST_F(BadBpe, Vocab) {
  j_["model"]["vocab"] = json::array();
  ExpectRefused("model.vocab");
}
TEST_F(BadBpe, VocabId) {
  for (const json& id : {json(-1), json("3"), json(1.5), json(int64_t{1} << 40)}) {
    j_["model"]["vocab"]["zzz"] = id;
    ExpectRefused("model.vocab", "zzz");
  }
  j_["model"]["vocab"]["zzz"] = 5;
  ExpectRefused("model.vocab", "id 5");
}
TEST_F(BadBpe, MissingByte) {
  j_["model"]["vocab"].erase("\u0120");
  ExpectRefused("model.vocab", "byte 32");
}
TEST_F(BadBpe, Merges) {
  for (const json& merge : {json("ab"), json("a b c"), json(3), json::array({"a"}),
                            json::array({"a", 1}), json::array({"a", "\u4e00"})}) {
    j_["model"]["merges"] = json::array({merge});
    ExpectRefused("model.merges[0]");
  }
  j_["model"]["merges"] = nullptr;
  ExpectRefused("model.merges");
}
TEST_F(BadBpe, Normalizer) {
  j_["normalizer"] = {{"type", "NFC"}};
  ExpectRefused("normalizer", "NFC");
}
TEST_F(BadBpe, Pattern) {
  j_["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "\\w+";
  ExpectRefused("pre_tokenizer.pattern", "\\w+");
}
TEST_F(BadBpe, Behavior) {
  j_["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Removed";
  ExpectRefused("pre_tokenizer.behavior");
}
TEST_F(BadBpe, PrefixSpace) {
  j_["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = true;
  ExpectRefused("pre_tokenizer.add_prefix_space");
}
TEST_F(BadBpe, PreTokenizer) {
  j_["pre_tokenizer"] = {{"type", "Metaspace"}};
  ExpectRefused("pre_tokenizer", "Metaspace");
  j_["pre_tokenizer"] = nullptr;
  ExpectRefused("pre_tokenizer");
}
TEST_F(BadBpe, Decoder) {
  j_["decoder"] = {{"type", "WordPiece"}};
  ExpectRefused("decoder", "WordPiece");
}
TEST_F(BadBpe, AddedTokens) {
  j_["added_tokens"][0]["lstrip"] = true;
  ExpectRefused("added_tokens", "lstrip");
  j_["added_tokens"][0]["lstrip"] = false;
  j_["added_tokens"][0]["id"] = 3;
  ExpectRefused("added_tokens", "id 3");
  j_["added_tokens"][0].erase("content");
  ExpectRefused("added_tokens", "content");
  j_["added_tokens"] = 7;
  ExpectRefused("added_tokens");
}
TEST_F(BadBpe, Damage) {
  const std::string text = j_.dump();
  std::mt19937 random(3);
  for (int round = 0; round < 300; ++round) {
    std::string damaged = text;
    damaged[random() % damaged.size()] = static_cast<char>(random());
    if (round % 10 == 0) damaged.resize(random() % damaged.size());
    const auto t = MakeBpeTokenizer(damaged, "<|begin_of_text|>", "", "x");
    if (t.ok()) (*t)->Encode("The harbour master's 14 ships");
  }
}

TEST(SentencePieceTokenizer, GivesTheIdsOfSentencePiece) {
  const char* data = std::getenv("MEMORY3_DATA");
  int compared = 0, absent = 0;
  for (const auto& [name, golden] : Goldens()["spm"].items()) {
    std::string path = name;
    if (path.starts_with("MEMORY3_DATA"))
      path.replace(0, 12, data != nullptr ? data : "../shared/data");
    if (!fs::exists(path)) {
      ++absent;
      continue;
    }
    ++compared;
    const auto made = MakeSentencePieceTokenizer(*ReadSmallFile(path, kMax), path);
    ASSERT_TRUE(made.ok()) << made.status();
    const Tokenizer& t = **made;
    EXPECT_EQ(t.vocab_size(), golden["vocab_size"]);
    EXPECT_EQ(t.bos_id(), golden["bos"]);
    EXPECT_EQ(t.eos_id(), golden["eos"]);
    EXPECT_NE(t.leading_space(), LeadingSpace::kNone);
    for (size_t i = 0; i < golden["pieces"].size(); ++i) {
      EXPECT_EQ(t.Piece(static_cast<int32_t>(i)), golden["pieces"][i].get<std::string>());
    }
    for (size_t i = 0; i < Goldens()["texts"].size(); ++i) {
      const std::string text = Goldens()["texts"][i];
      EXPECT_EQ(t.Encode(text), golden["text"][i].get<std::vector<int32_t>>())
          << path << ": " << text;
    }
    for (const json& d : golden["decoded"]) {
      const auto ids = d["ids"].get<std::vector<int32_t>>();
      EXPECT_EQ(t.Decode(ids), d["text"].get<std::string>()) << path << " " << d["ids"];
      ExpectStreamIsDecode(t, ids);
    }
  }
  EXPECT_GE(compared, 1);
  if (absent > 0) {
    GTEST_SKIP() << absent << " shared SentencePiece models are not there (MEMORY3_DATA): only the "
                 << "committed one was compared";
  }
}

TEST(SentencePieceTokenizer, StreamsAndSpaces) {
  const std::string path = "transformer/testdata/spm_tiny/tokenizer.model";
  const auto made = MakeSentencePieceTokenizer(*ReadSmallFile(path, kMax), path);
  ASSERT_TRUE(made.ok()) << made.status();
  const Tokenizer& t = **made;
  const std::vector<int32_t> ids = t.Encode("the ship");
  EXPECT_EQ(t.Decode(ids), "the ship");
  // A continuation keeps the space of its first token.
  DecodeStream more(&t, /*at_start=*/false);
  std::string text;
  for (const int32_t id : ids) text += more.Push(id);
  EXPECT_EQ(text + more.Finish(), " the ship");
  // bos says nothing and does not use up the start.
  std::vector<int32_t> with_bos = {t.bos_id()};
  with_bos.insert(with_bos.end(), ids.begin(), ids.end());
  EXPECT_EQ(t.Decode(with_bos), "the ship");
  EXPECT_EQ(t.TokenBytes(t.bos_id()), "");
  EXPECT_TRUE(t.IsSpecial(t.bos_id()));

  // An emoji by bytes: nothing until it is whole; a query drops halves at both ends.
  const std::vector<int32_t> emoji = t.Encode("\U0001f600");
  ASSERT_GE(emoji.size(), 4);
  const std::vector<int32_t> bytes(emoji.end() - 4, emoji.end());
  DecodeStream stream(&t, true);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(stream.Push(bytes[i]), "");
  EXPECT_EQ(stream.Push(bytes[3]), "\U0001f600");
  EXPECT_EQ(stream.Push(bytes[0]), "");
  EXPECT_EQ(stream.Finish(), kReplacementCharacter);
  std::vector<int32_t> cut = {bytes[2], bytes[3]};
  cut.insert(cut.end(), ids.begin(), ids.end());
  cut.push_back(bytes[0]);
  EXPECT_EQ(t.DecodeQuery(cut), " the ship");
  EXPECT_EQ(t.Decode(cut), "\ufffd\ufffd the ship\ufffd");

  EXPECT_THAT(t.Encode("<s>", SpecialTokens::kParse), ElementsAre(t.bos_id()));
  std::vector<int32_t> parsed = t.Encode("the ship</s>", SpecialTokens::kParse);
  EXPECT_EQ(parsed.back(), t.eos_id());
  parsed.pop_back();
  EXPECT_EQ(parsed, ids);
}

TEST(SentencePieceTokenizer, RefusesWhatIsNone) {
  const std::string path = "transformer/testdata/spm_tiny/tokenizer.model";
  const std::string good = *ReadSmallFile(path, kMax);
  for (const std::string& bytes :
       {std::string("nonsense"), good.substr(0, good.size() / 2), std::string(100, '\xff')}) {
    const auto t = MakeSentencePieceTokenizer(bytes, "dir/tokenizer.model");
    ASSERT_FALSE(t.ok());
    EXPECT_THAT(std::string(t.status().message()), HasSubstr("dir/tokenizer.model"));
  }
}

class OpenTokenizerTest : public testing::Test {
 protected:
  void SetUp() override {
    dir_ = fs::path(testing::TempDir()) / ("m3.tokenizer." + std::to_string(::getpid()));
    fs::remove_all(dir_);
    fs::create_directories(dir_);
  }
  void TearDown() override { fs::remove_all(dir_); }
  void ExpectRefused(const std::string& directory, const ModelConfig& c, const std::string& why) {
    const auto t = OpenTokenizer(directory, c);
    ASSERT_FALSE(t.ok());
    EXPECT_THAT(std::string(t.status().message()), HasSubstr(directory));
    EXPECT_THAT(std::string(t.status().message()), HasSubstr(why));
  }
  fs::path dir_;
};

TEST_F(OpenTokenizerTest, HoldsItAgainstTheConfiguration) {
  const std::string spm = "transformer/testdata/spm_tiny";
  ModelConfig c = Config(420);
  c.bos_token_id = 1;
  const auto t = OpenTokenizer(spm, c);
  ASSERT_TRUE(t.ok()) << t.status();
  c.explicit_memory.emplace();
  c.explicit_memory->prefix_token_ids = PrefixTokenIds(**t);
  EXPECT_TRUE(OpenTokenizer(spm, c).ok());
  c.explicit_memory->prefix_token_ids.push_back(3);
  ExpectRefused(spm, c, "prefix_token_ids");
  c.explicit_memory.reset();
  c.bos_token_id = 2;
  ExpectRefused(spm, c, "bos_token_id");
  ExpectRefused(spm, Config(419), "vocab_size");
  ExpectRefused(dir_.string(), Config(420), "neither tokenizer.model nor tokenizer.json");
}

TEST_F(OpenTokenizerTest, TakesBosFromTheModelWithoutTokenizerConfig) {
  fs::copy("transformer/testdata/bpe_llama3/tokenizer.json", dir_ / "tokenizer.json");
  ModelConfig c = Config(1000);
  c.bos_token_id = 420;
  const auto t = OpenTokenizer(dir_.string(), c);
  ASSERT_TRUE(t.ok()) << t.status();
  EXPECT_EQ((*t)->bos_id(), 420);
  c.bos_token_id = 1;  // an ordinary token
  ExpectRefused(dir_.string(), c, "bos_token");
  c.bos_token_id = -1;
  ExpectRefused(dir_.string(), c, "bos_token");
}

TEST(NextUtf8, TellsTheWaysOfBeingWrong) {
  using Kind = Utf8Char::Kind;
  const auto expect = [](std::string_view text, Kind kind, int length, char32_t c = 0xfffd) {
    const Utf8Char got = NextUtf8(text);
    EXPECT_EQ(got.kind, kind) << text;
    EXPECT_EQ(got.length, length) << text;
    EXPECT_EQ(got.code_point, c) << text;
  };
  expect("A", Kind::kValid, 1, 'A');
  expect("\xc3\xa9", Kind::kValid, 2, 0xe9);
  expect("\xe2\x82\xac", Kind::kValid, 3, 0x20ac);
  expect("\xf0\x9f\x98\x80", Kind::kValid, 4, 0x1f600);
  expect("\xf4\x8f\xbf\xbf", Kind::kValid, 4, 0x10ffff);
  expect("\xf0\x9f\x98", Kind::kTruncated, 3);
  expect("\xe2", Kind::kTruncated, 1);
  expect("\xf0\x9f\x98 ", Kind::kBroken, 3);
  expect("\x80", Kind::kBroken, 1);
  expect("\xc0\x80", Kind::kBroken, 1);          // overlong
  expect("\xe0\x80\x80", Kind::kBroken, 1);      // overlong
  expect("\xed\xa0\x80", Kind::kBroken, 1);      // surrogate
  expect("\xf4\x90\x80\x80", Kind::kBroken, 1);  // above 10FFFF
  expect("\xff", Kind::kBroken, 1);
}

}  // namespace
}  // namespace memory3
