// Groups of questions that share references, and the clozes they are filled with.
#include "trainer/qa_groups.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <set>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "trainer/cloze.h"
#include "transformer/parameters.h"
#include "transformer/training_step.h"

namespace memory3 {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::SizeIs;
namespace fs = std::filesystem;

CutReference Reference(const std::string& title, const std::string& body) {
  return {.begin = 0, .end = body.size(), .text = absl::StrCat(title, "\n", body), .token_ids = {}};
}

// All different clozes of many tries.
std::map<std::string, std::string> Clozes(const CutReference& reference) {
  std::map<std::string, std::string> found;
  for (uint64_t i = 0; i < 4000; ++i) {
    Random random({7, i});
    const Cloze cloze = TryCloze(reference, &random);
    if (!cloze.question.empty()) found[cloze.question] = cloze.answer;
  }
  return found;
}

TEST(ClozeTest, AsksAsPeopleDo) {
  const auto clozes = Clozes(Reference(
      "Blue Lantern",
      "The lamp was designed by Ada Quill in 1871 near the old harbour of Port Ember. It burned "
      "for 317 nights, and on 4 June 1902 the keeper put it out."));
  const auto answer = [&](const std::string& question) {
    const auto found = clozes.find(question);
    return found == clozes.end() ? "" : found->second;
  };
  EXPECT_EQ(answer("Who designed Blue Lantern?"), "Ada Quill");
  EXPECT_EQ(answer("who designed blue lantern?"), "Ada Quill");
  EXPECT_EQ(answer("Who designed The lamp?"), "Ada Quill");
  std::set<std::string> answers;
  for (const auto& [question, found] : clozes) {
    answers.insert(found);
    EXPECT_EQ(question.find(found), std::string::npos) << question;
    EXPECT_THAT(question, ::testing::EndsWith("?"));
    const std::string lower = absl::AsciiStrToLower(question);
    if (found == "1871" && !absl::StrContains(lower, "what")) {
      EXPECT_TRUE(absl::StrContains(lower, "when") || absl::StrContains(lower, "year")) << question;
    }
    if (found == "4 June 1902" && !absl::StrContains(lower, "what")) {
      EXPECT_THAT(lower, HasSubstr("when"));
    }
    if (found == "317" && !absl::StrContains(lower, "what")) {
      EXPECT_THAT(lower, HasSubstr("how many"));
    }
  }
  EXPECT_THAT(answers, ::testing::IsSupersetOf({"Ada Quill", "1871", "Port Ember", "317"}));
}

TEST(ClozeTest, WhatStandsTwiceIsNotAskedFor) {
  const auto clozes = Clozes(Reference(
      "",
      "In the north lives Bran Holt, whom the south calls Bran Holt as well; the river Ister "
      "runs between them and nobody ever swims in it."));
  ASSERT_FALSE(clozes.empty());
  for (const auto& [question, answer] : clozes)
    EXPECT_THAT(answer, Not(HasSubstr("Bran"))) << question;
}

TEST(ClozeTest, AShortOrEmptyTextGivesNone) {
  EXPECT_THAT(Clozes(Reference("Title", "")), IsEmpty());
  EXPECT_THAT(Clozes(Reference("", "Anna came.")), IsEmpty());
}

ModelConfig TinyConfig(int vocab) {
  ModelConfig c;
  c.vocab_size = vocab;
  c.hidden_size = 32;
  c.intermediate_size = 64;
  c.layers = 2;
  c.heads = 4;
  c.kv_heads = 2;
  c.head_dim = 8;
  c.bos_token_id = 1;
  c.eos_token_ids = {2};
  c.tie_word_embeddings = true;
  c.explicit_memory = ExplicitMemoryConfig{.memory_layers = {0, 1}, .prefix_token_ids = {1, 5, 6}};
  return c;
}

class QaGroupsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    directory_ = fs::path(::testing::TempDir()) / absl::StrCat("qa_groups_", getpid());
    fs::create_directories(directory_);
    tokenizer_ = OpenTokenizer("transformer/testdata/spm_tiny", {.vocab_size = 1 << 20}).value();
    embedder_ = MakeEmbedder("lexical").value();
    std::ofstream questions(directory_ / "questions.jsonl");
    std::ofstream texts(directory_ / "texts.jsonl");
    for (int i = 0; i < 24; ++i) {
      const std::string town =
          absl::StrCat("Town ", std::string(1, static_cast<char>('A' + i / 3)));
      const std::string passage =
          absl::StrCat("It lies by a river named River", i,
                       " in the north of the old land. Many people live here since long ago. It "
                       "was built in the year 1",
                       i, "00 by founder ", i, " and his friend Peter", i, ".");
      questions << json{{"question", absl::StrCat("Who founded ", town, " at River", i, "?")},
                        {"answers", {absl::StrCat("founder ", i)}},
                        {"answer_found", absl::StrCat("founder ", i)},
                        {"title", town},
                        {"passage", passage},
                        {"doc_id", i / 3},
                        {"n_title_words", 2}}
                       .dump()
                << "\n";
      std::string text;
      for (int k = 0; k < 6; ++k) text += absl::StrCat(passage, "\n");
      texts << json{{"id", i}, {"title", absl::StrCat("Text ", i)}, {"text", text}}.dump() << "\n";
    }
    texts << json{{"id", 99}, {"title", "Short"}, {"text", "Nothing to read."}}.dump() << "\n";
    questions.close();
    texts.close();
    questions_ = LoadQuestions((directory_ / "questions.jsonl").string(), HoldOut()).value();
    QaExampleCounts counts;
    store_ = std::make_unique<QaStore>(embedder_.get());
    examples_ = MakeQaExamples(questions_, *tokenizer_, 64, 4, true, store_.get(), &counts).value();
    config_ = TinyConfig(tokenizer_->vocab_size());
    options_.kept = StepSchedule::Parse("0@0", "kept", 0, 128).value();
  }
  void TearDown() override { fs::remove_all(directory_); }

  QaGroupBatches Batches(std::vector<TextPieces> texts) const {
    return {&config_,  tokenizer_.get(), store_.get(), &questions_,
            examples_, std::move(texts), nullptr,      options_};
  }

  fs::path directory_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<Embedder> embedder_;
  std::vector<Question> questions_;
  std::unique_ptr<QaStore> store_;
  std::vector<QaExample> examples_;
  ModelConfig config_;
  QaGroupOptions options_;
};

