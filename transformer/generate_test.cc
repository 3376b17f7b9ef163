// The offline loops against the decoder driven by hand, and the grid as they live it.
#include "transformer/generate.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "transformer/testing/decoder_fixture.h"

namespace memory3 {
namespace {

using ::testing::HasSubstr;

class GenerateTest : public ::testing::Test {
 protected:
  GenerateTest() : device_(TestDevice()), config_(SmallConfig()) {
    config_.explicit_memory->chunk_tokens = 64;
    decoder_ = TestDecoder(RandomModel(device_.get(), config_));
    std::vector<std::vector<int32_t>> references;
    for (int i = 0; i < 12; ++i) references.push_back(RandomIds(config_, 8 + i, 50 + i));
    for (ExplicitMemory& memory : WriteMemories(*decoder_, references)) {
      memories_.push_back(std::make_shared<const ExplicitMemory>(std::move(memory)));
    }
    // Retrieval r finds memories 2r and 2r + 1, except that the second finds nothing.
    retrieve_ =
        [this](std::span<const int32_t> query) -> absl::StatusOr<std::vector<RetrievedMemory>> {
      const int r = static_cast<int>(queries_.size());
      queries_.emplace_back(query.begin(), query.end());
      std::vector<RetrievedMemory> found;
      if (r != 1) {
        for (int i : {2 * r, 2 * r + 1}) found.push_back({absl::StrCat("m", i), memories_[i]});
      }
      return found;
    };
  }

