// What OpenAI's clients send becomes what they mean; what they get wrong is named.
#include "inference_server/openai_request.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

namespace memory3 {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

OpenAiRequest Parse(OpenAiEndpoint endpoint, const std::string& body) {
  absl::StatusOr<OpenAiRequest> request = ParseOpenAiRequest(endpoint, body);
  EXPECT_TRUE(request.ok()) << request.status() << "\n" << body;
  return request.ok() ? *std::move(request) : OpenAiRequest{};
}
OpenAiRequest Completion(const std::string& body) {
  return Parse(OpenAiEndpoint::kCompletions, body);
}
OpenAiRequest Chat(const std::string& body) { return Parse(OpenAiEndpoint::kChat, body); }

TEST(OpenAiRequestTest, AbsentFieldsHaveOpenAisDefaults) {
  const OpenAiRequest completion = Completion(R"({"model": "m", "prompt": "Hi"})");
  EXPECT_EQ(completion.model, "m");
  EXPECT_FALSE(completion.stream);
  ASSERT_EQ(completion.requests.size(), 1u);
  const v1::GenerateRequest& request = completion.requests[0];
  EXPECT_EQ(request.text(), "Hi");
  EXPECT_EQ(request.sampling().temperature(), 1);
  EXPECT_EQ(request.stopping().max_new_tokens(), 16u);
  EXPECT_FALSE(request.has_memory());
  EXPECT_FALSE(request.has_logprobs());
  EXPECT_FALSE(request.sampling().has_seed());
  EXPECT_FALSE(request.sampling().has_top_p());

  const OpenAiRequest chat =
      Chat(R"({"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stop": null})");
  ASSERT_EQ(chat.requests.size(), 1u);
  EXPECT_FALSE(chat.requests[0].stopping().has_max_new_tokens());
  EXPECT_EQ(chat.requests[0].sampling().temperature(), 1);
}

TEST(OpenAiRequestTest, EveryOptionArrives) {
  const OpenAiRequest all = Completion(R"({
    "model": "m", "prompt": "Hi", "max_tokens": 7, "temperature": 0, "top_p": 0.5, "n": 1,
    "stop": ["a", "bc"], "stream": true, "stream_options": {"include_usage": true},
    "logprobs": 3, "echo": false, "seed": -1, "presence_penalty": -2, "frequency_penalty": 2,
    "logit_bias": {"5": -100, "6": 1.5}, "user": "u", "best_of": 1, "suffix": null,
    "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2,
    "stop_token_ids": [9], "ignore_eos": true,
    "memory": {"knowledge_base": "wiki", "enabled": true, "references_per_chunk": 0,
               "min_score": -0.5, "policy": "deadline", "deadline_ms": 1500.25,
               "on_unavailable": "fail", "with_text": true,
               "filter": {"document_ids": ["d1", "d2"], "metadata": {"k": "v"}}}})");
  EXPECT_TRUE(all.stream);
  EXPECT_TRUE(all.include_usage);
  ASSERT_EQ(all.requests.size(), 1u);
  const v1::GenerateRequest& r = all.requests[0];
  EXPECT_EQ(r.stopping().max_new_tokens(), 7u);
  EXPECT_EQ(r.stopping().min_new_tokens(), 2u);
  EXPECT_THAT(r.stopping().stop(), ElementsAre("a", "bc"));
  EXPECT_THAT(r.stopping().stop_token_ids(), ElementsAre(9));
  EXPECT_TRUE(r.stopping().ignore_eos());
  EXPECT_EQ(r.logprobs(), 3u);
  EXPECT_TRUE(r.sampling().has_temperature());
  EXPECT_EQ(r.sampling().temperature(), 0);
  EXPECT_FLOAT_EQ(r.sampling().top_p(), 0.5);
  EXPECT_EQ(r.sampling().top_k(), 40u);
  EXPECT_FLOAT_EQ(r.sampling().min_p(), 0.1);
  EXPECT_FLOAT_EQ(r.sampling().repetition_penalty(), 1.2);
  EXPECT_EQ(r.sampling().presence_penalty(), -2);
  EXPECT_EQ(r.sampling().frequency_penalty(), 2);
  EXPECT_EQ(r.sampling().seed(), ~uint64_t{0});
  EXPECT_EQ(r.sampling().logit_bias().at(5), -100);
  EXPECT_EQ(r.sampling().logit_bias().at(6), 1.5);
  EXPECT_EQ(r.memory().knowledge_base(), "wiki");
  EXPECT_TRUE(r.memory().enabled());
  EXPECT_TRUE(r.memory().has_references_per_chunk());
  EXPECT_EQ(r.memory().references_per_chunk(), 0u);
  EXPECT_EQ(r.memory().min_score(), -0.5);
  EXPECT_EQ(r.memory().policy(), v1::MemoryOptions::DEADLINE);
  EXPECT_EQ(r.memory().deadline().seconds(), 1);
  EXPECT_EQ(r.memory().deadline().nanos(), 500250000);
  EXPECT_EQ(r.memory().on_unavailable(), v1::MemoryOptions::FAIL);
  EXPECT_TRUE(r.memory().with_text());
  EXPECT_THAT(r.memory().filter().document_ids(), ElementsAre("d1", "d2"));
  EXPECT_EQ(r.memory().filter().metadata().at("k"), "v");
}

