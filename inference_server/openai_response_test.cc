// Our answers in OpenAI's shape.
#include "inference_server/openai_response.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "nlohmann/json.hpp"

namespace memory3 {
namespace {

using ::testing::HasSubstr;
using Json = nlohmann::json;

v1::GenerateResponse Prompt(const std::string& knowledge_base = "") {
  v1::GenerateResponse event;
  event.mutable_prompt()->set_model("m");
  event.mutable_prompt()->set_knowledge_base(knowledge_base);
  if (!knowledge_base.empty()) event.mutable_prompt()->set_knowledge_base_version(4);
  return event;
}
v1::GenerateResponse Delta(const std::string& text, float logprob = 0, int top = -1) {
  v1::GenerateResponse event;
  event.mutable_delta()->set_text(text);
  event.mutable_delta()->add_token_ids(7);
  if (top < 0) return event;
  v1::TokenLogprobs& logprobs = *event.mutable_delta()->add_logprobs();
  logprobs.mutable_chosen()->set_text(text);
  logprobs.mutable_chosen()->set_logprob(logprob);
  for (int i = 0; i < top; ++i) {
    v1::TokenLogprob& other = *logprobs.add_top();
    other.set_text(absl::StrCat("t", i));
    other.set_logprob(-1.0f - static_cast<float>(i));
  }
  return event;
}
v1::GenerateResponse Chunk() {
  v1::GenerateResponse event;
  v1::ChunkProvenance& chunk = *event.mutable_provenance();
  chunk.set_chunk(1);
  chunk.set_generated(true);
  chunk.set_token_begin(64);
  chunk.set_token_end(128);
  v1::ChunkProvenance::Memory& memory = *chunk.add_memories();
  memory.set_record_id("\x01\xff");
  memory.set_score(0.5);
  memory.set_from(v1::HOST);
  v1::Source& source = *memory.add_sources();
  source.set_document_id("d");
  source.set_title("T");
  source.set_uri("https://example.org/d");
  source.set_char_begin(5);
  source.set_char_end(9);
  return event;
}
v1::GenerateResponse Finish(v1::FinishReason reason = v1::FINISH_REASON_LENGTH,
                            int retrievals = 0) {
  v1::GenerateResponse event;
  event.mutable_finish()->set_reason(reason);
  v1::Usage& usage = *event.mutable_finish()->mutable_usage();
  usage.set_prompt_tokens(3);
  usage.set_completion_tokens(2);
  usage.set_retrievals(retrievals);
  usage.set_memories_read(5 * retrievals);
  event.mutable_finish()->mutable_timings()->mutable_total()->set_nanos(2'500'000);
  return event;
}

AnswerHeader Header(OpenAiEndpoint endpoint) { return {endpoint, "id-1", "m", 1700000000}; }

// The objects of server-sent events; "[DONE]" as a string.
std::vector<Json> Objects(const std::string& sse) {
  std::vector<Json> objects;
  for (const auto& event : absl::StrSplit(sse, "\n\n", absl::SkipEmpty())) {
    const std::string text(event);
    EXPECT_EQ(text.substr(0, 6), "data: ");
    objects.push_back(text == "data: [DONE]" ? Json("[DONE]") : Json::parse(text.substr(6)));
  }
  return objects;
}

Json Body(OpenAiEndpoint endpoint, const std::vector<v1::GenerateResponse>& events) {
  v1::GenerateUnaryResponse answer;
  for (const v1::GenerateResponse& event : events) AddEvent(event, &answer);
  return Json::parse(AnswerBody(Header(endpoint), {&answer, 1}));
}

TEST(OpenAiResponseTest, ACompletion) {
  const Json body = Body(OpenAiEndpoint::kCompletions,
                         {Prompt(), Delta("Hé", -0.5, 2), Delta("y", -0.25, 2), Finish()});
  EXPECT_EQ(body["object"], "text_completion");
  EXPECT_EQ(body["id"], "id-1");
  EXPECT_EQ(body["model"], "m");
  EXPECT_EQ(body["created"], 1700000000);
  const Json& choice = body["choices"][0];
  EXPECT_EQ(choice["text"], "Héy");
  EXPECT_EQ(choice["index"], 0);
  EXPECT_EQ(choice["finish_reason"], "length");
  EXPECT_EQ(choice["logprobs"]["tokens"], Json({"Hé", "y"}));
  EXPECT_EQ(choice["logprobs"]["token_logprobs"], Json({-0.5, -0.25}));
  EXPECT_EQ(choice["logprobs"]["text_offset"], Json({0, 2}));  // characters, not bytes
  EXPECT_EQ(choice["logprobs"]["top_logprobs"][0],
            Json({{"t0", -1.0}, {"t1", -2.0}, {"Hé", -0.5}}));
  EXPECT_EQ(body["usage"]["prompt_tokens"], 3);
  EXPECT_EQ(body["usage"]["completion_tokens"], 2);
  EXPECT_EQ(body["usage"]["total_tokens"], 5);
  EXPECT_EQ(body["timings"]["total_ms"], 2.5);
  EXPECT_FALSE(body.contains("memory"));
}

TEST(OpenAiResponseTest, AChat) {
  const Json body =
      Body(OpenAiEndpoint::kChat, {Prompt(), Delta("é", -std::numeric_limits<float>::infinity(), 1),
                                   Delta("\xEF\xBF\xBD", -1, 0), Finish(v1::FINISH_REASON_STOP)});
  EXPECT_EQ(body["object"], "chat.completion");
  const Json& choice = body["choices"][0];
  EXPECT_EQ(choice["message"]["role"], "assistant");
  EXPECT_EQ(choice["message"]["content"], "é\xEF\xBF\xBD");
  EXPECT_EQ(choice["finish_reason"], "stop");
  const Json& tokens = choice["logprobs"]["content"];
  EXPECT_EQ(tokens[0]["bytes"], Json({0xC3, 0xA9}));
  EXPECT_EQ(tokens[0]["logprob"], -9999.0);
  EXPECT_EQ(tokens[0]["top_logprobs"][0]["token"], "t0");
  EXPECT_TRUE(tokens[1]["bytes"].is_null());  // a part of a character
  EXPECT_TRUE(tokens[1]["top_logprobs"].empty());
}

TEST(OpenAiResponseTest, SeveralPromptsAreSeveralChoices) {
  std::vector<v1::GenerateUnaryResponse> answers(2);
  for (const v1::GenerateResponse& event : {Prompt("kb"), Delta("a"), Chunk(), Finish({}, 1)}) {
    for (v1::GenerateUnaryResponse& answer : answers) AddEvent(event, &answer);
  }
  const Json body = Json::parse(AnswerBody(Header(OpenAiEndpoint::kCompletions), answers));
  ASSERT_EQ(body["choices"].size(), 2u);
  EXPECT_EQ(body["choices"][1]["index"], 1);
  EXPECT_EQ(body["usage"]["prompt_tokens"], 6);
  EXPECT_EQ(body["memory"]["knowledge_base"], "kb");
  EXPECT_EQ(body["memory"]["knowledge_base_version"], 4);
  EXPECT_EQ(body["memory"]["retrievals"], 2);
  EXPECT_EQ(body["memory"]["memories_read"], 10);
  ASSERT_EQ(body["memory"]["chunks"].size(), 2u);
  const Json& chunk = body["memory"]["chunks"][1];
  EXPECT_EQ(chunk["index"], 1);
  EXPECT_EQ(chunk["chunk"], 1);
  EXPECT_EQ(chunk["token_begin"], 64);
  EXPECT_EQ(chunk["memories"][0]["record_id"], "01ff");
  EXPECT_EQ(chunk["memories"][0]["from"], "host");
  EXPECT_EQ(chunk["memories"][0]["sources"][0]["uri"], "https://example.org/d");
  EXPECT_EQ(chunk["memories"][0]["sources"][0]["char_end"], 9);
}

TEST(OpenAiResponseTest, AStreamedChat) {
  AnswerStream stream(Header(OpenAiEndpoint::kChat), 1, /*include_usage=*/true);
  std::string sse;
  for (const v1::GenerateResponse& event :
       {Prompt("kb"), Chunk(), Delta("Hi"), Delta(""), Finish({}, 1)}) {
    sse += stream.Event(0, event);
  }
  sse += stream.End();
  const std::vector<Json> parts = Objects(sse);
  ASSERT_EQ(parts.size(), 6u);  // a delta without text is not worth a part
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(parts[i]["object"], "chat.completion.chunk");
    EXPECT_EQ(parts[i]["choices"].size(), 1u);
    EXPECT_TRUE(parts[i]["usage"].is_null());
  }
  EXPECT_EQ(parts[0]["choices"][0]["delta"]["role"], "assistant");
  EXPECT_EQ(parts[0]["memory"]["knowledge_base"], "kb");
  EXPECT_EQ(parts[1]["memory"]["chunks"][0]["chunk"], 1);
  EXPECT_TRUE(parts[1]["choices"][0]["delta"].empty());
  EXPECT_EQ(parts[2]["choices"][0]["delta"]["content"], "Hi");
  EXPECT_TRUE(parts[2]["choices"][0]["finish_reason"].is_null());
  EXPECT_EQ(parts[3]["choices"][0]["finish_reason"], "abort");
  EXPECT_EQ(parts[3]["memory"]["retrievals"], 1);
  EXPECT_EQ(parts[4]["usage"]["total_tokens"], 5);
  EXPECT_TRUE(parts[4]["choices"].empty());
  EXPECT_EQ(parts[5], "[DONE]");
}

TEST(OpenAiResponseTest, AStreamedCompletionOfTwoChoices) {
  AnswerStream stream(Header(OpenAiEndpoint::kCompletions), 2, /*include_usage=*/false);
  std::string sse;
  for (const auto& [choice, event] :
       std::vector<std::pair<int, v1::GenerateResponse>>{{0, Prompt()},
                                                         {1, Prompt()},
                                                         {1, Delta("ab", -1, 0)},
                                                         {0, Delta("c", -1, 0)},
                                                         {1, Delta("d", -1, 0)},
                                                         {0, Finish()},
                                                         {1, Finish(v1::FINISH_REASON_STOP)}}) {
    sse += stream.Event(choice, event);
  }
  sse += stream.End();
  const std::vector<Json> parts = Objects(sse);
  ASSERT_EQ(parts.size(), 6u);
  EXPECT_EQ(parts[0]["choices"][0]["text"], "ab");
  EXPECT_EQ(parts[0]["choices"][0]["index"], 1);
  EXPECT_EQ(parts[1]["choices"][0]["logprobs"]["text_offset"], Json::array({0}));
  EXPECT_EQ(parts[2]["choices"][0]["logprobs"]["text_offset"], Json::array({2}));
  EXPECT_EQ(parts[4]["choices"][0]["finish_reason"], "stop");
  EXPECT_FALSE(parts[4].contains("usage"));
  EXPECT_EQ(parts[5], "[DONE]");
}

TEST(OpenAiResponseTest, ErrorsNameTheFieldAndHaveTheRightStatus) {
  const auto error = [](const absl::Status& status) {
    const HttpError http = ToHttpError(status);
    const Json body = Json::parse(http.body)["error"];
    EXPECT_EQ(body["message"], std::string(status.message()));
    return std::pair(http.status, body);
  };
  auto [status, body] = error(absl::InvalidArgumentError("temperature: 3 is not within 0 and 2"));
  EXPECT_EQ(status, 400);
  EXPECT_EQ(body["type"], "invalid_request_error");
  EXPECT_EQ(body["param"], "temperature");
  EXPECT_TRUE(body["code"].is_null());
  std::tie(status, body) = error(absl::UnauthenticatedError("the API key is not known"));
  EXPECT_EQ(status, 401);
  EXPECT_EQ(body["code"], "invalid_api_key");
  std::tie(status, body) = error(NoSuchModel("x", "m"));
  EXPECT_EQ(status, 404);
  EXPECT_EQ(body["code"], "model_not_found");
  EXPECT_EQ(body["param"], "model");
  std::tie(status, body) = error(absl::ResourceExhaustedError("the queue is full"));
  EXPECT_EQ(status, 429);
  EXPECT_EQ(body["code"], "rate_limit_exceeded");
  EXPECT_TRUE(body["param"].is_null());
  EXPECT_EQ(error(absl::UnavailableError("a")).first, 503);
  EXPECT_EQ(error(absl::PermissionDeniedError("a")).first, 403);
  // Broken UTF-8 in a message is replaced.
  EXPECT_THAT(ToHttpError(absl::InternalError("a \xff byte")).body,
              HasSubstr("a \xEF\xBF\xBD byte"));
}

TEST(OpenAiResponseTest, ModelsAreListedAloneAndWithEachKnowledgeBase) {
  v1::GetModelResponse model;
  model.set_name("m");
  model.set_chunk_tokens(64);
  model.add_knowledge_bases("wiki");
  const Json body = Json::parse(ModelsBody(model, 5));
  EXPECT_EQ(body["object"], "list");
  ASSERT_EQ(body["data"].size(), 2u);
  EXPECT_EQ(body["data"][0]["id"], "m");
  EXPECT_EQ(body["data"][0]["object"], "model");
  EXPECT_EQ(body["data"][0]["memory"]["knowledge_bases"], Json({"wiki"}));
  EXPECT_EQ(body["data"][1]["id"], "m@wiki");
  EXPECT_EQ(Json::parse(ModelBody(model, "m@wiki", 5))["id"], "m@wiki");
}

}  // namespace
}  // namespace memory3
