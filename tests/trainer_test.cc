// The trainer's binary from text to a model: tokenizer, pack, pretrain (both stages), export;
// SIGTERM ends it well and the run goes on to the same bytes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "tests/child_process.h"
#include "trainer/random.h"

namespace memory3 {
namespace {

using ::testing::HasSubstr;
namespace fs = std::filesystem;

class TrainerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ = fs::path(::testing::TempDir()) / absl::StrCat("trainer_", getpid());
    fs::remove_all(root_);
    fs::create_directories(root_);
    std::ofstream text(Path("text.jsonl"));
    Random random({1});
    for (int d = 0; d < 60; ++d) {
      text << "{\"id\": " << d << ", \"title\": \"Entry " << d << "\", \"text\": \"";
      for (int w = 0; w < 200; ++w) {
        text << (w % 12 == 11 ? ".\\n" : " ") << static_cast<char>('a' + random.Below(8))
             << static_cast<char>('a' + random.Below(8));
      }
      text << "\"}\n";
    }
  }
  void TearDown() override { fs::remove_all(root_); }
  std::string Path(const std::string& name) const { return (root_ / name).string(); }

  // Runs to the end; the exit code.
  int Run(const std::vector<std::string>& arguments) {
    ChildProcess process("trainer", arguments);
    const int code = process.Wait();
    output_ = process.output();
    return code;
  }
  void Prepare() {
    ASSERT_EQ(Run({"tokenizer", Path("text.jsonl"), "--out", Path("tok"), "--vocab_size", "320",
                   "--sample_mb", "1", "--threads", "1"}),
              0)
        << output_;
    ASSERT_EQ(Run({"pack", Path("text.jsonl"), "--tokenizer", Path("tok"), "--out", Path("shards"),
                   "--hold_out_ids", "10:3"}),
              0)
        << output_;
    EXPECT_THAT(output_, HasSubstr("54 documents"));
  }
  std::vector<std::string> Pretrain(const std::string& out, const std::string& steps) const {
    return {"pretrain",       Path("shards"),
            "--tokenizer",    Path("tok"),
            "--out",          Path(out),
            "--steps",        steps,
            "--batch",        "2",
            "--context",      "129",
            "--hidden",       "32",
            "--layers",       "2",
            "--intermediate", "64",
            "--heads",        "4",
            "--kv_heads",     "2",
            "--threads",      "1",
            "--warmup_steps", "5"};
  }
  static std::string Bytes(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    EXPECT_TRUE(in.good()) << path;
    return {std::istreambuf_iterator<char>(in), {}};
  }

  fs::path root_;
  std::string output_;
};

TEST_F(TrainerTest, SigtermEndsItWellAndItGoesOnToTheSameBytes) {
  Prepare();
  ASSERT_EQ(Run(Pretrain("whole", "150")), 0) << output_;
  int stops = 0;
  for (int i = 0; i < 200; ++i) {
    ChildProcess process("trainer", Pretrain("pieces", "150"));
    ASSERT_TRUE(process.WaitForLine("tokens in the shards")) << process.output();
    if (i < 4) process.Signal(SIGTERM);
    ASSERT_EQ(process.Wait(), 0) << process.output();
    const bool stopped = process.output().find("stopped at step") != std::string::npos;
    stops += stopped;
    if (!stopped) break;
  }
  EXPECT_GE(stops, 1);
  EXPECT_TRUE(Bytes(Path("whole/model/model.safetensors")) ==
              Bytes(Path("pieces/model/model.safetensors")));
  ASSERT_EQ(Run({"export", Path("pieces/checkpoint-00000150.m3c"), "--tokenizer", Path("tok"),
                 "--out", Path("exported")}),
            0)
      << output_;
  EXPECT_TRUE(Bytes(Path("exported/model.safetensors")) ==
              Bytes(Path("whole/model/model.safetensors")));
}

