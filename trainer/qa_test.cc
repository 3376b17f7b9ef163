// Questions: marking, reading files, examples, batches, evaluation.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "trainer/qa_batches.h"
#include "trainer/qa_data.h"
#include "trainer/qa_evaluation.h"
#include "trainer/qa_metrics.h"
#include "transformer/parameters.h"
#include "transformer/training_step.h"

namespace memory3 {
namespace {

using nlohmann::json;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
namespace fs = std::filesystem;

// tests/goldens/squad_metrics.py: SQuAD's own functions.
TEST(QaMetricsTest, AgreeWithTheOfficialScript) {
  std::ifstream in("trainer/testdata/squad_metrics.json");
  const json rows = json::parse(in);
  ASSERT_GT(rows.size(), 100u);
  for (const json& row : rows) {
    const std::string answer = row["answer"];
    const std::vector<std::string> gold = {row["gold"]};
    EXPECT_EQ(NormalizeAnswer(answer), row["normalized"].get<std::string>()) << answer;
    EXPECT_EQ(ExactMatch(answer, gold), row["exact"].get<double>()) << answer << "|" << gold[0];
    EXPECT_NEAR(AnswerF1(answer, gold), row["f1"].get<double>(), 1e-12) << answer << "|" << gold[0];
  }
}

TEST(QaMetricsTest, TheBestOfSeveralGoldAnswersCounts) {
  const std::vector<std::string> gold = {"New York City", "NYC"};
  EXPECT_EQ(ExactMatch("the nyc.", gold), 1);
  EXPECT_EQ(ExactMatch("York", gold), 0);
  EXPECT_NEAR(AnswerF1("York", gold), 0.5, 1e-12);
  EXPECT_EQ(AnswerF1("York", {}), 0);
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

TEST(SquadTest, OnlyAnswerableQuestionsAreReadAndBadLinesAreNamed) {
  const fs::path path = fs::path(::testing::TempDir()) / absl::StrCat("squad_", getpid(), ".jsonl");
  json line = {{"question", "Who?"},
               {"answers", {"Rollo", "the Rollo"}},
               {"title", "Normans"},
               {"context", "Rollo did."},
               {"unanswerable", false}};
  const auto load = [&](const json& second) {
    std::ofstream(path) << line.dump() << "\n" << second.dump() << "\n";
    return LoadSquadQuestions(path.string());
  };
  json unanswerable = line;
  unanswerable["unanswerable"] = true;
  const absl::StatusOr<std::vector<Question>> questions = load(unanswerable);
  ASSERT_TRUE(questions.ok()) << questions.status();
  ASSERT_EQ(questions->size(), 1u);
  EXPECT_EQ((*questions)[0].answer, "Rollo");
  EXPECT_EQ((*questions)[0].passage, "Rollo did.");
  for (const char* field : {"question", "answers", "title", "context", "unanswerable"}) {
    json bad = line;
    bad.erase(field);
    EXPECT_THAT(std::string(load(bad).status().message()),
                ::testing::AllOf(HasSubstr(":2"), HasSubstr(field)));
  }
  fs::remove(path);
}

class QaTest : public ::testing::Test {
 protected:
  void SetUp() override {
    path_ = fs::path(::testing::TempDir()) / absl::StrCat("qa_", getpid(), ".jsonl");
    tokenizer_ = OpenTokenizer("transformer/testdata/spm_tiny", {.vocab_size = 1 << 20}).value();
    embedder_ = MakeEmbedder("lexical").value();
    std::string lines;
    for (int i = 0; i < 12; ++i) {
      const std::string town = absl::StrCat("Town ", std::string(1, static_cast<char>('A' + i)));
      json line = {
          {"question", absl::StrCat("Who founded ", town, "?")},
          {"answers", {absl::StrCat("Founder ", i)}},
          {"answer_found", absl::StrCat("founder ", i)},
          {"title", town},
          {"passage", absl::StrCat("It lies by a river named River", i,
                                   " in the north of the old land. Many people live here "
                                   "since long ago. It was built in the year 1",
                                   i, "00 by founder ", i, " and his friend Peter", i, ".")},
          {"doc_id", i},
          {"n_title_words", 1 + i % 2}};
      lines += line.dump() + "\n";
    }
    Write(lines);
  }
  void TearDown() override { fs::remove(path_); }
  void Write(const std::string& text) { std::ofstream(path_) << text; }

  std::vector<QaExample> Examples(QaStore* store, std::vector<Question>* questions) {
    *questions = LoadQuestions(path_.string(), HoldOut()).value();
    QaExampleCounts counts;
    auto examples = MakeQaExamples(*questions, *tokenizer_, 64, 4, true, store, &counts);
    EXPECT_TRUE(examples.ok()) << examples.status();
    EXPECT_EQ(counts.examples, 12);
    return *std::move(examples);
  }

  fs::path path_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<Embedder> embedder_;
};

TEST_F(QaTest, ReadsQuestionsAndLeavesOutWhatIsHeldOut) {
  const auto all = LoadQuestions(path_.string(), HoldOut()).value();
  ASSERT_EQ(all.size(), 12u);
  EXPECT_EQ(all[3].answer, "founder 3");
  EXPECT_THAT(all[3].answers, ElementsAre("Founder 3", "founder 3"));
  EXPECT_EQ(all[3].title_words, 2);
  HoldOut hold_out(10, 3);
  hold_out.AddTitle("Town_A");
  const auto rest = LoadQuestions(path_.string(), hold_out).value();
  EXPECT_EQ(rest.size(), 10u);
  for (const Question& q : rest) {
    EXPECT_NE(q.document, 3);
    EXPECT_NE(q.title, "Town A");
  }
}

TEST_F(QaTest, BadLinesAreRefusedByFileLineAndField) {
  const std::string good =
      R"({"question":"q","answers":["a"],"answer_found":"a","title":"t","passage":"a","doc_id":1,"n_title_words":1})";
  const std::pair<const char*, const char*> bad[] = {
      {"{", ":2"},
      {"[]", "no object"},
      {R"({"question":""})", "\"question\""},
      {R"({"question":"q","answer_found":"a","title":"t","passage":"a","doc_id":1})",
       "\"answers\""},
      {R"({"question":"q","answers":[1],"answer_found":"a","title":"t","passage":"a"})",
       "\"answers\""},
      {R"({"question":"q","answers":[],"answer_found":"a","title":"t","passage":"a","doc_id":"x"})",
       "\"doc_id\""},
      {"\xff\xfe", ":2"}};
  for (const auto& [line, message] : bad) {
    Write(absl::StrCat(good, "\n", line, "\n"));
    const auto questions = LoadQuestions(path_.string(), HoldOut());
    ASSERT_FALSE(questions.ok()) << line;
    EXPECT_THAT(std::string(questions.status().message()), HasSubstr(message));
    EXPECT_THAT(std::string(questions.status().message()), HasSubstr(":2"));
  }
  Write("");
  EXPECT_FALSE(LoadQuestions(path_.string(), HoldOut()).ok());
  EXPECT_EQ(LoadQuestions("nothing.jsonl", HoldOut()).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(QaTest, GoldHoldsTheAnswerAndTheOthersAreNear) {
  QaStore store(embedder_.get());
  std::vector<Question> questions;
  const auto examples = Examples(&store, &questions);
  for (const QaExample& e : examples) {
    EXPECT_THAT(NormalizeAnswer(store.reference(e.gold).text),
                HasSubstr(NormalizeAnswer(questions[e.question].answer)));
    EXPECT_THAT(store.reference(e.gold).text, HasSubstr(questions[e.question].title));
    EXPECT_EQ(e.others.size(), 4u);
    EXPECT_THAT(e.others, ::testing::Not(Contains(e.gold)));
    EXPECT_EQ(e.answer.back(), tokenizer_->eos_id());
    // Its own title is the rarest word of a question, so another piece of the passage is near.
    EXPECT_THAT(store.reference(e.others[0]).text, HasSubstr(questions[e.question].title));
  }
}

TEST_F(QaTest, AClozeAsksForWhatStandsOnceInItsReference) {
  QaStore store(embedder_.get());
  std::vector<Question> questions;
  Examples(&store, &questions);
  const auto clozes = MakeClozeExamples(store, *tokenizer_, 50, 1);
  ASSERT_GT(clozes.size(), 20u);
  for (const QaExample& c : clozes) {
    const std::string answer =
        tokenizer_->Decode(std::span(c.answer).subspan(0, c.answer.size() - 1));
    const std::string& text = store.reference(c.gold).text;
    EXPECT_NE(text.find(answer), std::string::npos) << answer;
    EXPECT_EQ(text.find(answer), text.rfind(answer)) << answer;
    EXPECT_EQ(tokenizer_->Decode(c.prompt).find(answer), std::string::npos);
  }
}

TEST_F(QaTest, MemoryAndTextBatchesAskTheSame) {
  QaStore store(embedder_.get());
  std::vector<Question> questions;
  const auto examples = Examples(&store, &questions);
  const auto clozes = MakeClozeExamples(store, *tokenizer_, 50, 1);
  const ModelConfig config = TinyConfig(tokenizer_->vocab_size());
  std::vector<TrainingBatch> batches;
  for (const QaMode mode : {QaMode::kMemory, QaMode::kText}) {
    QaBatches source(&config, tokenizer_.get(), &store, examples, clozes, nullptr,
                     {.mode = mode,
                      .questions = 8,
                      .cloze = 0.25,
                      .kept = StepSchedule::Parse("0@0", "kept", 0, 128).value()});
    batches.push_back(source.Make(5).value());
    EXPECT_EQ(source.Kinds().size(), 8u);
    EXPECT_THAT(source.Kinds(), Contains("cloze").Times(2));
    ASSERT_TRUE(TrainingLayout::Create(config, batches.back()).ok());
  }
  for (int i = 0; i < 8; ++i) {
    const TrainingSequence &memory = batches[0].sequences[i], &text = batches[1].sequences[i];
    std::vector<int32_t> targets[2];
    for (const int32_t t : memory.targets) {
      if (t >= 0) targets[0].push_back(t);
    }
    for (const int32_t t : text.targets) {
      if (t >= 0) targets[1].push_back(t);
    }
    EXPECT_EQ(targets[0], targets[1]);
    EXPECT_EQ(targets[0].back(), tokenizer_->eos_id());
    EXPECT_TRUE(text.chunk_references.empty());
    ASSERT_FALSE(memory.chunk_references.empty());
    EXPECT_EQ(memory.chunk_references[0].size(), 5u);
    // The same references, as text.
    for (const int r : memory.chunk_references[0]) {
      const std::vector<int32_t>& ids = batches[0].references[r];
      EXPECT_NE(std::search(text.token_ids.begin(), text.token_ids.end(), ids.begin(), ids.end()),
                text.token_ids.end());
    }
  }
  // A function of its number alone, so that a resumed run sees the same.
  QaBatches again(
      &config, tokenizer_.get(), &store, examples, clozes, nullptr,
      {.questions = 8, .cloze = 0.25, .kept = StepSchedule::Parse("0@0", "kept", 0, 128).value()});
  ASSERT_TRUE(again.Make(9).ok());
  const TrainingBatch same = again.Make(5).value();
  for (int i = 0; i < 8; ++i) {
    EXPECT_EQ(same.sequences[i].token_ids, batches[0].sequences[i].token_ids);
    EXPECT_EQ(same.sequences[i].chunk_references, batches[0].sequences[i].chunk_references);
  }
}

TEST_F(QaTest, EvaluatesEveryModeAndDropsWhatOverlaps) {
  QaStore store(embedder_.get());
  std::vector<Question> questions;
  auto examples = Examples(&store, &questions);
  examples.resize(3);
  auto device = MakeCpuDevice({.threads = 1}).value();
  const ModelConfig config = TinyConfig(tokenizer_->vocab_size());
  auto model = Model::Load(device.get(), config, RandomWeights(1), WeightFormat::kF32).value();
  const auto bf16 = MakeBF16Codec(config.head_dim);
  QaEvaluationOptions options;
  options.readings = {QaReading::kNone, QaReading::kMemory, QaReading::kMemoryVq, QaReading::kText};
  EXPECT_THAT(std::string(EvaluateQuestions(model, *tokenizer_, questions, examples, store, options,
                                            nullptr)
                              .status()
                              .message()),
              HasSubstr("codebook"));
  options.vq = bf16.get();  // any codec will do
  const auto results =
      EvaluateQuestions(model, *tokenizer_, questions, examples, store, options, nullptr).value();
  ASSERT_EQ(results.size(), 4u);
  for (const QaResult& r : results) {
    EXPECT_EQ(r.questions, 3);
    EXPECT_EQ(r.dropped_references, 0);
    EXPECT_LT(r.log_likelihood, -1);
  }
  EXPECT_NE(results[0].log_likelihood, results[1].log_likelihood) << "memories are read";
  EXPECT_NE(results[1].log_likelihood, results[2].log_likelihood) << "the codec is used";
  EXPECT_NEAR(results[1].log_likelihood, results[2].log_likelihood, 0.1);
  // Everything overlaps more than nothing: all references are dropped and nothing is read.
  options.overlap_limit = 0;
  const auto dropped =
      EvaluateQuestions(model, *tokenizer_, questions, examples, store, options, nullptr).value();
  EXPECT_GT(dropped[1].dropped_references, 0);
}

}  // namespace
}  // namespace memory3
