// The evaluation: what is drawn from the data, the report, and the program itself against real
// servers on data made here.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>
#include <zstd.h>

#include <filesystem>
#include <fstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "evaluation/evaluation_data.h"
#include "evaluation/report.h"
#include "nlohmann/json.hpp"
#include "tests/child_process.h"

namespace memory3 {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::Each;
using ::testing::Field;
using ::testing::HasSubstr;
using ::testing::SizeIs;
using ::testing::StartsWith;
namespace fs = std::filesystem;

void WriteZstd(const fs::path& path, const std::vector<json>& lines) {
  std::string text;
  for (const json& line : lines) absl::StrAppend(&text, line.dump(), "\n");
  std::string bytes(ZSTD_compressBound(text.size()), '\0');
  bytes.resize(ZSTD_compress(bytes.data(), bytes.size(), text.data(), text.size(), 3));
  fs::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary) << bytes;
}

std::string Paragraph(int64_t article, int number) {
  return absl::StrCat("The town of Aro", article, " was founded by Founder", article, number,
                      " in the year ", 1000 + article,
                      " beside a river that nobody has named, and "
                      "its people live from fishing, as they say paragraph ",
                      number, " tells.");
}

// Shared data with articles of ids 1 … 40, a heading and three paragraphs each; those that end in 3
// and the one with SQuAD's title are held out.
class EvaluationTest : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ = fs::path(::testing::TempDir()) /
            absl::StrCat("evaluation_", getpid(), "_",
                         ::testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::remove_all(root_);
    std::vector<std::vector<json>> shards(8);
    std::vector<json> grounded, squad, factbook;
    for (int64_t id = 1; id <= 40; ++id) {
      std::string text = "History.";
      for (int p = 0; p < 3; ++p) absl::StrAppend(&text, "\n", Paragraph(id, p));
      const std::string title = absl::StrCat("Aro", id);
      shards[static_cast<size_t>(id % 8)].push_back({{"id", id}, {"title", title}, {"text", text}});
      if (id % 10 != 3) continue;
      const std::string founder = absl::StrCat("Founder", id, 1);
      grounded.push_back({{"question", absl::StrCat("Who founded Aro", id, "?")},
                          {"answers", {founder}},
                          {"answer_found", founder},
                          {"title", title},
                          {"passage", Paragraph(id, 1)},
                          {"doc_id", id},
                          {"n_title_words", id == 33 ? 1 : 2}});
    }
    for (const bool unanswerable : {false, true}) {
      squad.push_back({{"title", "Aro20"},
                       {"question", "What lies in the north?"},
                       {"answers", unanswerable ? json::array() : json({"a forest"})},
                       {"unanswerable", unanswerable},
                       {"context", "In the north of the land lies a forest of oaks."}});
    }
    for (int i = 0; i < 3; ++i)
      factbook.push_back({{"id", absl::StrCat("f", i)},
                          {"title", "Land"},
                          {"text", absl::StrCat("Land ", i, " exports wool.")}});
    for (int shard = 0; shard < 8; ++shard)
      WriteZstd(Data("enwiki/articles-" + std::to_string(shard)),
                shards[static_cast<size_t>(shard)]);
    WriteZstd(Data("qa/grounded-dev"), grounded);
    WriteZstd(Data("qa/squad"), squad);
    WriteZstd(Data("kb/factbook"), factbook);
  }
  void TearDown() override { fs::remove_all(root_); }

  fs::path Data(const std::string& name) const { return root_ / "data" / (name + ".jsonl.zst"); }
  EvaluationDataOptions Options() const {
    return {.directory = (root_ / "data").string(), .questions = 10, .documents = 100};
  }

  fs::path root_;
};

TEST_F(EvaluationTest, OnlyWhatIsHeldOutIsLoadedAndEveryAnswerIsThere) {
  const absl::StatusOr<EvaluationData> data = ReadEvaluationData(Options());
  ASSERT_TRUE(data.ok()) << data.status();
  ASSERT_THAT(data->sets, SizeIs(2));
  EXPECT_THAT(data->sets[0].questions, SizeIs(3));  // 3, 13, 23; 33 names too little of its title
  EXPECT_THAT(data->sets[1].questions, SizeIs(1));
  // Three paragraphs of 3, 13, 23, 33 and of Aro20, and SQuAD's.
  EXPECT_THAT(data->documents, SizeIs(16));
  for (const EvaluationSet& set : data->sets) {
    for (const EvaluationQuestion& asked : set.questions) {
      const auto found = std::find_if(
          data->documents.begin(), data->documents.end(),
          [&](const EvaluationDocument& document) { return document.id == asked.document_id; });
      ASSERT_NE(found, data->documents.end()) << asked.document_id;
      EXPECT_EQ(found->text, asked.question.passage);
      EXPECT_TRUE(HoldsAnswer(found->text, asked.question.answer));
    }
  }
  for (const EvaluationDocument& document : data->documents) {
    if (document.id.starts_with("enwiki/") && !document.id.starts_with("enwiki/20/")) {
      EXPECT_THAT(document.title, ::testing::EndsWith("3"));
    }
  }
}

