#include "cli/question.h"

#include <gtest/gtest.h>

namespace memory3 {
namespace {

TEST(Question, IsPutAsModelsAreTrainedToBeAsked) {
  EXPECT_EQ(PromptOf({.text = "Who founded Aro?"}), QaPrompt("Who founded Aro?"));
  EXPECT_EQ(PromptOf({.text = "Who founded Aro?"}), "Question: Who founded Aro?\nAnswer:");
}

v1::Finish FinishOf(uint32_t tokens, int first_ms, int decode_ms) {
  v1::Finish finish;
  finish.mutable_usage()->set_completion_tokens(tokens);
  finish.mutable_timings()->mutable_time_to_first_token()->set_nanos(first_ms * 1'000'000);
  finish.mutable_timings()->mutable_decode()->set_nanos(decode_ms * 1'000'000);
  return finish;
}

TEST(AnswerSpeed, CountsTheTokensThatDecodingMade) {
  AnswerSpeed speed;
  EXPECT_EQ(speed.MedianFirstTokenMs(), 0);
  EXPECT_EQ(speed.TokensPerSecond(), 0);
  speed.Add(FinishOf(11, 30, 100));
  EXPECT_DOUBLE_EQ(speed.TokensPerSecond(), 100);  // the first of them came out of the prefill
  speed.Add(FinishOf(1, 10, 0));
  speed.Add(FinishOf(0, 20, 0));
  EXPECT_DOUBLE_EQ(speed.TokensPerSecond(), 100);
  EXPECT_DOUBLE_EQ(speed.MedianFirstTokenMs(), 20);
}

}  // namespace
}  // namespace memory3