TEST(OpenAiRequestTest, APromptIsATextOrIdsOrSeveralOfThem) {
  const OpenAiRequest ids = Completion(R"({"model": "m", "prompt": [1, 2, 3]})");
  ASSERT_EQ(ids.requests.size(), 1u);
  EXPECT_THAT(ids.requests[0].token_ids().ids(), ElementsAre(1, 2, 3));
  const OpenAiRequest several =
      Completion(R"({"model": "m", "prompt": ["a", "b"], "max_tokens": 3})");
  ASSERT_EQ(several.requests.size(), 2u);
  EXPECT_EQ(several.requests[1].text(), "b");
  EXPECT_EQ(several.requests[1].stopping().max_new_tokens(), 3u);
  const OpenAiRequest lists = Completion(R"({"model": "m", "prompt": [[4], [5, 6]]})");
  ASSERT_EQ(lists.requests.size(), 2u);
  EXPECT_THAT(lists.requests[1].token_ids().ids(), ElementsAre(5, 6));
}

TEST(OpenAiRequestTest, MessagesMayHaveNamesPartsAndADeveloper) {
  const OpenAiRequest chat = Chat(R"({"model": "m", "messages": [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "a"},
                                                {"type": "text", "text": "b"}]}],
    "max_completion_tokens": 5, "logprobs": true, "tools": [], "response_format": {"type": "text"}})");
  ASSERT_EQ(chat.messages.size(), 2u);
  EXPECT_EQ(chat.messages[0].role, "system");
  EXPECT_EQ(chat.messages[1].content, "ab");
  EXPECT_EQ(chat.requests[0].stopping().max_new_tokens(), 5u);
  EXPECT_TRUE(chat.requests[0].has_logprobs());
  EXPECT_EQ(chat.requests[0].logprobs(), 0u);
}

TEST(OpenAiRequestTest, MemoryIsSwitchedOffInThreeWays) {
  for (const char* memory : {"false", R"({"enabled": false})", R"({"policy": "off"})"}) {
    const OpenAiRequest request =
        Completion(R"({"model": "m", "prompt": "a", "memory": )" + std::string(memory) + "}");
    EXPECT_TRUE(request.requests[0].memory().has_enabled()) << memory;
    EXPECT_FALSE(request.requests[0].memory().enabled()) << memory;
  }
}

