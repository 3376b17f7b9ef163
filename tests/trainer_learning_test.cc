// Both stages on a real text: the losses fall, and copying from memories is learned. About 20 s.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <vector>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "tests/child_process.h"

namespace memory3 {
namespace {

namespace fs = std::filesystem;

// Mean of a field over steps [first, last) of a run's metrics that have it.
double Mean(const fs::path& run, const std::string& field, int64_t first, int64_t last) {
  std::ifstream in(run / "metrics.jsonl");
  double sum = 0;
  int n = 0;
  for (std::string line; std::getline(in, line);) {
    const nlohmann::json j = nlohmann::json::parse(line);
    const int64_t step = j["step"];
    if (step < first || step >= last || !j.contains(field)) continue;
    sum += j[field].get<double>();
    ++n;
  }
  EXPECT_GT(n, 0) << field;
  return sum / n;
}

TEST(TrainerLearningTest, LossesOfBothStagesFallOnRealText) {
  const char* const env = std::getenv("MEMORY3_DATA");
  const fs::path data = env != nullptr ? env : "../shared/data";
  const fs::path text = data / "wikitext2" / "valid.txt";
  if (!fs::exists(text)) {
    GTEST_SKIP() << "SKIPPED: no " << text << " (MEMORY3_DATA): learning is not measured";
  }
  const fs::path root = fs::path(::testing::TempDir()) / absl::StrCat("learning_", getpid());
  fs::remove_all(root);
  const auto path = [&](const char* name) { return (root / name).string(); };
  const auto run = [&](const std::vector<std::string>& arguments) {
    ChildProcess process("trainer", arguments);
    EXPECT_EQ(process.Wait(std::chrono::seconds(120)), 0) << process.output();
  };
  run({"tokenizer", text.string(), "--out", path("tok"), "--vocab_size", "600", "--sample_mb", "1",
       "--threads", "1"});
  run({"pack", text.string(), "--tokenizer", path("tok"), "--out", path("shards"), "--threads",
       "1"});
  run({"pretrain",        path("shards"),
       "--tokenizer",     path("tok"),
       "--out",           path("warmup"),
       "--initial",       "copying",
       "--steps",         "120",
       "--batch",         "8",
       "--context",       "129",
       "--copy",          "0.25",
       "--hidden",        "128",
       "--layers",        "3",
       "--intermediate",  "256",
       "--heads",         "4",
       "--kv_heads",      "4",
       "--rope_theta",    "500000",
       "--learning_rate", "2e-3",
       "--warmup_steps",  "20",
       "--threads",       "1"});
  EXPECT_LT(Mean(root / "warmup", "loss_text", 110, 121),
            Mean(root / "warmup", "loss_text", 0, 10) - 1);
  run({"pretrain",        path("shards"),
       "--stage",         "continual",
       "--model",         path("warmup/model"),
       "--out",           path("memory"),
       "--memory_layers", "1",
       "--memory_layers", "2",
       "--steps",         "60",
       "--batch",         "8",
       "--context",       "129",
       "--copy",          "0.5",
       "--copy_level",    "1@0",
       "--tokens_kept",   "128@0",
       "--references",    "500",
       "--learning_rate", "2e-3",
       "--warmup_steps",  "5",
       "--copy_every",    "0",
       "--threads",       "1"});
  const fs::path memory = root / "memory";
  EXPECT_LT(Mean(memory, "loss", 50, 61), Mean(memory, "loss", 0, 10) - 0.1);
  const double copying = Mean(memory, "loss_copy_one_memory", 50, 61);
  EXPECT_LT(copying, Mean(memory, "loss_copy_one_memory", 0, 10) - 0.2);
  // Far below what the text before a token tells of it: memories are read.
  EXPECT_LT(copying, Mean(memory, "loss_text_with_references", 50, 61) - 0.5);
  fs::remove_all(root);
}

}  // namespace
}  // namespace memory3
