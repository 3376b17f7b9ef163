// A run that is stopped, killed or damaged at any moment ends with the same bits as one that never
// was, or refuses by name.
#include "trainer/training_run.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <limits>

#include "absl/strings/str_cat.h"
#include "trainer/corpus.h"
#include "trainer/random.h"
#include "trainer/run_checkpoint.h"

namespace memory3 {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
namespace fs = std::filesystem;

constexpr int kSteps = 24;

ModelConfig TinyConfig() {
  ModelConfig c;
  c.vocab_size = 61;
  c.hidden_size = 16;
  c.intermediate_size = 32;
  c.layers = 2;
  c.heads = 2;
  c.kv_heads = 1;
  c.head_dim = 8;
  c.tie_word_embeddings = true;
  return c;
}

// Random sequences; batch `surprise` is of tokens never seen elsewhere.
class RandomBatches : public BatchSource {
 public:
  absl::StatusOr<TrainingBatch> Make(int64_t number) override {
    TrainingBatch batch;
    Random random({9, static_cast<uint64_t>(number)});
    for (int s = 0; s < 2; ++s) {
      TrainingSequence sequence;
      for (int i = 0; i < 20; ++i) {
        const int32_t base = number == surprise ? 40 : 0;
        sequence.token_ids.push_back(base + static_cast<int32_t>(random.Below(8)));
        sequence.targets.push_back(base + static_cast<int32_t>(random.Below(8)));
      }
      batch.sequences.push_back(sequence);
    }
    return batch;
  }
  int64_t surprise = -1;
};

class TrainingRunTest : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ = fs::path(::testing::TempDir()) / absl::StrCat("run_", getpid());
    fs::remove_all(root_);
    fs::create_directories(root_);
  }
  void TearDown() override { fs::remove_all(root_); }

  RunOptions Options(const std::string& name) const {
    RunOptions o;
    o.directory = (root_ / name).string();
    o.schedule = {.peak = 1e-2, .floor = 1e-3, .warmup = 3, .steps = kSteps};
    o.accumulate = 2;
    o.save_every = 5;
    o.keep = 2;
    o.settings = {{"seed", 1}};
    return o;
  }
  static absl::StatusOr<RunOutcome> Train(const RunOptions& o, int64_t surprise = -1) {
    auto device = MakeCpuDevice({.threads = 1}).value();
    auto parameters = Parameters::Create(device.get(), TinyConfig()).value();
    EXPECT_TRUE(parameters->Load(InitialParameters(3, 2)).ok());
    RandomBatches batches;
    batches.surprise = surprise;
    return RunTraining(parameters.get(), &batches, o, nullptr);
  }
  static std::string Bytes(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  static std::string Last(const RunOptions& o) {
    return Bytes(ListRunCheckpoints(o.directory).back().second);
  }
  static std::vector<json> Metrics(const RunOptions& o) {
    std::ifstream in(o.directory + "/metrics.jsonl");
    std::vector<json> lines;
    for (std::string line; std::getline(in, line);) lines.push_back(json::parse(line));
    return lines;
  }

  fs::path root_;
};

TEST_F(TrainingRunTest, StoppedAnywhereItGoesOnBitForBit) {
  const RunOptions whole = Options("whole");
  const absl::StatusOr<RunOutcome> outcome = Train(whole);
  ASSERT_TRUE(outcome.ok()) << outcome.status();
  EXPECT_TRUE(outcome->finished);
  EXPECT_EQ(outcome->step, kSteps);
  RunOptions pieces = Options("pieces");
  pieces.stop_after = 7;
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(Train(pieces).ok());
  EXPECT_EQ(Last(pieces), Last(whole));
  const std::vector<json> a = Metrics(whole), b = Metrics(pieces);
  ASSERT_EQ(a.size(), kSteps);
  ASSERT_EQ(b.size(), kSteps);
  for (int i = 0; i < kSteps; ++i) EXPECT_EQ(a[i]["loss"], b[i]["loss"]) << i;
  EXPECT_LT(a.back()["loss"].get<double>(), a.front()["loss"].get<double>() - 1);
  EXPECT_EQ(ListRunCheckpoints(whole.directory).size(), 2u) << "keep";
}

