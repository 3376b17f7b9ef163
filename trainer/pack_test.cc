// Shards hold what went in and refuse damage; what is held out never gets in.
#include "trainer/pack.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <set>

#include "absl/strings/str_cat.h"
#include "trainer/random.h"
#include "trainer/sentencepiece_training.h"
#include "trainer/token_shard.h"

namespace memory3 {
namespace {

using ::testing::HasSubstr;
namespace fs = std::filesystem;

class PackTest : public ::testing::Test {
 protected:
  void SetUp() override {
    directory_ = fs::path(::testing::TempDir()) / absl::StrCat("pack_", getpid());
    fs::remove_all(directory_);
    fs::create_directories(directory_);
  }
  void TearDown() override { fs::remove_all(directory_); }
  std::string Path(const std::string& name) const { return (directory_ / name).string(); }

  fs::path directory_;
};

std::vector<std::string> Text() {
  std::vector<std::string> lines;
  Random random({5});
  const char* const words[] = {"river", "lantern", "copper", "the",  "of",    "a", "walks",
                               "under", "garden",  "seven",  "blue", "stone", "in"};
  for (int i = 0; i < 400; ++i) {
    std::string line;
    for (int w = 0; w < 12; ++w) absl::StrAppend(&line, w ? " " : "", words[random.Below(13)]);
    lines.push_back(line);
  }
  return lines;
}

const std::string& Model() {
  static const std::string model = [] {
    std::string bytes, error;
    EXPECT_TRUE(TrainSentencePiece(Text(), 320, 1, &bytes, &error)) << error;
    return bytes;
  }();
  return model;
}

std::unique_ptr<Tokenizer> TestTokenizer() {
  return MakeSentencePieceTokenizer(Model(), "test").value();
}

TEST_F(PackTest, TheTokenizerTrainedKeepsAnyTextWhole) {
  const auto tokenizer = TestTokenizer();
  EXPECT_EQ(tokenizer->vocab_size(), 320);
  EXPECT_EQ(tokenizer->bos_id(), 1);
  EXPECT_EQ(tokenizer->eos_id(), 2);
  for (const std::string text :
       {"the blue river", "line\nline\n\n  two spaces", "Größe 漢字 🙂 42"}) {
    EXPECT_EQ(tokenizer->Decode(tokenizer->Encode(text)), text);
  }
  EXPECT_LT(tokenizer->Encode("the blue river walks under the stone garden").size(), 20u);
}

TEST_F(PackTest, TooLittleTextForTheVocabularyIsAnError) {
  std::string model, error;
  EXPECT_FALSE(TrainSentencePiece({"a b c"}, 32000, 1, &model, &error));
  EXPECT_THAT(error, HasSubstr("ocab"));
}

TEST_F(PackTest, ShardsHoldDocumentsAndLeaveOutWhatIsHeldOut) {
  {
    std::ofstream file(Path("d.jsonl"));
    for (int i = 0; i < 50; ++i) {
      file << "{\"id\": " << i << ", \"title\": \"Title " << i << "\", \"text\": \"the river " << i
           << "\\nunder stone\"}\n";
    }
    std::ofstream titles(Path("titles.jsonl"));
    titles << "{\"title\": \"Title_7\", \"question\": \"?\"}\n";
  }
  const auto tokenizer = TestTokenizer();
  const HoldOut hold_out = ParseHoldOut("10:3", {Path("titles.jsonl")}).value();
  PackOptions options;
  options.shard_tokens = 300;
  options.threads = 2;
  const auto pack = [&](const std::string& to) {
    auto reader = DocumentReader::Open({Path("d.jsonl")}).value();
    return PackDocuments(reader.get(), hold_out, *tokenizer, Path(to), options, nullptr);
  };
  const absl::StatusOr<PackCounts> counts = pack("s");
  ASSERT_TRUE(counts.ok()) << counts.status();
  EXPECT_EQ(counts->documents, 44);
  EXPECT_EQ(counts->held_out, 6);
  EXPECT_GT(counts->shards, 1);
  std::set<std::string> seen;
  const std::vector<std::string> paths = ShardPaths({Path("s")}).value();
  for (const std::string& path : paths) {
    const auto shard = TokenShard::Open(path);
    ASSERT_TRUE(shard.ok()) << shard.status();
    EXPECT_EQ((*shard)->tokenizer(), tokenizer->file_hash());
    for (uint64_t d = 0; d < (*shard)->documents(); ++d) {
      const ShardDocument document = (*shard)->document(d);
      seen.insert(std::string(document.id));
      EXPECT_EQ(document.title, absl::StrCat("Title ", std::string(document.id)));
      std::vector<int32_t> ids(document.tokens);
      (*shard)->Copy(document.first, ids);
      EXPECT_EQ(ids.back(), tokenizer->eos_id());
      EXPECT_EQ(tokenizer->Decode(ids),
                absl::StrCat("Title ", std::string(document.id), "\n\nthe river ",
                             std::string(document.id), "\nunder stone"));
      for (const uint64_t i : {document.first, document.first + document.tokens - 1}) {
        EXPECT_EQ((*shard)->DocumentOf(i), d);
      }
    }
  }
  EXPECT_EQ(seen.size(), 44u);
  for (const char* id : {"3", "13", "23", "33", "43", "7"}) EXPECT_FALSE(seen.contains(id)) << id;

  EXPECT_EQ(pack("s").status().code(), absl::StatusCode::kAlreadyExists);
  options.only_held_out = true;
  EXPECT_EQ(pack("held")->documents, 6);
}

TEST_F(PackTest, ADamagedShardIsRefusedByName) {
  TokenShardBuilder builder(Sha256Of("t"), 70000);  // 4 bytes a token
  const std::vector<int32_t> ids = {5, 69999, 7};
  ASSERT_TRUE(builder.Add("a", "A", ids).ok());
  EXPECT_FALSE(builder.Add("b", "B", std::vector<int32_t>{70000}).ok());
  const std::string path = Path("x.m3s");
  ASSERT_TRUE(builder.Write(path).ok());
  EXPECT_EQ(TokenShard::Open(path).value()->token(1), 69999);
  std::string bytes;
  {
    std::ifstream in(path, std::ios::binary);
    bytes.assign(std::istreambuf_iterator<char>(in), {});
  }
  const auto open_with = [&](const std::string& content) {
    std::ofstream(path, std::ios::binary) << content;
    return TokenShard::Open(path).status();
  };
  for (size_t i = 0; i < bytes.size(); ++i) {
    std::string damaged = bytes;
    damaged[i] = static_cast<char>(damaged[i] ^ 4);
    const absl::Status status = open_with(damaged);
    EXPECT_FALSE(status.ok()) << "byte " << i;
    EXPECT_THAT(std::string(status.message()), HasSubstr("x.m3s"));
  }
  for (const size_t n : {size_t{0}, size_t{50}, bytes.size() - 1}) {
    EXPECT_EQ(open_with(bytes.substr(0, n)).code(), absl::StatusCode::kDataLoss) << n;
  }
  EXPECT_EQ(TokenShard::Open(Path("none")).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(PackTest, BadHoldOutsNameTheFlag) {
  for (const char* bad : {"10", "10:10", "0:0", "a:b", "10:3:1", "10:-1"}) {
    EXPECT_THAT(std::string(ParseHoldOut(bad, {}).status().message()), HasSubstr("hold_out_ids"));
  }
}

TEST_F(PackTest, OfRealArticlesNoneIsHeldOutByIdOrSquadTitle) {
  const char* data = std::getenv("MEMORY3_DATA");
  const fs::path root = data != nullptr ? data : "../shared/data";
  if (!fs::exists(root / "enwiki/articles-7.jsonl.zst")) {
    GTEST_SKIP() << "SKIPPED: no shared data; set MEMORY3_DATA";
  }
  const HoldOut hold_out = ParseHoldOut("10:3", {(root / "qa/squad.jsonl.zst").string()}).value();
  auto reader = DocumentReader::Open({(root / "enwiki/articles-7.jsonl.zst").string()}).value();
  Document document;
  int kept = 0, held_out = 0;
  while (kept < 600) {
    const absl::StatusOr<bool> next = reader->Next(&document);
    ASSERT_TRUE(next.ok() && *next) << next.status();
    const bool by_id = std::stoll(document.id) % 10 == 3;
    const bool out = hold_out.Contains(document);
    EXPECT_TRUE(out || !by_id) << document.id;
    (out ? held_out : kept) += 1;
  }
  EXPECT_GT(held_out, 30);
}

}  // namespace
}  // namespace memory3