TEST_F(EvaluationTest, ALimitKeepsTheAnswersAndTheSameSeedTheSameDocuments) {
  EvaluationDataOptions options = Options();
  options.documents = 6;
  const absl::StatusOr<EvaluationData> data = ReadEvaluationData(options),
                                       again = ReadEvaluationData(options);
  ASSERT_TRUE(data.ok()) << data.status();
  ASSERT_THAT(data->documents, SizeIs(6));
  for (const EvaluationSet& set : data->sets)
    for (const EvaluationQuestion& asked : set.questions)
      EXPECT_THAT(data->documents,
                  ::testing::Contains(Field(&EvaluationDocument::id, asked.document_id)));
  for (size_t i = 0; i < 6; ++i) EXPECT_EQ(data->documents[i].id, again->documents[i].id);
}

TEST_F(EvaluationTest, MissingDataIsNamed) {
  fs::remove(Data("qa/squad"));
  EXPECT_THAT(std::string(ReadEvaluationData(Options()).status().message()),
              HasSubstr("qa/squad.jsonl.zst"));
}

TEST(ReportTest, RowsSurviveJsonAndStandInTableAndPlot) {
  EvaluationRow row = {.set = "squad",
                       .mode = "memory_vq",
                       .references_per_chunk = 5,
                       .tokens_kept = 8,
                       .memory_layers = {1, 2},
                       .model = "ab",
                       .prompt = "{}?",
                       .questions_asked = 9,
                       .documents = 7,
                       .seed = 3};
  row.questions = 8;
  row.em = 0.125;
  row.recall = 0.75;
  row.nll = 2.5;
  EvaluationRow none = row;
  none.mode = "none";
  none.recall.reset();
  none.memory_layers.clear();
  const std::string text = RowsToJson({row, none});
  const absl::StatusOr<std::vector<EvaluationRow>> rows = RowsFromJson(text, "report.json");
  ASSERT_TRUE(rows.ok()) << rows.status();
  EXPECT_EQ(RowsToJson(*rows), text);
  EXPECT_TRUE(SameSettings((*rows)[0], row));
  EXPECT_FALSE(SameSettings((*rows)[0], none));
  EXPECT_THAT(RowsToMarkdown(*rows),
              AllOf(HasSubstr("| squad | memory_vq | 5 | 8 | 1 2 | 12.5 |"), HasSubstr("75.0"),
                    HasSubstr("| squad | none | 5 | – | – | 12.5 |")));
  EXPECT_THAT(RowsToSvg(*rows, ""), AllOf(StartsWith("<svg"), HasSubstr("memory_vq")));
  EXPECT_EQ(RowsToSvg(*rows, "tokens_kept"), "");
  const absl::Status bad = RowsFromJson(R"([{"set": "squad"}])", "report.json").status();
  EXPECT_THAT(std::string(bad.message()), AllOf(HasSubstr("report.json"), HasSubstr("mode")));
}

// The real servers with the model trained here.
TEST_F(EvaluationTest, ARunMeasuresThroughTheServersAndASecondOneGoesOn) {
  const std::vector<std::string> arguments = {"--model=models/tiny",
                                              "--data=" + (root_ / "data").string(),
                                              "--directory=" + (root_ / "out").string(),
                                              "--questions=2",
                                              "--documents=20",
                                              "--factbook_documents=2",
                                              "--no_ablations",
                                              "--modes",
                                              "none",
                                              "memory_bf16",
                                              "memory_gold",
                                              "text_gold",
                                              "memory_factbook"};
  {
    ChildProcess run("memory3_evaluate", arguments);
    ASSERT_EQ(run.Wait(std::chrono::seconds(100)), 0) << run.output();
  }
  std::ifstream file(root_ / "out/report.json");
  const json rows = json::parse(file);
  EXPECT_THAT(rows, SizeIs(10));
  for (const json& row : rows) {
    const std::string mode = row["mode"];
    EXPECT_EQ(row["questions"], row["set"] == "squad" ? 1 : 2);
    EXPECT_GT(row["nll"], 0);
    EXPECT_GT(row["ttft_ms"], 0);
    if (mode == "none") {
      EXPECT_TRUE(row["recall_at_5"].is_null());
    } else {
      EXPECT_GT(row["bytes_per_reference"], 0);
    }
    // The filter leaves only the paragraph of the answer; the Factbook holds none.
    if (absl::EndsWith(mode, "_gold")) {
      EXPECT_EQ(row["recall_at_5"], 1) << row;
    } else if (mode == "memory_factbook") {
      EXPECT_EQ(row["recall_at_5"], 0) << row;
    }
  }
  EXPECT_TRUE(fs::exists(root_ / "out/table.md"));
  EXPECT_FALSE(fs::exists(root_ / "out/store"));  // gigabytes, in earnest
  const auto written = fs::last_write_time(root_ / "out/report.json");
  ChildProcess again("memory3_evaluate", arguments);
  ASSERT_EQ(again.Wait(), 0) << again.output();
  EXPECT_EQ(fs::last_write_time(root_ / "out/report.json"), written);  // nothing left to measure
}

}  // namespace
}  // namespace memory3