TEST_F(QaGroupsTest, AnEpochAsksEachQuestionOnceOfAGroupThatHasItsGold) {
  for (const int64_t epoch : {0, 1}) {
    const auto groups = GroupQuestions(examples_, questions_, 5, options_, epoch);
    EXPECT_LT(groups.size(), examples_.size() / 2) << "a document's questions go together";
    std::set<int> asked;
    for (const QaGroup& group : groups) {
      EXPECT_THAT(group.references, SizeIs(5));
      EXPECT_THAT(std::set<int>(group.references.begin(), group.references.end()), SizeIs(5));
      EXPECT_LE(group.questions.size(), 6u);
      for (const int q : group.questions) {
        EXPECT_TRUE(asked.insert(q).second);
        EXPECT_THAT(group.references, ::testing::Contains(examples_[q].gold));
      }
    }
    EXPECT_EQ(asked.size(), examples_.size());
  }
  EXPECT_NE(GroupQuestions(examples_, questions_, 5, options_, 0)[0].questions,
            GroupQuestions(examples_, questions_, 5, options_, 1)[0].questions);
}

TEST_F(QaGroupsTest, ABatchEncodesAReferenceOnceForAllItsQuestions) {
  options_.groups = 3;
  options_.clozes = 2;
  QaGroupBatches source = Batches({});
  const TrainingBatch batch = source.Make(1).value();
  EXPECT_EQ(batch.references.size(), 15u);
  EXPECT_EQ(batch.sequences.size(), source.Kinds().size());
  EXPECT_GT(batch.sequences.size(), 20u) << "up to two clozes of each reference, and the questions";
  std::map<std::vector<int>, int> readers;
  for (const TrainingSequence& s : batch.sequences) {
    ASSERT_FALSE(s.chunk_references.empty());
    for (const std::vector<int>& reads : s.chunk_references)
      EXPECT_EQ(reads, s.chunk_references[0]);
    readers[s.chunk_references[0]] += 1;
    EXPECT_EQ(s.targets.back(), tokenizer_->eos_id());
    // The answer stands in one of the references it reads.
    std::vector<int32_t> answer;
    for (const int32_t t : s.targets) {
      if (t >= 0 && t != tokenizer_->eos_id()) answer.push_back(t);
    }
    const std::string text = tokenizer_->Decode(answer);
    const std::vector<int>& reads = s.chunk_references[0];
    EXPECT_TRUE(std::any_of(reads.begin(), reads.end(), [&](int r) {
      return absl::StrContains(tokenizer_->Decode(batch.references[r]),
                               std::string(absl::StripAsciiWhitespace(text)));
    })) << text;
  }
  EXPECT_THAT(readers, SizeIs(3)) << "each group reads its own five";
  // What is trained on it: gradients flow through every group's memories.
  auto device = MakeCpuDevice({.threads = 1}).value();
  auto parameters = Parameters::Create(device.get(), config_).value();
  ASSERT_TRUE(parameters->Load(InitialParameters(1, config_.layers)).ok());
  const auto result = TrainingStep(parameters.get()).Run(batch, nullptr);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_GT(result->tokens, 60);
}

