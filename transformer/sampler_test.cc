#include "transformer/sampler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <vector>

namespace memory3 {
namespace {

using ::testing::HasSubstr;

std::vector<float> RandomLogits(int vocab, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 2);
  std::vector<float> logits(vocab);
  for (float& x : logits) x = normal(random);
  return logits;
}

// The distribution of the next token, computed the plain way: one normalised vector after another.
std::vector<double> Reference(const SamplingOptions& o, std::vector<float> logits,
                              const std::vector<int32_t>& prompt,
                              const std::vector<int32_t>& output) {
  const int n = static_cast<int>(logits.size());
  std::vector<double> x(logits.begin(), logits.end());
  for (const auto& [id, bias] : o.logit_bias) x[id] += bias;
  for (int id = 0; id < n; ++id) {
    const auto count = std::count(output.begin(), output.end(), id);
    if (count > 0 || std::count(prompt.begin(), prompt.end(), id) > 0) {
      x[id] = x[id] > 0 ? x[id] / o.repetition_penalty : x[id] * o.repetition_penalty;
    }
    x[id] -= o.frequency_penalty * count + (count > 0 ? o.presence_penalty : 0);
  }
  const auto normalise = [](std::vector<double>& p) {
    const double sum = std::accumulate(p.begin(), p.end(), 0.0);
    for (double& v : p) v /= sum;
  };
  std::vector<double> p(n);
  const double largest = *std::max_element(x.begin(), x.end());
  for (int id = 0; id < n; ++id) p[id] = std::exp((x[id] - largest) / o.temperature);
  normalise(p);
  const auto ranked = [&] {
    std::vector<int> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return p[a] > p[b]; });
    return order;
  };
  if (o.top_k > 0) {
    const std::vector<int> order = ranked();
    for (int i = o.top_k; i < n; ++i) p[order[i]] = 0;
    normalise(p);
  }
  double before = 0;
  const std::vector<int> order = ranked();
  for (int i = 0; i < n; ++i) {
    const double own = p[order[i]];
    if (before >= o.top_p) p[order[i]] = 0;
    before += own;
  }
  normalise(p);
  const double threshold = o.min_p * *std::max_element(p.begin(), p.end());
  for (double& v : p) v = v < threshold ? 0 : v;
  normalise(p);
  return p;
}

struct Case {
  const char* name;
  SamplingOptions options;
};

std::vector<Case> Cases() {
  return {
      {"temperature", {.temperature = 0.7f}},
      {"hot", {.temperature = 3}},
      {"top_k", {.temperature = 1, .top_k = 5}},
      {"top_k beyond the vocabulary", {.temperature = 1, .top_k = 1000}},
      {"top_p", {.temperature = 1, .top_p = 0.8f}},
      {"min_p", {.temperature = 1, .min_p = 0.1f}},
      {"all three", {.temperature = 1.5f, .top_k = 20, .top_p = 0.9f, .min_p = 0.05f}},
      {"repetition", {.temperature = 1, .repetition_penalty = 1.7f}},
      {"presence", {.temperature = 1, .presence_penalty = 1.5f}},
      {"frequency", {.temperature = 1, .frequency_penalty = 0.8f}},
      {"rewards",
       {.temperature = 1,
        .repetition_penalty = 0.8f,
        .presence_penalty = -1,
        .frequency_penalty = -0.5f}},
      {"bias", {.temperature = 1, .logit_bias = {{3, 4.0f}, {7, -100.0f}}}},
  };
}

// Draws come as in the reference distribution: chi-square over many seeds.
TEST(SamplerTest, DrawsFollowTheReferenceDistribution) {
  constexpr int kVocab = 40, kDraws = 20000;
  const std::vector<float> logits = RandomLogits(kVocab, 5);
  const std::vector<int32_t> prompt = {1, 2, 2, 9}, output = {2, 11, 11, 11, 30};
  for (const Case& c : Cases()) {
    SCOPED_TRACE(c.name);
    const std::vector<double> expected = Reference(c.options, logits, prompt, output);
    std::vector<int> counts(kVocab);
    for (int i = 0; i < kDraws; ++i) {
      SamplingOptions options = c.options;
      options.seed = 1000 + i;
      auto sampler = Sampler::Create(options, kVocab, prompt);
      ASSERT_TRUE(sampler.ok()) << sampler.status();
      for (int32_t id : output) sampler->Accept(id);
      auto id = sampler->Sample(logits);
      ASSERT_TRUE(id.ok()) << id.status();
      ++counts[*id];
    }
    double chi_square = 0;
    int cells = 0;
    for (int id = 0; id < kVocab; ++id) {
      const double want = expected[id] * kDraws;
      if (want == 0) {
        EXPECT_EQ(counts[id], 0) << id;
        continue;
      }
      if (want < 5) continue;  // chi-square wants filled cells
      chi_square += (counts[id] - want) * (counts[id] - want) / want;
      ++cells;
    }
    // Mean + 5 standard deviations; the seeds are fixed, so this passes always or never.
    EXPECT_LT(chi_square, cells + 5 * std::sqrt(2.0 * cells));
  }
}

