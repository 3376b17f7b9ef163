// Black-box tests of the inference_server binary: what it answers equals the offline loops, which
// chunk read what, and what is wrong with a request.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <fstream>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <thread>

#include "absl/strings/str_cat.h"
#include "tests/inference_testing.h"
#include "transformer/chunk_grid.h"

namespace memory3 {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Stub = v1::InferenceService::Stub;

std::vector<int32_t> GreedyIds(const std::string& directory) {
  std::ifstream file(directory + "/greedy_ids.json");
  return nlohmann::json::parse(file).get<std::vector<int32_t>>();
}

std::string GreedyText(const std::string& directory) {
  std::ifstream file(directory + "/greedy.txt");
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string Trimmed(std::string text) {
  text.erase(0, text.find_first_not_of(" \n"));
  text.erase(text.find_last_not_of(" \n") + 1);
  return text;
}

TEST(InferenceServerTest, OtherWeightsGiveWhatTheOfflineDecoderGivesOfThem) {
  SKIP_WITHOUT_STORIES();
  const std::vector<int32_t> exact = GreedyIds(*StoriesDirectory());
  for (const auto& [name, format] :
       {std::pair("bf16", WeightFormat::kBF16), std::pair("int8", WeightFormat::kInt8)}) {
    OfflineModel offline(*StoriesDirectory(), {.weights = format});
    InferenceProcess server({"--model", *StoriesDirectory(), "--weights", name});
    const Generated got = server.client().Generate(RequestOf({1}, 200));
    ASSERT_TRUE(got.status.ok()) << got.status.error_message();
    EXPECT_EQ(got.ids, offline.Generate({1}, 200, /*memory=*/false).tokens) << name;
    EXPECT_EQ(std::vector(exact.begin() + 1, exact.begin() + 5),
              std::vector(got.ids.begin(), got.ids.begin() + 4));
    v1::GetModelResponse model;
    ASSERT_TRUE(server.client().Call(&Stub::GetModel, v1::GetModelRequest(), &model).ok());
    EXPECT_EQ(model.weights(), name);
  }
}

TEST(InferenceServerTest, ReadsByANeuralEmbedder) {
  SKIP_WITHOUT_STORIES();
  const std::optional<std::string> minilm = MiniLmDirectory();
  if (!minilm) GTEST_SKIP() << "no all-MiniLM-L6-v2 (tools/setup, MEMORY3_MINILM)";
  const std::string embedder = "bert:" + *minilm;
  TestDirectory directory;
  MemoryProcess memory(directory / "store");
  OfflineModel offline(*StoriesDirectory(), {.embedder = embedder});
  offline.FillKnowledgeBase(*memory.Connect(), offline.Spec("stories"));
  const std::vector<int32_t> prompt = StoryIds(offline, 70, 2);
  InferenceProcess server(
      {"--model", *StoriesDirectory(), "--memory", memory.target(), "--embedder", embedder});
  const Generated got = server.client().Generate(RequestOf(prompt, 70, "stories"));
  ASSERT_TRUE(got.status.ok()) << got.status.error_message();
  EXPECT_EQ(got.ids, offline.Generate(prompt, 70, /*memory=*/true).tokens);
  for (const auto& chunk : got.provenance) EXPECT_EQ(chunk.memories_size(), 5);
  // Another embedder's server refuses the knowledge base.
  InferenceProcess lexical({"--model", *StoriesDirectory(), "--memory", memory.target()});
  const Generated refused = lexical.client().Generate(RequestOf(prompt, 70, "stories"));
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(refused.status.error_message(), HasSubstr("was embedded by"));
}

TEST(InferenceServerTest, GivesTheGreedyIdsOfStories260KExactly) {
  SKIP_WITHOUT_STORIES();
  const std::string directory = *StoriesDirectory();
  InferenceProcess server({"--model", directory});
  Client& client = server.client();
  const std::vector<int32_t> ids = GreedyIds(directory);
  ASSERT_EQ(ids.size(), 257u);
  const std::vector<int32_t> expected(ids.begin() + 1, ids.end());
  const v1::GenerateRequest request = RequestOf({ids[0]}, 256);

  const Generated streamed = client.Generate(request);
  ASSERT_TRUE(streamed.status.ok()) << streamed.status.error_message();
  EXPECT_EQ(streamed.ids, expected);
  EXPECT_EQ(Trimmed(streamed.text), Trimmed(GreedyText(directory)));
  EXPECT_THAT(streamed.prompt->token_ids(), ElementsAre(1));
  EXPECT_EQ(streamed.prompt->model(), "stories260K");
  EXPECT_FALSE(streamed.prompt->request_id().empty());
  EXPECT_EQ(streamed.finish->reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(streamed.finish->usage().completion_tokens(), 256u);
  EXPECT_TRUE(streamed.provenance.empty());

  v1::GenerateUnaryResponse unary;
  ASSERT_TRUE(client.Call(&Stub::GenerateUnary, request, &unary).ok());
  EXPECT_EQ(std::vector<int32_t>(unary.token_ids().begin(), unary.token_ids().end()), expected);
  EXPECT_EQ(unary.text(), streamed.text);
  EXPECT_EQ(unary.finish().reason(), v1::FINISH_REASON_LENGTH);

  // Stops, log-probabilities and echo.
  v1::GenerateRequest stopped = request;
  stopped.mutable_stopping()->add_stop("park");
  stopped.set_logprobs(2);
  const Generated cut = client.Generate(stopped);
  ASSERT_TRUE(cut.status.ok()) << cut.status.error_message();
  EXPECT_EQ(cut.finish->reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(cut.finish->stop(), "park");
  EXPECT_EQ(cut.text, streamed.text.substr(0, streamed.text.find("park")));
  ASSERT_EQ(cut.logprobs.size(), cut.ids.size());
  EXPECT_EQ(cut.logprobs[0].chosen().token_id(), expected[0]);
  EXPECT_EQ(cut.logprobs[0].top_size(), 2);
  v1::GenerateRequest echo;
  echo.set_text("Once upon a time");
  echo.set_echo(true);
  echo.mutable_stopping()->set_max_new_tokens(1);
  EXPECT_THAT(client.Generate(echo).text, ::testing::StartsWith("Once upon a time"));

  // A score of what greedy decoding gives is greedy; the sum is that of the parts.
  v1::ScoreRequest score;
  score.mutable_token_ids()->add_ids(ids[0]);
  score.mutable_continuation_ids()->mutable_ids()->Add(expected.begin(), expected.begin() + 70);
  v1::ScoreResponse scored;
  const grpc::Status status = client.Call(&Stub::Score, score, &scored);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_TRUE(scored.greedy());
  ASSERT_EQ(scored.token_logprobs_size(), 70);
  double sum = 0;
  for (const float logprob : scored.token_logprobs()) sum += logprob;
  EXPECT_DOUBLE_EQ(scored.log_likelihood(), sum);
  EXPECT_NEAR(scored.token_logprobs(0), cut.logprobs[0].chosen().logprob(), 1e-6);
  // Texts: cut where the prompt's own tokens end.
  score.set_text("Once upon");
  score.set_continuation_text(" a time");
  ASSERT_TRUE(client.Call(&Stub::Score, score, &scored).ok());
  v1::TokenizeRequest tokenize;
  tokenize.set_add_bos(true);
  v1::TokenizeResponse whole, begin;
  tokenize.set_text("Once upon a time");
  ASSERT_TRUE(client.Call(&Stub::Tokenize, tokenize, &whole).ok());
  tokenize.set_text("Once upon");
  ASSERT_TRUE(client.Call(&Stub::Tokenize, tokenize, &begin).ok());
  EXPECT_EQ(std::vector<int32_t>(scored.token_ids().begin(), scored.token_ids().end()),
            std::vector<int32_t>(whole.ids().begin() + begin.ids_size(), whole.ids().end()));

  EXPECT_EQ(whole.ids(0), 1);
  EXPECT_EQ(whole.pieces_size(), whole.ids_size());
  v1::DetokenizeRequest detokenize;
  *detokenize.mutable_ids() = whole.ids();
  v1::DetokenizeResponse text;
  ASSERT_TRUE(client.Call(&Stub::Detokenize, detokenize, &text).ok());
  EXPECT_EQ(text.text(), "Once upon a time");

  v1::GetModelResponse model;
  ASSERT_TRUE(client.Call(&Stub::GetModel, v1::GetModelRequest(), &model).ok());
  EXPECT_EQ(model.name(), "stories260K");
  EXPECT_EQ(model.vocabulary_size(), 512u);
  EXPECT_EQ(model.weights(), "f32");
  EXPECT_THAT(model.device(), HasSubstr("cpu"));
  EXPECT_TRUE(model.dense_mode());
  EXPECT_GT(model.parameters(), 250'000u);

  EXPECT_EQ(client.Health(""), 1);
  EXPECT_EQ(client.Health("memory3.v1.InferenceService"), 1);
  EXPECT_GE(server.Metric("memory3_generation_tokens_total"), 512);
  EXPECT_EQ(server.Metric("memory3_request_success_total{finished_reason=\"stop\"}"), 1);
  EXPECT_GE(server.Metric("memory3_time_to_first_token_seconds_count"), 4);
  EXPECT_EQ(server.Metric("memory3_ready"), 1);
  server.process().Signal(SIGTERM);
  EXPECT_EQ(server.process().Wait(), 0) << server.process().output();
}

// A server with memories, and the same model beside it.
class InferenceMemoryTest : public ::testing::Test {
 protected:
  void SetUp() override {
    SKIP_WITHOUT_STORIES();
    offline_ = std::make_unique<OfflineModel>(*StoriesDirectory());
    memory_ = std::make_unique<MemoryProcess>(directory_ / "store");
    memory_client_ = memory_->Connect();
    offline_->FillKnowledgeBase(*memory_client_, offline_->Spec("stories"));
  }
  void StartInference(const std::string& memory) {
    server_ = std::make_unique<InferenceProcess>(
        std::vector<std::string>{"--model", *StoriesDirectory(), "--memory", memory});
  }
  // Tokens and provenance are those of the offline loop.
  void ExpectAsOffline(const Generated& got, const std::vector<int32_t>& prompt, int out) {
    const Generation expected = offline_->Generate(prompt, out, true);
    const int in = static_cast<int>(prompt.size());
    ASSERT_TRUE(got.status.ok()) << got.status.error_message();
    EXPECT_EQ(got.ids, expected.tokens);
    const ChunkGrid grid(in, 64);
    const int of_prompt = grid.prompt_retrievals();
    EXPECT_EQ(got.finish->usage().retrievals(), grid.Retrievals(out));
    // The last token is never fed, so a chunk that would begin with it is never read.
    const int chunks = of_prompt + (out - 1 + 63) / 64;
    ASSERT_EQ(got.provenance.size(), chunks);
    for (int c = 0; c < chunks; ++c) {
      const v1::ChunkProvenance& p = got.provenance[c];
      EXPECT_EQ(p.chunk(), c);
      EXPECT_EQ(p.generated(), c >= of_prompt);
      EXPECT_EQ(p.inherited(), c == of_prompt);
      EXPECT_EQ(p.token_begin(), c < of_prompt ? 64 * c : in + 64 * (c - of_prompt));
      EXPECT_EQ(p.token_end(), std::min<int>(p.token_begin() + 64, c < of_prompt ? in : in + out));
      EXPECT_FALSE(p.timed_out() || p.unavailable());
      const ChunkRead& read = expected.reads[grid.RetrievalOf(p.token_begin())];
      std::vector<std::string> ids;
      for (const auto& memory : p.memories()) {
        ids.push_back(memory.record_id());
        EXPECT_NE(memory.from(), v1::BYTE_SOURCE_UNSPECIFIED);
        ASSERT_EQ(memory.sources_size(), 1);
        const v1::Source& source = memory.sources(0);
        const size_t reference = std::stoul(source.document_id().substr(6));
        EXPECT_EQ(memory.record_id(), offline_->IdOf(reference).view());
        EXPECT_EQ(source.title(), absl::StrCat("Story ", reference, " <b>&amp;"));
        EXPECT_EQ(source.uri(), absl::StrCat("https://example.org/stories/", reference));
        EXPECT_EQ(source.char_end(), OfflineModel::TextOf(reference).size());
      }
      EXPECT_THAT(ids, ::testing::UnorderedElementsAreArray(read.memory_ids));
    }
  }

  TestDirectory directory_;
  std::unique_ptr<OfflineModel> offline_;
  std::unique_ptr<MemoryProcess> memory_;
  std::unique_ptr<MemoryClient> memory_client_;
  std::unique_ptr<InferenceProcess> server_;
};

TEST_F(InferenceMemoryTest, EqualsTheOfflineLoopAtEveryBoundaryAloneAndTogether) {
  StartInference(memory_->target());
  struct Case {
    std::vector<int32_t> prompt;
    int out;
    Generated got;
  };
  std::vector<Case> cases;
  for (const int in : {1, 63, 64, 65, 128}) {
    for (const int out : {64, 65}) cases.push_back({StoryIds(*offline_, in, in + out), out, {}});
  }
  cases.push_back({StoryIds(*offline_, 128, 3), 128, {}});
  for (Case& c : cases) {
    SCOPED_TRACE(absl::StrCat(c.prompt.size(), " in, ", c.out, " out"));
    ExpectAsOffline(server_->client().Generate(RequestOf(c.prompt, c.out, "stories")), c.prompt,
                    c.out);
  }
  // 128 in and 128 out: three retrievals.
  EXPECT_EQ(ChunkGrid(128, 64).Retrievals(128), 3);
  std::vector<std::thread> threads;
  for (Case& c : cases) {
    threads.emplace_back(
        [&] { c.got = server_->client().Generate(RequestOf(c.prompt, c.out, "stories")); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Case& c : cases) {
    SCOPED_TRACE(absl::StrCat("together: ", c.prompt.size(), " in, ", c.out, " out"));
    ExpectAsOffline(c.got, c.prompt, c.out);
  }

  // An alias is resolved; memories change what is said; off is the plain model.
  v1::SetAliasRequest alias;
  alias.set_alias("live");
  alias.set_knowledge_base("stories");
  ASSERT_TRUE(memory_client_->Call(&MemoryClient::Stub::SetAlias, alias).ok());
  const std::vector<int32_t> prompt = StoryIds(*offline_, 40, 1);
  v1::GenerateRequest request = RequestOf(prompt, 60, "live");
  request.mutable_memory()->set_with_text(true);
  const Generated with = server_->client().Generate(request);
  ASSERT_TRUE(with.status.ok()) << with.status.error_message();
  EXPECT_EQ(with.prompt->knowledge_base(), "stories");
  EXPECT_EQ(with.prompt->knowledge_base_version(), 1u);
  ASSERT_FALSE(with.provenance.empty());
  const v1::Source& source = with.provenance[0].memories(0).sources(0);
  EXPECT_EQ(source.text(), OfflineModel::TextOf(std::stoul(source.document_id().substr(6))));
  request.mutable_memory()->set_enabled(false);
  const Generated without = server_->client().Generate(request);
  EXPECT_EQ(without.ids, offline_->Generate(prompt, 60, false).tokens);
  EXPECT_NE(without.ids, with.ids);
  EXPECT_TRUE(without.provenance.empty());
  // Fewer references, one document.
  request = RequestOf(prompt, 10, "stories");
  request.mutable_memory()->set_references_per_chunk(2);
  EXPECT_EQ(server_->client().Generate(request).ids,
            offline_->Generate(prompt, 10, true, 2).tokens);
  request.mutable_memory()->mutable_filter()->add_document_ids("story-3");
  const Generated filtered = server_->client().Generate(request);
  ASSERT_EQ(filtered.provenance[0].memories_size(), 1);
  EXPECT_EQ(filtered.provenance[0].memories(0).sources(0).document_id(), "story-3");

  v1::GetModelResponse model;
  ASSERT_TRUE(server_->client().Call(&Stub::GetModel, v1::GetModelRequest(), &model).ok());
  EXPECT_THAT(model.knowledge_bases(), ElementsAre("stories"));
  EXPECT_EQ(model.writer_fingerprint(), offline_->fingerprint().view());
  EXPECT_EQ(model.embedder_fingerprint(), offline_->embedder().fingerprint().view());
  EXPECT_EQ(model.references_per_chunk(), 5u);
  EXPECT_GT(server_->Metric("memory3_memory_hits_total{tier=\"device\"}"), 0);
  EXPECT_GT(server_->Metric("memory3_memory_hits_total{tier=\"store\"}"), 0);
  EXPECT_GT(server_->Metric("memory3_memory_loaded_bytes_total"), 0);
  EXPECT_GT(server_->Metric("memory3_retrieval_seconds_count"), 0);
  EXPECT_EQ(server_->Metric("memory3_retrieval_fallbacks_total"), 0);
}

TEST_F(InferenceMemoryTest, TheStoreInTheProcessGivesTheSame) {
  memory_->process().Signal(SIGTERM);
  ASSERT_EQ(memory_->process().Wait(), 0);
  StartInference("embedded:" + (directory_ / "store"));
  const std::vector<int32_t> prompt = StoryIds(*offline_, 100, 2);
  ExpectAsOffline(server_->client().Generate(RequestOf(prompt, 70, "stories")), prompt, 70);
  EXPECT_EQ(server_->client().Generate(RequestOf(prompt, 5, "nowhere")).status.error_code(),
            grpc::StatusCode::NOT_FOUND);
}

TEST_F(InferenceMemoryTest, WhatIsWrongWithARequestIsNamed) {
  v1::KnowledgeBaseSpec foreign = offline_->Spec("foreign");
  foreign.set_writer_fingerprint(std::string(Sha256Of("another model").view()));
  offline_->FillKnowledgeBase(*memory_client_, foreign);
  v1::KnowledgeBaseSpec elsewhere = offline_->Spec("elsewhere");
  elsewhere.set_embedder_fingerprint(std::string(Sha256Of("another embedder").view()));
  offline_->FillKnowledgeBase(*memory_client_, elsewhere);
  StartInference(memory_->target());
  Client& client = server_->client();

  const float nan = std::numeric_limits<float>::quiet_NaN();
  using Change = std::function<void(v1::GenerateRequest&)>;
  struct Case {
    Change change;
    grpc::StatusCode code;
    std::vector<std::string> says;
  };
  const grpc::StatusCode invalid = grpc::StatusCode::INVALID_ARGUMENT;
  const std::vector<Case> cases = {
      {[](auto& r) { r.clear_prompt(); }, invalid, {"prompt"}},
      {[](auto& r) { r.set_text(""); }, invalid, {"prompt.text", "empty"}},
      {[](auto& r) { r.mutable_token_ids()->clear_ids(); }, invalid, {"prompt", "empty"}},
      {[](auto& r) { r.mutable_token_ids()->mutable_ids()->Resize(2000, 5); },
       invalid,
       {"prompt", "2000"}},
      {[](auto& r) { r.set_text(std::string(1 << 20, 'a')); }, invalid, {"prompt.text", "1048576"}},
      {[](auto& r) { r.mutable_token_ids()->add_ids(512); }, invalid, {"prompt.token_ids", "512"}},
      {[](auto& r) { r.mutable_token_ids()->add_ids(-7); }, invalid, {"prompt.token_ids", "-7"}},
      {[&](auto& r) { r.mutable_sampling()->set_temperature(nan); }, invalid, {"temperature"}},
      {[](auto& r) { r.mutable_sampling()->set_temperature(-1); }, invalid, {"temperature", "-1"}},
      {[](auto& r) { r.mutable_sampling()->set_top_p(0); }, invalid, {"top_p", "0"}},
      {[](auto& r) { r.mutable_sampling()->set_top_p(1.5); }, invalid, {"top_p", "1.5"}},
      {[](auto& r) { r.mutable_sampling()->set_min_p(1); }, invalid, {"min_p", "1"}},
      {[](auto& r) { r.mutable_sampling()->set_repetition_penalty(0); },
       invalid,
       {"repetition_penalty"}},
      {[](auto& r) { r.mutable_sampling()->set_presence_penalty(3); },
       invalid,
       {"presence_penalty", "3"}},
      {[&](auto& r) { r.mutable_sampling()->set_frequency_penalty(nan); },
       invalid,
       {"frequency_penalty"}},
      {[](auto& r) { (*r.mutable_sampling()->mutable_logit_bias())[5] = 101; },
       invalid,
       {"logit_bias", "101"}},
      {[](auto& r) { (*r.mutable_sampling()->mutable_logit_bias())[600] = 1; },
       invalid,
       {"logit_bias", "600"}},
      {[](auto& r) { r.mutable_stopping()->set_max_new_tokens(0); },
       invalid,
       {"max_new_tokens", "0"}},
      {[](auto& r) { r.mutable_stopping()->set_min_new_tokens(20); },
       invalid,
       {"min_new_tokens", "20"}},
      {[](auto& r) { r.mutable_stopping()->add_stop(""); }, invalid, {"stopping.stop"}},
      {[](auto& r) {
         for (int i = 0; i < 17; ++i) r.mutable_stopping()->add_stop(std::string(1, 'x'));
       },
       invalid,
       {"stopping.stop", "17"}},
      {[](auto& r) { r.mutable_stopping()->add_stop_token_ids(512); },
       invalid,
       {"stop_token_ids", "512"}},
      {[](auto& r) { r.set_logprobs(21); }, invalid, {"logprobs", "21"}},
      {[](auto& r) { r.set_request_id(std::string(300, 'r')); }, invalid, {"request_id", "300"}},
      {[](auto& r) {
         r.mutable_memory()->clear_knowledge_base();
         r.mutable_memory()->set_enabled(true);
       },
       invalid,
       {"memory.knowledge_base"}},
      {[](auto& r) { r.mutable_memory()->set_references_per_chunk(1'000'000); },
       invalid,
       {"references_per_chunk", "1000000"}},
      {[&](auto& r) { r.mutable_memory()->set_min_score(nan); }, invalid, {"min_score"}},
      {[](auto& r) { r.mutable_memory()->set_policy(v1::MemoryOptions::DEADLINE); },
       invalid,
       {"memory.deadline"}},
      {[](auto& r) {
         r.mutable_memory()->set_policy(v1::MemoryOptions::DEADLINE);
         r.mutable_memory()->mutable_deadline()->set_seconds(-1);
       },
       invalid,
       {"memory.deadline", "-1"}},
      {[](auto& r) { r.mutable_memory()->set_knowledge_base("nowhere"); },
       grpc::StatusCode::NOT_FOUND,
       {"nowhere"}},
      {[](auto& r) { r.mutable_memory()->set_knowledge_base("foreign"); },
       grpc::StatusCode::FAILED_PRECONDITION,
       {"foreign", Sha256Of("another model").ToHex(), offline_->fingerprint().ToHex()}},
      {[](auto& r) { r.mutable_memory()->set_knowledge_base("elsewhere"); },
       grpc::StatusCode::FAILED_PRECONDITION,
       {"elsewhere", "embedded", Sha256Of("another embedder").ToHex()}},
  };
  const std::vector<int32_t> prompt = StoryIds(*offline_, 10, 1);
  for (const Case& c : cases) {
    v1::GenerateRequest request = RequestOf(prompt, 10, "stories");
    c.change(request);
    SCOPED_TRACE(request.ShortDebugString().substr(0, 200));
    const Generated got = client.Generate(request);
    EXPECT_EQ(got.status.error_code(), c.code) << got.status.error_message();
    for (const std::string& word : c.says) EXPECT_THAT(got.status.error_message(), HasSubstr(word));
    EXPECT_FALSE(got.prompt);
  }

  // Broken UTF-8 that no client library would send: the field is named all the same.
  std::string response;
  for (const std::string method : {"Generate", "GenerateUnary"}) {
    const grpc::Status status = client.CallRaw("/memory3.v1.InferenceService/" + method,
                                               std::string("\x12\x02\xc3\x28", 4), &response);
    EXPECT_EQ(status.error_code(), invalid) << method;
    EXPECT_THAT(status.error_message(), HasSubstr("prompt.text"));
  }
  grpc::Status status = client.CallRaw("/memory3.v1.InferenceService/Generate",
                                       std::string("\x32\x05\x1a\x03\x61\xff\x62", 7), &response);
  EXPECT_THAT(status.error_message(), HasSubstr("stopping.stop[0]"));
  status = client.CallRaw("/memory3.v1.InferenceService/Score", "\x0f garbage", &response);
  EXPECT_EQ(status.error_code(), invalid);
  EXPECT_THAT(status.error_message(), HasSubstr("ScoreRequest"));

  v1::DetokenizeRequest detokenize;
  detokenize.add_ids(512);
  v1::DetokenizeResponse text;
  EXPECT_THAT(client.Call(&Stub::Detokenize, detokenize, &text).error_message(),
              HasSubstr("ids[0] is 512"));
  v1::AbortRequest abort;
  abort.set_request_id("nobody");
  v1::AbortResponse aborted;
  EXPECT_EQ(client.Call(&Stub::Abort, abort, &aborted).error_code(), grpc::StatusCode::NOT_FOUND);
  v1::ScoreRequest score;
  score.set_text("Once");
  v1::ScoreResponse scored;
  EXPECT_THAT(client.Call(&Stub::Score, score, &scored).error_message(), HasSubstr("continuation"));
  score.mutable_continuation_ids()->add_ids(512);
  status = client.Call(&Stub::Score, score, &scored);
  EXPECT_EQ(status.error_code(), invalid);
  EXPECT_THAT(status.error_message(), HasSubstr("continuation.ids[0] is 512"));
  score.mutable_continuation_ids()->mutable_ids()->Resize(2000, 5);
  score.mutable_continuation_ids()->set_ids(0, 5);
  status = client.Call(&Stub::Score, score, &scored);
  EXPECT_EQ(status.error_code(), invalid);
  EXPECT_THAT(status.error_message(), HasSubstr("prompt and continuation have"));
  score.set_text("");
  EXPECT_THAT(client.Call(&Stub::Score, score, &scored).error_message(), HasSubstr("prompt.text"));

  // And it goes on.
  ExpectAsOffline(client.Generate(RequestOf(prompt, 10, "stories")), prompt, 10);
}

}  // namespace
}  // namespace memory3