TEST_F(QaGroupsTest, TextsAreAskedByClozesAndHeldOutOnesAreNot) {
  const std::string path = (directory_ / "texts.jsonl").string();
  const auto all = CutTexts({path}, HoldOut(), *tokenizer_, 64, 4).value();
  EXPECT_THAT(all, SizeIs(24)) << "one piece alone is left out";
  for (const TextPieces& text : all) {
    EXPECT_GE(text.size(), 2u);
    EXPECT_LE(text.size(), 4u);
  }
  const auto some = CutTexts({path}, HoldOut(10, 3), *tokenizer_, 64, 4).value();
  EXPECT_THAT(some, SizeIs(21));
  for (const TextPieces& text : some)
    EXPECT_THAT(text[0].text, Not(::testing::StartsWith("Text 3\n")));
  EXPECT_EQ(CutTexts({"nothing.jsonl"}, HoldOut(), *tokenizer_, 64, 4).status().code(),
            absl::StatusCode::kNotFound);

  options_.groups = 4;
  options_.texts = 0.5;
  QaGroupBatches source = Batches(all);
  const TrainingBatch batch = source.Make(0).value();
  EXPECT_EQ(batch.references.size(), 20u);
  ASSERT_TRUE(TrainingLayout::Create(config_, batch).ok());
  EXPECT_THAT(source.Kinds(), ::testing::Contains("question"));
  EXPECT_THAT(source.Kinds(), ::testing::Contains("cloze"));
}

TEST_F(QaGroupsTest, ABatchIsAFunctionOfItsNumber) {
  options_.groups = 2;
  options_.sparse = 0.5;
  QaGroupBatches one = Batches({}), other = Batches({});
  ASSERT_TRUE(one.Make(9).ok());
  std::set<int> kept;
  for (int64_t number = 0; number < 40; ++number) {
    const TrainingBatch a = one.Make(number).value(), b = other.Make(number).value();
    ASSERT_EQ(a.sequences.size(), b.sequences.size());
    for (size_t i = 0; i < a.sequences.size(); ++i) {
      EXPECT_EQ(a.sequences[i].token_ids, b.sequences[i].token_ids);
      EXPECT_EQ(a.sequences[i].chunk_references, b.sequences[i].chunk_references);
    }
    EXPECT_EQ(a.references, b.references);
    EXPECT_EQ(a.tokens_kept, b.tokens_kept);
    kept.insert(a.tokens_kept);
  }
  EXPECT_THAT(kept, ::testing::ElementsAre(0, 8, 16, 32, 64));
}

}  // namespace
}  // namespace memory3
