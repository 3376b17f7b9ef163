#include "memory/selection.h"

#include <cmath>
#include <limits>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace memory3 {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Takes the largest left, `keep` times, then lists the taken in order.
std::vector<int32_t> SelectNaively(const std::vector<float>& weights, int kv_heads, int tokens,
                                   int keep) {
  std::vector<int32_t> selected;
  for (int h = 0; h < kv_heads; ++h) {
    std::vector<bool> taken(tokens, false);
    for (int n = 0; n < keep && n < tokens; ++n) {
      int best = -1;
      for (int j = 0; j < tokens; ++j) {
        if (!taken[j] && (best < 0 || weights[h * tokens + j] > weights[h * tokens + best]))
          best = j;
      }
      taken[best] = true;
    }
    for (int j = 0; j < tokens; ++j) {
      if (taken[j]) selected.push_back(j);
    }
  }
  return selected;
}

TEST(SelectTokensTest, LargestPerHeadAscending) {
  const std::vector<float> weights = {1, 5, 2, 4,  //
                                      9, 1, 1, 8};
  EXPECT_THAT(SelectTokens(weights, 2, 4, 2).value(), ElementsAre(1, 3, 0, 3));
}

TEST(SelectTokensTest, TiesGoToTheLowerIndex) {
  EXPECT_THAT(SelectTokens(std::vector<float>{1, 2, 2, 2, 1}, 1, 5, 2).value(), ElementsAre(1, 2));
  EXPECT_THAT(SelectTokens(std::vector<float>(6, 0.5f), 1, 6, 3).value(), ElementsAre(0, 1, 2));
  EXPECT_THAT(SelectTokens(std::vector<float>{-0.0f, 0.0f}, 1, 2, 1).value(), ElementsAre(0));
}

TEST(SelectTokensTest, AllWhereThereAreFewer) {
  EXPECT_THAT(SelectTokens(std::vector<float>{3, 1, 2}, 1, 3, 8).value(), ElementsAre(0, 1, 2));
}

TEST(SelectTokensTest, AgreesWithTheNaiveOneOnManyTies) {
  std::mt19937 random(7);
  for (int round = 0; round < 300; ++round) {
    const int heads = 1 + random() % 4;
    const int tokens = 1 + random() % 128;
    const int keep = 1 + random() % 16;
    const int levels = 1 + random() % 40;
    std::vector<float> weights(heads * tokens);
    for (float& w : weights) w = static_cast<float>(random() % levels);
    ASSERT_EQ(SelectTokens(weights, heads, tokens, keep).value(),
              SelectNaively(weights, heads, tokens, keep));
  }
}

TEST(SelectTokensTest, RefusesBadInput) {
  EXPECT_THAT(std::string(SelectTokens({}, 1, 0, 8).status().message()), HasSubstr("tokens 0"));
  EXPECT_THAT(std::string(SelectTokens(std::vector<float>(5), 2, 3, 8).status().message()),
              HasSubstr("5 weights for 2 heads of 3 tokens"));
  const std::vector<float> nan = {1, 2, 3, std::nanf("")};
  EXPECT_THAT(std::string(SelectTokens(nan, 2, 2, 1).status().message()),
              HasSubstr("KV head 1, token 1 is NaN"));
}

TEST(AttentionReceivedTest, WorkedByHand) {
  // One KV head, two query heads, two tokens, head_dim 1. Queries 0 give softmax 1/2, 1/2; query ln
  // 3 over keys 1 and 0 gives 3/4, 1/4.
  const float ln3 = std::log(3.0f);
  const std::vector<float> q = {0, ln3, 0, 0};
  const std::vector<float> k = {1, 0};
  const std::vector<double> w = AttentionReceived(q, k, 2, 1, 2, 1);
  ASSERT_EQ(w.size(), 2);
  EXPECT_NEAR(w[0], 0.5 * 3 + 0.75, 1e-7);
  EXPECT_NEAR(w[1], 0.5 * 3 + 0.25, 1e-7);
}

TEST(AttentionReceivedTest, SumsToRowsTimesGroup) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  const int query_heads = 6, kv_heads = 2, tokens = 11, head_dim = 8;
  std::vector<float> q(query_heads * tokens * head_dim), k(kv_heads * tokens * head_dim);
  for (float& x : q) x = normal(random);
  for (float& x : k) x = normal(random);
  const std::vector<double> w = AttentionReceived(q, k, query_heads, kv_heads, tokens, head_dim);
  for (int h = 0; h < kv_heads; ++h) {
    double sum = 0;
    for (int j = 0; j < tokens; ++j) sum += w[h * tokens + j];
    constexpr int kGroup = query_heads / kv_heads;
    EXPECT_NEAR(sum, tokens * kGroup, 1e-9);
  }
  // A key of KV head 1 changed: nothing of head 0 moves.
  for (int c = 0; c < head_dim; ++c) k[(tokens + 4) * head_dim + c] = 0;
  const std::vector<double> changed =
      AttentionReceived(q, k, query_heads, kv_heads, tokens, head_dim);
  for (int j = 0; j < tokens; ++j) EXPECT_EQ(changed[j], w[j]);
  EXPECT_NE(changed[tokens + 4], w[tokens + 4]);
}

}  // namespace
}  // namespace memory3