TEST_F(TrainerTest, ContinualTrainingGoesOnFromAWarmedUpModel) {
  Prepare();
  ASSERT_EQ(Run(Pretrain("warmup", "5")), 0) << output_;
  const std::vector<std::string> arguments = {"pretrain",
                                              Path("shards"),
                                              "--stage",
                                              "continual",
                                              "--model",
                                              Path("warmup/model"),
                                              "--out",
                                              Path("memory"),
                                              "--steps",
                                              "6",
                                              "--batch",
                                              "4",
                                              "--context",
                                              "129",
                                              "--copy_every",
                                              "3",
                                              "--copy_exercises",
                                              "4",
                                              "--tokens_kept",
                                              "128@0,8@3",
                                              "--copy_level",
                                              "0@0,2@3",
                                              "--same_document",
                                              "0.5",
                                              "--threads",
                                              "1"};
  ASSERT_EQ(Run(arguments), 0) << output_;
  const auto config = nlohmann::json::parse(Bytes(Path("memory/model/config.json")));
  EXPECT_EQ(config["explicit_memory"]["tokens_kept"], 8) << "what the schedule ends with";
  const std::string metrics = Bytes(Path("memory/metrics.jsonl"));
  EXPECT_THAT(metrics, HasSubstr("\"match_copy_five_memories\""));
  EXPECT_THAT(metrics, HasSubstr("\"tokens_kept\":8"));
  ASSERT_EQ(Run({"evaluate", Path("shards"), "--references", Path("shards"), "--model",
                 Path("memory/model"), "--windows", "3", "--context", "129", "--threads", "1",
                 "--out", Path("report.json")}),
            0)
      << output_;
  EXPECT_THAT(Bytes(Path("report.json")), HasSubstr("memory_own_chunk_query"));
  EXPECT_NE(Run({"evaluate", Path("shards"), "--references", Path("shards"), "--model",
                 Path("warmup/model")}),
            0);
  EXPECT_THAT(output_, HasSubstr("explicit_memory"));
}

TEST_F(TrainerTest, TheSwitchesOfAStepDoWhatTheySay) {
  Prepare();
  const auto with = [](std::vector<std::string> arguments, const std::vector<std::string>& more) {
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  };
  ASSERT_EQ(Run(Pretrain("warmup", "4")), 0) << output_;
  const auto continual = [&](const std::string& out) {
    return std::vector<std::string>{
        "pretrain",  Path("shards"), "--stage",      "continual", "--model",   Path("warmup/model"),
        "--out",     Path(out),      "--steps",      "3",         "--batch",   "2",
        "--context", "129",          "--copy_every", "0",         "--threads", "1"};
  };
  ASSERT_EQ(Run(continual("kept")), 0) << output_;
  ASSERT_EQ(Run(with(continual("recomputed"), {"--recompute"})), 0) << output_;
  ASSERT_EQ(Run(with(continual("stopped"), {"--stop_writing_gradient"})), 0) << output_;
  ASSERT_EQ(Run(with(continual("before"), {"--previous_query", "1"})), 0) << output_;
  const auto weights = [&](const std::string& out) {
    return Bytes(Path(out + "/model/model.safetensors"));
  };
  EXPECT_TRUE(weights("recomputed") == weights("kept")) << "the same bits in less memory";
  EXPECT_FALSE(weights("stopped") == weights("kept"));
  EXPECT_FALSE(weights("before") == weights("kept")) << "other references are read";
}