  std::unique_ptr<Device> device_;
  ModelConfig config_;
  std::unique_ptr<Decoder> decoder_;
  std::vector<std::shared_ptr<const ExplicitMemory>> memories_;
  RetrieveFunction retrieve_;
  std::vector<std::vector<int32_t>> queries_;
};

TEST_F(GenerateTest, EqualsTheDecoderDrivenByHand) {
  const std::vector<int32_t> prompt = RandomIds(config_, 100, 1);
  auto generated = Generate(*decoder_, prompt, retrieve_, {.max_new_tokens = 130});
  ASSERT_TRUE(generated.ok()) << generated.status();
  ASSERT_EQ(generated->tokens.size(), 130u);
  EXPECT_FALSE(generated->stopped);

  // The whole text in one context with the memories the grid gives: chunk 0 and <s>, the rest of
  // the prompt with the first 64 generated, then the next chunks.
  for (int i = 0; i < 8; ++i) ASSERT_TRUE(decoder_->pool().Load(i, *memories_[i]).ok());
  std::vector<int32_t> text = {1};
  text.insert(text.end(), prompt.begin(), prompt.end());
  text.insert(text.end(), generated->tokens.begin(), generated->tokens.end() - 1);
  const std::vector<MemoryRead> reads = {{65, {0, 1}}, {36 + 64, {}}, {64, {4, 5}}, {1, {6, 7}}};
  const std::vector<float> logits = FeedNew(*decoder_, Layout::kMemory, text, reads);
  for (int i = 0; i < 130; ++i) {
    const auto row = logits.begin() + (100 + i) * config_.vocab_size;
    EXPECT_EQ(generated->tokens[i], std::max_element(row, row + config_.vocab_size) - row) << i;
  }
}

TEST_F(GenerateTest, RetrievesOnTheGrid) {
  for (int prompt_tokens : {1, 63, 64, 65, 128}) {
    for (int generated_tokens : {1, 64, 65, 128}) {
      SCOPED_TRACE(absl::StrCat(prompt_tokens, " in, ", generated_tokens, " out"));
      queries_.clear();
      const std::vector<int32_t> prompt = RandomIds(config_, prompt_tokens, 2);
      auto generated = Generate(*decoder_, prompt, retrieve_, {.max_new_tokens = generated_tokens});
      ASSERT_TRUE(generated.ok()) << generated.status();
      const ChunkGrid grid(prompt_tokens, 64);
      ASSERT_EQ(static_cast<int>(queries_.size()), grid.Retrievals(generated_tokens));
      ASSERT_EQ(generated->reads.size(), queries_.size());
      std::vector<int32_t> text = prompt;
      text.insert(text.end(), generated->tokens.begin(), generated->tokens.end());
      for (size_t r = 0; r < queries_.size(); ++r) {
        const ChunkGrid::Range query = grid.QueryOf(static_cast<int>(r));
        EXPECT_EQ(queries_[r],
                  std::vector<int32_t>(text.begin() + query.first, text.begin() + query.end()));
        EXPECT_EQ(generated->reads[r].query, query);
        EXPECT_EQ(generated->reads[r].readers,
                  grid.ReadersOf(static_cast<int>(r), generated_tokens));
        const std::vector<std::string> ids = {absl::StrCat("m", 2 * r),
                                              absl::StrCat("m", 2 * r + 1)};
        EXPECT_EQ(generated->reads[r].memory_ids, r == 1 ? std::vector<std::string>() : ids);
      }
    }
  }
}

TEST_F(GenerateTest, SlicesAndALeadingBosChangeNothing) {
  std::vector<int32_t> prompt = RandomIds(config_, 90, 3);
  const auto run = [&](std::span<const int32_t> ids, int slice_tokens) {
    queries_.clear();
    auto generated = Generate(*decoder_, ids, retrieve_,
                              {.max_new_tokens = 70,
                               .sampling = {.temperature = 1, .seed = 3},
                               .slice_tokens = slice_tokens});
    EXPECT_TRUE(generated.ok()) << generated.status();
    return generated->tokens;
  };
  const std::vector<int32_t> expected = run(prompt, 0);
  for (int slice : {1, 7, 16, 64}) EXPECT_EQ(run(prompt, slice), expected) << slice;
  prompt.insert(prompt.begin(), config_.bos_token_id);
  EXPECT_EQ(run(prompt, 0), expected);
}

// The same memories in another ranking: the same bits.
TEST_F(GenerateTest, TheRankingOfMemoriesChangesNothing) {
  const std::vector<int32_t> prompt = RandomIds(config_, 50, 9),
                             continuation = RandomIds(config_, 30, 10);
  const auto logprobs = [&](std::vector<int> ranking) {
    const RetrieveFunction retrieve =
        [&](std::span<const int32_t>) -> absl::StatusOr<std::vector<RetrievedMemory>> {
      std::vector<RetrievedMemory> found;
      for (int i : ranking) found.push_back({absl::StrCat("m", i), memories_[i]});
      return found;
    };
    auto score = ScoreContinuation(*decoder_, prompt, continuation, retrieve, {});
    EXPECT_TRUE(score.ok()) << score.status();
    return score->logprobs;
  };
  const std::vector<float> expected = logprobs({0, 1, 2, 3, 4});
  EXPECT_EQ(logprobs({4, 2, 3, 1, 0}), expected);
  EXPECT_NE(logprobs({4, 2, 3, 1, 5}), expected);
}

TEST_F(GenerateTest, MemoriesChangeWhatIsGenerated) {
  const std::vector<int32_t> prompt = RandomIds(config_, 20, 4);
  const GenerateOptions options{.max_new_tokens = 40};
  auto with = Generate(*decoder_, prompt, retrieve_, options);
  auto without = Generate(*decoder_, prompt, nullptr, options);
  ASSERT_TRUE(with.ok() && without.ok());
  EXPECT_NE(with->tokens, without->tokens);
  EXPECT_TRUE(without->reads.empty());
}

TEST_F(GenerateTest, StopsAtAStopIdButNotBeforeTheMinimum) {
  const std::vector<int32_t> prompt = RandomIds(config_, 20, 5);
  GenerateOptions options{.max_new_tokens = 30};
  auto free = Generate(*decoder_, prompt, nullptr, options);
  ASSERT_TRUE(free.ok());
  const int32_t stop = free->tokens[6];
  const auto first =
      std::find(free->tokens.begin(), free->tokens.end(), stop) - free->tokens.begin();
  options.stop_ids = {stop};
  auto stopped = Generate(*decoder_, prompt, nullptr, options);
  ASSERT_TRUE(stopped.ok());
  EXPECT_TRUE(stopped->stopped);
  EXPECT_EQ(stopped->tokens,
            std::vector<int32_t>(free->tokens.begin(), free->tokens.begin() + first + 1));
  options.min_new_tokens = 20;
  auto longer = Generate(*decoder_, prompt, nullptr, options);
  ASSERT_TRUE(longer.ok());
  EXPECT_GE(longer->tokens.size(), 20u);
  EXPECT_EQ(std::count(longer->tokens.begin(), longer->tokens.begin() + 20, stop), 0);
}

TEST_F(GenerateTest, ScoreIsTheLogprobOfEveryToken) {
  const std::vector<int32_t> prompt = RandomIds(config_, 70, 6),
                             continuation = RandomIds(config_, 100, 7);
  auto score = ScoreContinuation(*decoder_, prompt, continuation, retrieve_, {});
  ASSERT_TRUE(score.ok()) << score.status();
  ASSERT_EQ(score->logprobs.size(), 100u);
  // Three queries: the first chunk, the last 64 of the prompt, the first 64 of the continuation.
  ASSERT_EQ(queries_.size(), 3u);
  EXPECT_EQ(queries_[1], std::vector<int32_t>(prompt.begin() + 6, prompt.end()));
  EXPECT_EQ(queries_[2], std::vector<int32_t>(continuation.begin(), continuation.begin() + 64));

  for (int i = 0; i < 8; ++i) ASSERT_TRUE(decoder_->pool().Load(i, *memories_[i]).ok());
  std::vector<int32_t> text = {1};
  text.insert(text.end(), prompt.begin(), prompt.end());
  text.insert(text.end(), continuation.begin(), continuation.end() - 1);
  const std::vector<float> logits =
      FeedNew(*decoder_, Layout::kMemory, text, {{65, {0, 1}}, {6 + 64, {}}, {35, {4, 5}}});
  for (int i = 0; i < 100; ++i) {
    const auto row =
        std::span(logits).subspan(size_t(70 + i) * config_.vocab_size, config_.vocab_size);
    EXPECT_EQ(score->logprobs[i], Logprob(row, continuation[i])) << i;
    EXPECT_EQ(score->is_greedy[i],
              std::max_element(row.begin(), row.end()) - row.begin() == continuation[i]);
  }
}

// What was generated greedily scores as greedy, memories and all: both loops read the same.
TEST_F(GenerateTest, ScoreAgreesWithGenerate) {
  const std::vector<int32_t> prompt = RandomIds(config_, 65, 8);
  auto generated = Generate(*decoder_, prompt, retrieve_, {.max_new_tokens = 100});
  ASSERT_TRUE(generated.ok());
  queries_.clear();
  auto score =
      ScoreContinuation(*decoder_, prompt, generated->tokens, retrieve_, {.slice_tokens = 13});
  ASSERT_TRUE(score.ok()) << score.status();
  for (int i = 0; i < 100; ++i) EXPECT_TRUE(score->is_greedy[i]) << i;
}

TEST_F(GenerateTest, BadArgumentsNameTheField) {
  const std::vector<int32_t> prompt = {5, 6};
  const auto message = [&](const GenerateOptions& options) {
    const auto generated = Generate(*decoder_, prompt, retrieve_, options);
    EXPECT_EQ(generated.status().code(), absl::StatusCode::kInvalidArgument) << generated.status();
    return std::string(generated.status().message());
  };
  EXPECT_THAT(message({.max_new_tokens = -1}), HasSubstr("max_new_tokens"));
  EXPECT_THAT(message({.sampling = {.temperature = -1}}), HasSubstr("temperature"));
  EXPECT_THAT(message({.sampling = {}, .slice_tokens = -1}), HasSubstr("slice_tokens"));
  EXPECT_THAT(message({.layout = Layout::kPlain}), HasSubstr("retrieve"));
  const std::vector<int32_t> unknown = {config_.vocab_size};
  EXPECT_EQ(ScoreContinuation(*decoder_, prompt, unknown, nullptr, {}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Generate(*decoder_, unknown, nullptr, {}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(GenerateTest, AFailingRetrievalEndsTheLoop) {
  const RetrieveFunction fails =
      [](std::span<const int32_t>) -> absl::StatusOr<std::vector<RetrievedMemory>> {
    return absl::UnavailableError("store is down");
  };
  const std::vector<int32_t> prompt = {5, 6};
  EXPECT_EQ(Generate(*decoder_, prompt, fails, {}).status().code(), absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace memory3