TEST(SamplerTest, GreedyTakesTheLowerIdOfEqualLogits) {
  auto sampler = Sampler::Create({}, 5, {});
  ASSERT_TRUE(sampler.ok());
  EXPECT_TRUE(sampler->is_plain_greedy());
  EXPECT_EQ(*sampler->Sample(std::vector<float>{1, 3, 2, 3, 3}), 1);
  EXPECT_EQ(*sampler->Sample(std::vector<float>{1, 3, 2, 3, 3}, std::vector<int32_t>{1}), 3);
}

TEST(SamplerTest, GreedyAppliesPenaltiesAndBias) {
  auto sampler = Sampler::Create({.repetition_penalty = 2, .logit_bias = {{2, 0.4f}}}, 3,
                                 std::vector<int32_t>{1});
  ASSERT_TRUE(sampler.ok());
  EXPECT_FALSE(sampler->is_plain_greedy());
  EXPECT_EQ(*sampler->Sample(std::vector<float>{1.2f, 2, 1}), 2);  // 1.2, 1 (seen), 1.4 (bias)
  EXPECT_EQ(*sampler->Sample(std::vector<float>{1.2f, 2, 1}), 0);  // 2 is now seen: 0.7
}

TEST(SamplerTest, DrawsDependOnSeedAndIndexOnly) {
  const std::vector<float> logits = RandomLogits(64, 8);
  const SamplingOptions options{.temperature = 1, .seed = 77};
  auto whole = Sampler::Create(options, 64, {});
  std::vector<int32_t> first;
  for (int i = 0; i < 20; ++i) first.push_back(*whole->Sample(logits));
  // Preempted after ten tokens and replayed.
  auto resumed = Sampler::Create(options, 64, {});
  for (int i = 0; i < 10; ++i) resumed->Accept(first[i]);
  for (int i = 10; i < 20; ++i) EXPECT_EQ(*resumed->Sample(logits), first[i]) << i;

  auto other = Sampler::Create({.temperature = 1, .seed = 78}, 64, {});
  std::vector<int32_t> second;
  for (int i = 0; i < 20; ++i) second.push_back(*other->Sample(logits));
  EXPECT_NE(first, second);
}

TEST(SamplerTest, DrawsAreUniform) {
  double sum = 0, square = 0;
  for (uint64_t i = 0; i < 100000; ++i) {
    const double u = SamplingDraw(i / 1000, i % 1000);
    ASSERT_GE(u, 0);
    ASSERT_LT(u, 1);
    sum += u;
    square += u * u;
  }
  EXPECT_NEAR(sum / 1e5, 0.5, 0.005);
  EXPECT_NEAR(square / 1e5, 1.0 / 3, 0.005);
}

TEST(SamplerTest, Logprobs) {
  const std::vector<float> logits = {0, std::log(2.0f), std::log(4.0f), std::log(2.0f), -200};
  EXPECT_NEAR(Logprob(logits, 0), -std::log(9.0), 1e-6);
  const std::vector<TokenLogprob> top = TopLogprobs(logits, 3);
  ASSERT_EQ(top.size(), 3u);
  EXPECT_EQ(top[0].id, 2);
  EXPECT_NEAR(top[0].logprob, std::log(4.0 / 9), 1e-6);
  EXPECT_EQ(top[1].id, 1);
  EXPECT_EQ(top[2].id, 3);
  EXPECT_EQ(TopLogprobs(logits, 100).size(), 5u);
}

TEST(SamplerTest, BadValuesNameTheField) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<std::pair<std::string, SamplingOptions>> bad = {
      {"temperature", {.temperature = -1}},
      {"temperature", {.temperature = kNan}},
      {"temperature", {.temperature = std::numeric_limits<float>::infinity()}},
      {"top_k", {.top_k = -1}},
      {"top_p", {.top_p = 0}},
      {"top_p", {.top_p = 1.01f}},
      {"top_p", {.top_p = kNan}},
      {"min_p", {.min_p = -0.1f}},
      {"min_p", {.min_p = 1}},
      {"min_p", {.min_p = kNan}},
      {"repetition_penalty", {.repetition_penalty = 0}},
      {"repetition_penalty", {.repetition_penalty = kNan}},
      {"presence_penalty", {.presence_penalty = 2.5f}},
      {"frequency_penalty", {.frequency_penalty = -2.5f}},
      {"logit_bias", {.logit_bias = {{10, 1.0f}}}},
      {"logit_bias", {.logit_bias = {{-1, 1.0f}}}},
      {"logit_bias", {.logit_bias = {{1, kNan}}}},
      {"logit_bias", {.logit_bias = {{1, 101.0f}}}},
      {"logit_bias", {.logit_bias = {{1, 1.0f}, {1, 2.0f}}}},
  };
  for (const auto& [field, options] : bad) {
    const absl::Status status = CheckSampling(options, 10);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << field;
    EXPECT_THAT(std::string(status.message()), HasSubstr(field));
  }
  EXPECT_TRUE(CheckSampling({}, 10).ok());
}

TEST(SamplerTest, LogitsThatCannotBeSampledAreErrors) {
  auto sampler = Sampler::Create({.temperature = 1}, 2, {});
  ASSERT_TRUE(sampler.ok());
  EXPECT_EQ(sampler->Sample(std::vector<float>{0, std::nanf("")}).status().code(),
            absl::StatusCode::kInternal);
  EXPECT_EQ(sampler->Sample(std::vector<float>{0}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(sampler->Sample(std::vector<float>{0, 0}, std::vector<int32_t>{0, 1}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace memory3