TEST(OpenAiRequestTest, WhatIsWrongIsNamed) {
  // Added to a request that is right; the field at fault; a part of the message.
  struct Case {
    const char* addition;
    const char* param;
    const char* message;
  };
  for (const auto& [addition, param, message] : std::vector<Case>{
           {R"("temperature": 2.5)", "temperature", "2.5 is not within 0 and 2"},
           {R"("temperature": -1)", "temperature", "-1 is not within"},
           {R"("temperature": "hot")", "temperature", "must be a number, not a string"},
           {R"("max_tokens": 0)", "max_tokens", "0 is not within 1"},
           {R"("max_tokens": 1.5)", "max_tokens", "must be an integer, not a fraction"},
           {R"("max_tokens": 99999999999999999999)", "max_tokens", "must be an integer"},
           {R"("max_tokens": 18446744073709551615)", "max_tokens", "18446744073709551615 is not"},
           {R"("top_p": 1.01)", "top_p", "not within 0 and 1"},
           {R"("n": 2)", "n", "only 1 is supported"},
           {R"("best_of": 3)", "best_of", "only 1 is supported"},
           {R"("suffix": "x")", "suffix", "is supported"},
           {R"("stop": 5)", "stop", "must be an array of strings"},
           {R"("stop": "")", "stop", "a string is empty"},
           {R"("stop": ["a", 1])", "stop", "must be an array of strings"},
           {R"("stream": "yes")", "stream", "must be a boolean"},
           {R"("stream_options": {})", "stream_options", "stream = true"},
           {R"("stream": true, "stream_options": {"x": 1})", "stream_options.x", "Unrecognized"},
           {R"("logprobs": 21)", "logprobs", "not within 0 and 20"},
           {R"("logprobs": 1, "echo": true)", "logprobs", "echo"},
           {R"("logit_bias": {"a": 1})", "logit_bias", "no token id"},
           {R"("logit_bias": {"1": 101})", "logit_bias", "the value of 1"},
           {R"("logit_bias": {"1": 1, "01": 1})", "logit_bias", "given twice"},
           {R"("logit_bias": [1])", "logit_bias", "must be an object"},
           {R"("stop_token_ids": [-1])", "stop_token_ids", "array of token ids"},
           {R"("tempreature": 1)", "tempreature", "Unrecognized request argument"},
           {R"("memory": 3)", "memory", "an object or a boolean"},
           {R"("memory": {"kb": "x"})", "memory.kb", "Unrecognized"},
           {R"("memory": {"policy": "soon"})", "memory.policy", "must be"},
           {R"("memory": {"policy": "deadline"})", "memory.deadline_ms", "is missing"},
           {R"("memory": {"policy": "wait", "deadline_ms": 1})", "memory.deadline_ms", "only"},
           {R"("memory": {"deadline_ms": -1})", "memory.deadline_ms", "not within"},
           {R"("memory": {"references_per_chunk": -1})", "memory.references_per_chunk", "-1"},
           {R"("memory": {"filter": 1})", "memory.filter", "an object"},
           {R"("memory": {"filter": {"metadata": {"a": 1}}})", "memory.filter.metadata", "strings"},
           {R"("memory": {"filter": {"ids": []}})", "memory.filter.ids", "Unrecognized"},
       }) {
    const std::string body = R"({"model": "m", "prompt": "a", )" + std::string(addition) + "}";
    const absl::Status status = ParseOpenAiRequest(OpenAiEndpoint::kCompletions, body).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << body;
    EXPECT_EQ(OpenAiParam(std::string(status.message())), param) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(message));
  }
  for (const auto& [body, param, message] : std::vector<Case>{
           {"{}", "model", "is missing"},
           {R"({"model": "m"})", "prompt", "is missing"},
           {R"({"model": "m", "prompt": ""})", "prompt", "it is empty"},
           {R"({"model": "m", "prompt": []})", "prompt", "it is empty"},
           {R"({"model": "m", "prompt": ["a", ""]})", "prompt[1]", "it is empty"},
           {R"({"model": "m", "prompt": [1, "a"]})", "prompt[0]", "must be a string"},
           {R"({"model": "m", "prompt": [-1]})", "prompt", "negative"},
           {R"({"model": "m", "prompt": {"a": 1}})", "prompt", "must be a string"},
           {R"({"model": "m", "prompt": "a", "prompt": "b"})", "", "stands twice"},
           {"[]", "", "must be a JSON object"},
           {"{\"model\": \"m\", \"prompt\": \"\xff\"}", "", "not JSON"},
           {"", "", "not JSON"},
       }) {
    const absl::Status status = ParseOpenAiRequest(OpenAiEndpoint::kCompletions, body).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << body;
    EXPECT_EQ(OpenAiParam(std::string(status.message())), param) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(message));
  }
}