TEST_F(TrainingRunTest, KilledAtRandomMomentsItEndsWithTheSameBits) {
  const RunOptions whole = Options("whole");
  const auto begun = std::chrono::steady_clock::now();
  ASSERT_TRUE(Train(whole).ok());
  // Shorter than a run that saves at every step takes, however fast the machine is.
  const std::chrono::nanoseconds took = (std::chrono::steady_clock::now() - begun) / 2;
  RunOptions killed = Options("killed");
  killed.save_every = 1;
  Random random({static_cast<uint64_t>(getpid())});
  int deaths = 0;
  for (int attempt = 0; attempt < 40; ++attempt) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) _exit(Train(killed).ok() ? 0 : 1);
    if (attempt < 12) {
      // Somewhere within what a run takes; not a wait for anything.
      const timespec moment = {
          0, static_cast<long>(random.Below(static_cast<uint64_t>(took.count()) % 1'000'000'000))};
      nanosleep(&moment, nullptr);
      kill(child, SIGKILL);
    }
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    if (WIFEXITED(status)) {
      ASSERT_EQ(WEXITSTATUS(status), 0);
      break;
    }
    ++deaths;
  }
  EXPECT_GT(deaths, 0);
  EXPECT_EQ(Last(killed), Last(whole));
  EXPECT_EQ(Metrics(killed).size(), kSteps);
}

TEST_F(TrainingRunTest, DamagedOrForeignCheckpointsAreRefusedByName) {
  RunOptions o = Options("run");
  o.stop_after = 6;
  ASSERT_TRUE(Train(o).ok());
  const std::string path = ListRunCheckpoints(o.directory).back().second;
  const std::string good = Bytes(path);
  for (const size_t at :
       {size_t{0}, size_t{8}, size_t{17}, size_t{60}, good.size() / 2, good.size() - 1}) {
    std::string bad = good;
    bad[at] = static_cast<char>(bad[at] ^ 1);
    std::ofstream(path, std::ios::binary) << bad;
    const absl::Status status = Train(o).status();
    EXPECT_FALSE(status.ok()) << at;
    EXPECT_THAT(std::string(status.message()), HasSubstr(path)) << at;
  }
  std::ofstream(path, std::ios::binary) << good.substr(0, good.size() - 9);
  EXPECT_EQ(Train(o).status().code(), absl::StatusCode::kDataLoss);
  std::ofstream(path, std::ios::binary) << good;
  RunOptions other = o;
  other.settings["seed"] = 2;
  EXPECT_THAT(std::string(Train(other).status().message()), HasSubstr("seed was 1, is now 2"));
  other = o;
  other.schedule.peak = 0.5;
  EXPECT_THAT(std::string(Train(other).status().message()), HasSubstr("schedule"));
  EXPECT_TRUE(Train(o).ok());
}

TEST_F(TrainingRunTest, ASpikeIsSkippedAndCounted) {
  RunOptions o = Options("spike");
  o.accumulate = 1;
  o.schedule.steps = 140;
  o.schedule.floor = o.schedule.peak = 5e-3;
  ASSERT_TRUE(Train(o, /*surprise=*/120).ok());
  const std::vector<json> metrics = Metrics(o);
  int skipped = 0;
  for (const json& line : metrics) skipped += line.value("skipped", false);
  EXPECT_EQ(skipped, 1);
  EXPECT_TRUE(metrics[120].value("skipped", false)) << metrics[120];
}

TEST(ScheduleTest, WarmsUpAndFalls) {
  const Schedule cosine = {.peak = 1, .floor = 0.1, .warmup = 4, .steps = 104};
  EXPECT_DOUBLE_EQ(cosine.At(0), 0.25);
  EXPECT_DOUBLE_EQ(cosine.At(3), 1);
  EXPECT_DOUBLE_EQ(cosine.At(4), 1);
  EXPECT_NEAR(cosine.At(54), 0.55, 1e-12);
  EXPECT_NEAR(cosine.At(104), 0.1, 1e-12);
  const Schedule wsd = {
      .kind = Schedule::Kind::kWsd, .peak = 1, .floor = 0, .warmup = 4, .steps = 100, .decay = 20};
  EXPECT_DOUBLE_EQ(wsd.At(79), 1);
  EXPECT_DOUBLE_EQ(wsd.At(80), 1);
  EXPECT_DOUBLE_EQ(wsd.At(90), 0.5);
  EXPECT_NEAR(wsd.At(99), 0.05, 1e-12);
}

TEST(WindowOrderTest, AnEpochHasEveryWindowOnceAndTheNextAnotherOrder) {
  const fs::path path = fs::path(::testing::TempDir()) / absl::StrCat("order_", getpid(), ".m3s");
  TokenShardBuilder builder(Sha256Of("t"), 1000);
  std::vector<int32_t> ids(505);
  for (int i = 0; i < 505; ++i) ids[i] = i;
  ASSERT_TRUE(builder.Add("a", "", ids).ok());
  ASSERT_TRUE(builder.Write(path.string()).ok());
  EXPECT_THAT(std::string(TokenCorpus::Open({path.string()}, Sha256Of("u")).status().message()),
              HasSubstr("packed with tokenizer"));
  const auto corpus = TokenCorpus::Open({path.string()}, Sha256Of("t")).value();
  WindowOrder order = WindowOrder::Create(corpus.get(), 10, 7, true).value();
  ASSERT_EQ(order.windows(), 50);
  std::vector<uint64_t> first, second;
  for (int i = 0; i < 50; ++i) first.push_back(order.At(i).first);
  for (int i = 50; i < 100; ++i) second.push_back(order.At(i).first);
  EXPECT_NE(first, second);
  EXPECT_EQ(order.At(3).first, first[3]) << "a function of the number alone";
  EXPECT_TRUE(std::is_permutation(first.begin(), first.end(), second.begin()));
  const TrainingSequence s = SequenceOf(*corpus, {0, 20}, 10, 1);
  EXPECT_EQ(s.token_ids, (std::vector<int32_t>{1, 20, 21, 22, 23, 24, 25, 26, 27, 28}));
  EXPECT_EQ(s.targets, (std::vector<int32_t>{20, 21, 22, 23, 24, 25, 26, 27, 28, 29}));
  EXPECT_EQ(WindowOrder::Create(corpus.get(), 600, 7, true).status().code(),
            absl::StatusCode::kInvalidArgument);
  fs::remove(path);
}

}  // namespace
}  // namespace memory3