TEST_F(TrainerTest, FinetuningStopsAndGoesOnToTheSameBytesAndIsEvaluated) {
  Prepare();
  ASSERT_EQ(Run(Pretrain("warmup", "3")), 0) << output_;
  ASSERT_EQ(Run({"pretrain", Path("shards"), "--stage", "continual", "--model",
                 Path("warmup/model"), "--out", Path("memory"), "--steps", "2", "--batch", "2",
                 "--context", "65", "--copy_every", "0", "--threads", "1"}),
            0)
      << output_;
  std::ofstream questions(Path("questions.jsonl"));
  for (int i = 0; i < 20; ++i) {
    questions << R"({"question": "What is )" << i << R"(?", "answers": ["Name)" << i
              << R"("], "answer_found": "Name)" << i << R"(", "title": "Entry )" << i
              << R"(", "passage": "ab cd. It is the Name)" << i
              << R"( and ef gh was here with Other)" << i << R"( too.", "doc_id": )" << i
              << R"(, "n_title_words": 1})"
              << "\n";
  }
  questions.close();
  // "groups": as memories, with references shared by a group's questions.
  for (const std::string mode : {"memory", "text", "groups"}) {
    const auto arguments = [&](const std::string& out, const std::string& stop) {
      std::vector<std::string> all = {"finetune",       Path("questions.jsonl"),
                                      "--model",        Path("memory/model"),
                                      "--out",          Path(out),
                                      "--steps",        "8",
                                      "--batch",        "4",
                                      "--rehearse",     Path("shards"),
                                      "--stop_after",   stop,
                                      "--cloze",        "0.25",
                                      "--clozes",       "10",
                                      "--threads",      "1",
                                      "--hold_out_ids", "10:3"};
      const std::vector<std::string> more =
          mode == "groups"
              ? std::vector<std::string>{"--groups",         "2",   "--texts",  Path("text.jsonl"),
                                         "--text_groups",    "0.5", "--sparse", "0.5",
                                         "--previous_query", "0.5"}
              : std::vector<std::string>{"--mode", mode};
      all.insert(all.end(), more.begin(), more.end());
      return all;
    };
    const std::string whole = absl::StrCat("whole_", mode), pieces = absl::StrCat("pieces_", mode);
    ASSERT_EQ(Run(arguments(whole, "0")), 0) << output_;
    EXPECT_THAT(output_, HasSubstr("18 questions"));
    ASSERT_EQ(Run(arguments(pieces, "3")), 0) << output_;
    EXPECT_THAT(output_, HasSubstr("stopped at step 3"));
    ASSERT_EQ(Run(arguments(pieces, "0")), 0) << output_;
    EXPECT_TRUE(Bytes(Path(whole + "/model/model.safetensors")) ==
                Bytes(Path(pieces + "/model/model.safetensors")));
    EXPECT_THAT(Bytes(Path(whole + "/metrics.jsonl")), HasSubstr("loss_question"));
  }
  ASSERT_EQ(Run({"evaluate", "--questions", Path("questions.jsonl"), "--model",
                 Path("whole_memory/model"), "--threads", "1", "--out", Path("qa.json")}),
            0)
      << output_;
  for (const char* const mode : {"\"none\"", "\"memory\"", "\"text\""}) {
    EXPECT_THAT(Bytes(Path("qa.json")), HasSubstr(mode));
  }
  EXPECT_NE(Run({"evaluate", "--questions", Path("questions.jsonl"), "--model",
                 Path("whole_memory/model"), "--modes", "memory_vq"}),
            0);
  EXPECT_THAT(output_, HasSubstr("--codebook"));
  EXPECT_NE(Run({"evaluate", "--model", Path("whole_memory/model")}), 0);
  EXPECT_THAT(output_, HasSubstr("--questions"));
  EXPECT_NE(
      Run({"finetune", Path("text.jsonl"), "--model", Path("memory/model"), "--out", Path("z")}),
      0);
  EXPECT_THAT(output_, HasSubstr("text.jsonl:1"));
  EXPECT_NE(Run({"finetune", Path("questions.jsonl"), "--model", Path("memory/model"), "--out",
                 Path("z"), "--mode", "text", "--groups", "2"}),
            0);
  EXPECT_THAT(output_, HasSubstr("groups"));
}

TEST_F(TrainerTest, BadInputIsRefusedByName) {
  EXPECT_NE(Run({"pack", Path("none.jsonl"), "--tokenizer", Path("tok"), "--out", Path("s")}), 0);
  Prepare();
  EXPECT_NE(Run({"pack", Path("text.jsonl"), "--tokenizer", Path("tok"), "--out", Path("shards")}),
            0);
  EXPECT_THAT(output_, HasSubstr("exists already"));
  std::vector<std::string> arguments = Pretrain("x", "5");
  arguments[1] = Path("tok");
  EXPECT_NE(Run(arguments), 0);
  EXPECT_THAT(output_, HasSubstr("holds no token shard"));
  arguments = Pretrain("x", "0");
  EXPECT_NE(Run(arguments), 0);
  EXPECT_THAT(output_, HasSubstr("--steps"));
  EXPECT_NE(Run({"pretrain", Path("shards"), "--model", Path("nothing"), "--out", Path("y")}), 0);
  EXPECT_THAT(output_, HasSubstr("nothing"));
}

}  // namespace
}  // namespace memory3