TEST(OpenAiRequestTest, WhatIsWrongInAChatIsNamed) {
  const auto wrong = [](const std::string& fields) {
    const absl::Status status =
        ParseOpenAiRequest(OpenAiEndpoint::kChat, R"({"model": "m", )" + fields + "}").status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << fields;
    return OpenAiParam(std::string(status.message()));
  };
  const std::string good = R"("messages": [{"role": "user", "content": "a"}], )";
  EXPECT_EQ(wrong(R"("messages": [])"), "messages");
  EXPECT_EQ(wrong(R"("messages": "a")"), "messages");
  EXPECT_EQ(wrong(R"("messages": ["a"])"), "messages[0]");
  EXPECT_EQ(wrong(R"("messages": [{"content": "a"}])"), "messages[0].role");
  EXPECT_EQ(wrong(R"("messages": [{"role": "user"}])"), "messages[0].content");
  EXPECT_EQ(wrong(R"("messages": [{"role": "user", "content": [{"type": "image_url"}]}])"),
            "messages[0].content[0]");
  EXPECT_EQ(wrong(R"("messages": [{"role": "user", "content": "a", "tool_calls": [1]}])"),
            "messages[0].tool_calls");
  EXPECT_EQ(wrong(good + R"("prompt": "a")"), "prompt");
  EXPECT_EQ(wrong(good + R"("tools": [{}])"), "tools");
  EXPECT_EQ(wrong(good + R"("tool_choice": "required")"), "tool_choice");
  EXPECT_EQ(wrong(good + R"("response_format": {"type": "json_object"})"), "response_format");
  EXPECT_EQ(wrong(good + R"("logprobs": 3)"), "logprobs");
  EXPECT_EQ(wrong(good + R"("top_logprobs": 3)"), "top_logprobs");
  EXPECT_EQ(wrong(good + R"("max_tokens": 3, "max_completion_tokens": 4)"),
            "max_completion_tokens");
}

TEST(OpenAiRequestTest, TheEnginesMessagesNameOpenAisFields) {
  EXPECT_EQ(OpenAiParam("stopping.max_new_tokens is 0"), "max_tokens");
  EXPECT_EQ(OpenAiParam("stopping.stop: a string is empty"), "stop");
  EXPECT_EQ(OpenAiParam("prompt.token_ids[3] is 600, not in the vocabulary"), "prompt[3]");
  EXPECT_EQ(OpenAiParam("prompt has 600 tokens; the longest context is 512"), "prompt");
  EXPECT_EQ(OpenAiParam("prompt.text has 600000 bytes; the longest context is 512"), "prompt");
  EXPECT_EQ(OpenAiParam("memory.deadline is negative"), "memory.deadline_ms");
  EXPECT_EQ(OpenAiParam("logit_bias: token id 9 is not in the vocabulary"), "logit_bias");
  EXPECT_EQ(OpenAiParam("the queue is full: 3 requests wait"), "");
  EXPECT_EQ(OpenAiParam(""), "");
}

}  // namespace
}  // namespace memory3
