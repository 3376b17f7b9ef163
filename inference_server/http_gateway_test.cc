// The HTTP door over a real engine, a real model (stories260K) and a store with memories it wrote
// itself. OpenAI's own client and a browser go through the binaries (tests/inference_http_test.cc).
#include "inference_server/http_gateway.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <future>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "embedder/embedder.h"
#include "inference_server/loaded_model.h"
#include "memory/codec.h"
#include "memory/record.h"
#include "memory_server/rocksdb_store.h"
#include "memory_server/store_testing.h"
#include "nlohmann/json.hpp"
#include "transformer/checkpoint.h"
#include "transformer/memory_writer.h"

namespace memory3 {
namespace {

using ::testing::HasSubstr;
using Json = nlohmann::json;
using std::chrono::seconds;

constexpr char kKnowledgeBase[] = "harbour";
const std::vector<std::string> kReferences = {
    "Lily had a red boat. The boat could fly over the big harbour.",
    "Tom the dog likes to sleep in the old lighthouse by the sea.",
    "Every morning the baker gives one warm bun to the small cat.",
    "The stone bridge was made by Anna and her seven happy friends.",
    "A green bird sings at noon, and then all the ships go home.",
    "Sam lost his hat in the wind, and a whale brought it back.",
};

std::filesystem::path ModelDirectory() {
  const char* data = std::getenv("MEMORY3_DATA");
  return std::filesystem::path(data != nullptr ? data : "../shared/data") / "fixtures/stories260K";
}

class HttpGatewayTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!std::filesystem::exists(ModelDirectory()))
      GTEST_SKIP() << "no " << ModelDirectory() << ": MEMORY3_DATA says where the shared data is";
  }
  void TearDown() override {
    if (gateway_) gateway_->Shutdown(absl::ZeroDuration());
    gateway_.reset();
    if (inference_) inference_->Drain(absl::ZeroDuration());
    inference_.reset();
  }

  // A store with kReferences, written by the model itself, as `model` must read them.
  void WriteStore(const LoadedModel& model) {
    const auto checkpoint = Checkpoint::Open(ModelDirectory());
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    const ModelConfig& config = (*checkpoint)->config();
    const ExplicitMemoryConfig geometry = DenseMode(config, PrefixTokenIds(*model.tokenizer));
    auto writer =
        MemoryWriter::Create(model.engine->decoder().shared_model(), {.memory = geometry});
    ASSERT_TRUE(writer.ok()) << writer.status();
    std::vector<std::vector<int32_t>> ids;
    for (const std::string& text : kReferences) ids.push_back(model.tokenizer->Encode(text));
    const auto memories = (*writer)->Write(ids);
    ASSERT_TRUE(memories.ok()) << memories.status();

    const auto embedder = MakeEmbedder("lexical");
    ASSERT_TRUE(embedder.ok()) << embedder.status();
    const auto store = OpenRocksDbStore({.directory = directory_.path() + "/db"});
    ASSERT_TRUE(store.ok()) << store.status();
    const std::unique_ptr<Codec> codec = MakeF32Codec(config.head_dim);
    KnowledgeBaseSpec spec;
    spec.name = kKnowledgeBase;
    spec.writer_fingerprint = model.writer_fingerprint;
    spec.geometry = {{geometry.memory_layers.begin(), geometry.memory_layers.end()},
                     static_cast<uint32_t>(config.kv_heads),
                     static_cast<uint32_t>(config.head_dim),
                     static_cast<uint32_t>(geometry.tokens_kept),
                     static_cast<uint32_t>(geometry.reference_tokens)};
    spec.codec = CodecId::kF32;
    spec.embedder_fingerprint = (*embedder)->fingerprint();
    spec.embedding_dimension = (*embedder)->dimension();
    ASSERT_TRUE((*store)->CreateKnowledgeBase("default", spec, false).ok());
    for (size_t i = 0; i < kReferences.size(); ++i) {
      const auto record = EncodeRecord((*memories)[i], model.writer_fingerprint, *codec);
      ASSERT_TRUE(record.ok()) << record.status();
      std::vector<float> embedding((*embedder)->dimension());
      const std::string_view text = kReferences[i];
      ASSERT_TRUE((*embedder)->Embed({&text, 1}, embedding).ok());
      NewEntry entry;
      entry.source = {.document_id = absl::StrCat("tale-", i),
                      .title = absl::StrCat("Tale ", i, " <b>&amp;"),
                      .uri = absl::StrCat("https://example.org/tales/", i),
                      .char_begin = 0,
                      .char_end = text.size(),
                      .text = kReferences[i]};
      entry.record_id =
          ComputeRecordId("default", model.writer_fingerprint, CodecId::kF32, {}, ids[i]);
      entry.embedding = embedding;
      entry.record = *record;
      const auto put = (*store)->Put("default", kKnowledgeBase, {&entry, 1}, true);
      ASSERT_TRUE(put.ok()) << put.status();
    }
  }

  void Start(bool memory, ModelOptions options = {}, HttpGatewayOptions http = {}) {
    options.model = ModelDirectory();
    options.name = "stories260K";
    options.device = "cpu";
    options.threads = 1;
    options.weights = "f32";
    options.kv_cache_bytes = options.device_cache_bytes = options.host_cache_bytes = 64 << 20;
    auto model = LoadModel(options);
    ASSERT_TRUE(model.ok()) << model.status();
    if (memory) {
      WriteStore(**model);
      options.memory = absl::StrCat("embedded:", directory_.path(), "/db");
      model = LoadModel(options);
      ASSERT_TRUE(model.ok()) << model.status();
    }
    inference_ = std::make_unique<Inference>();
    http.listener.address = "127.0.0.1:0";
    auto gateway = HttpGateway::Start(http, inference_.get());
    ASSERT_TRUE(gateway.ok()) << gateway.status();
    gateway_ = *std::move(gateway);
    // The door is open before the model is there.
    EXPECT_EQ(Client().Get("/health")->status, 503);
    EXPECT_EQ(Post("/v1/completions", {{"model", "x"}, {"prompt", "a"}})->status, 503);
    inference_->Serve(*std::move(model));
    EXPECT_EQ(Client().Get("/health")->status, 200);
  }
  httplib::Client Client() const {
    httplib::Client client("127.0.0.1", gateway_->port());
    client.set_read_timeout(seconds(60));
    return client;
  }
  httplib::Result Post(const std::string& path, const Json& body) const {
    httplib::Result result = Client().Post(path, body.dump(), "application/json");
    EXPECT_TRUE(result) << static_cast<int>(result.error());
    return result;
  }
  // The text of a streamed completion, and its parts.
  static std::string TextOf(const std::string& sse, std::vector<Json>* parts) {
    std::string text;
    for (const auto& event : absl::StrSplit(sse, "\n\n", absl::SkipEmpty())) {
      const std::string data(event);
      if (data == "data: [DONE]") continue;
      parts->push_back(Json::parse(data.substr(6)));
      for (const Json& choice : parts->back()["choices"]) text += choice["text"].get<std::string>();
    }
    return text;
  }
  store_testing::TemporaryDirectory directory_;
  std::unique_ptr<Inference> inference_;
  std::unique_ptr<HttpGateway> gateway_;
};

TEST_F(HttpGatewayTest, PlainAndStreamedAnswersAreTheModelsOwn) {
  Start(/*memory=*/false);
  std::ifstream in(ModelDirectory() / "greedy.txt");
  std::stringstream greedy;
  greedy << in.rdbuf();
  Json body = {{"model", "stories260K"}, {"prompt", {1}}, {"max_tokens", 100}, {"temperature", 0}};
  const Json plain = Json::parse(Post("/v1/completions", body)->body);
  const std::string text = plain["choices"][0]["text"];
  EXPECT_FALSE(text.empty());
  // As it continues the prompt, with the space before its first word.
  EXPECT_EQ(text[0], ' ');
  EXPECT_NE(greedy.str().find(text.substr(1)), std::string::npos) << text;
  EXPECT_EQ(plain["usage"]["completion_tokens"], 100);
  body["stream"] = true;
  const httplib::Result streamed = Post("/v1/completions", body);
  EXPECT_EQ(streamed->get_header_value("Content-Type"), "text/event-stream");
  EXPECT_THAT(streamed->body, HasSubstr("data: [DONE]\n\n"));
  std::vector<Json> parts;
  EXPECT_EQ(TextOf(streamed->body, &parts), text);
  EXPECT_GT(parts.size(), 50u);
  EXPECT_EQ(parts.back()["choices"][0]["finish_reason"], "length");
}

TEST_F(HttpGatewayTest, MemoriesAreReadAndTold) {
  Start(/*memory=*/true);
  Json body = {{"model", "stories260K"},
               {"prompt", "Lily had a red boat"},
               {"max_tokens", 70},
               {"temperature", 0},
               {"memory", {{"knowledge_base", kKnowledgeBase}, {"references_per_chunk", 3}}}};
  const Json with = Json::parse(Post("/v1/completions", body)->body);
  ASSERT_TRUE(with.contains("memory")) << with.dump(2);
  EXPECT_EQ(with["memory"]["knowledge_base"], kKnowledgeBase);
  EXPECT_EQ(with["memory"]["retrievals"], 2);
  const Json& chunks = with["memory"]["chunks"];
  ASSERT_EQ(chunks.size(), 3u);  // the prompt's, the first of the answer (inherited), the second
  EXPECT_EQ(chunks[0]["memories"][0]["sources"][0]["document_id"], "tale-0");
  EXPECT_TRUE(chunks[1]["inherited"]);
  EXPECT_FALSE(chunks[0]["memories"][0]["sources"][0].contains("text"));
  Json named = body;
  named["memory"].erase("knowledge_base");
  named["model"] = "stories260K@harbour";
  EXPECT_EQ(Json::parse(Post("/v1/completions", named)->body)["choices"][0]["text"],
            with["choices"][0]["text"]);
  body["memory"] = false;
  const Json without = Json::parse(Post("/v1/completions", body)->body);
  EXPECT_FALSE(without.contains("memory"));
  EXPECT_NE(without["choices"][0]["text"], with["choices"][0]["text"]);
  body["memory"] = {{"knowledge_base", "nowhere"}};
  EXPECT_EQ(Post("/v1/completions", body)->status, 404);

  const Json models = Json::parse(Client().Get("/v1/models")->body);
  EXPECT_EQ(models["data"][0]["memory"]["knowledge_bases"], Json({kKnowledgeBase}));
  EXPECT_EQ(Client().Get("/v1/models/stories260K@harbour")->status, 200);
  EXPECT_EQ(Client().Get("/v1/models/other")->status, 404);
  EXPECT_THAT(Client().Get("/metrics")->body, HasSubstr("# TYPE"));
}

TEST_F(HttpGatewayTest, AClientThatVanishesFreesItsPlace) {
  Start(/*memory=*/false);
  constexpr int kPrompts = 32, kTokens = 450;
  for (const bool stream : {true, false}) {
    const Json body = {{"model", "stories260K"},
                       {"prompt", std::vector<std::string>(kPrompts, "Once upon a time")},
                       {"max_tokens", kTokens},
                       {"temperature", 0},
                       {"ignore_eos", true},
                       {"stream", stream}};
    const std::string text = body.dump();
    const uint64_t before = inference_->stats().steps;
    httplib::Client client = Client();
    std::thread leaver([&] {
      // Once tokens are generated, the client is gone.
      while (inference_->stats().steps < before + 5) std::this_thread::yield();
      client.stop();
    });
    EXPECT_FALSE(client.Post("/v1/completions", text, "application/json"));
    leaver.join();
    const auto limit = std::chrono::steady_clock::now() + seconds(60);
    const auto busy = [&] {
      const EngineStats stats = inference_->stats();
      return stats.running > 0 || stats.waiting > 0 || stats.kv_pages_used > 0;
    };
    while (busy() && std::chrono::steady_clock::now() < limit) std::this_thread::yield();
    EXPECT_FALSE(busy());
    EXPECT_LT(inference_->stats().steps, before + kTokens / 2) << stream;
  }
}

// Holds the engine's thread at its first event.
class HoldingSink final : public EventSink {
 public:
  explicit HoldingSink(std::shared_future<void> go_on) : go_on_(std::move(go_on)) {}
  void Send(v1::GenerateResponse /*event*/) override { go_on_.wait(); }
  void Scored(ContinuationScore /*score*/) override {}
  void End(absl::Status /*status*/) override {}

 private:
  const std::shared_future<void> go_on_;
};

TEST_F(HttpGatewayTest, AFullQueueIs429WithRetryAfter) {
  Start(/*memory=*/false, {.max_running = 1, .max_waiting = 1});
  std::promise<void> refused;
  const std::shared_future<void> go_on = refused.get_future();
  v1::GenerateRequest request;
  request.set_text("Once");
  const auto await_stats = [&](const std::function<bool(const EngineStats&)>& there) {
    const auto limit = std::chrono::steady_clock::now() + seconds(60);
    while (!there(inference_->stats()) && std::chrono::steady_clock::now() < limit)
      std::this_thread::yield();
    return there(inference_->stats());
  };
  // One runs, one waits.
  for (int i = 0; i < 2; ++i) {
    const auto taken =
        inference_->Generate(Identity(), request, std::make_shared<HoldingSink>(go_on));
    ASSERT_TRUE(taken.ok()) << taken.status();
    EXPECT_TRUE(await_stats([&](const EngineStats& stats) { return stats.waiting == i; }));
  }
  const Json body = {{"model", "stories260K"}, {"prompt", "Once"}, {"max_tokens", 5}};
  for (const bool stream : {false, true}) {
    Json more = body;
    more["stream"] = stream;
    const httplib::Result answer = Post("/v1/completions", more);
    EXPECT_EQ(answer->status, 429);
    EXPECT_THAT(Json::parse(answer->body)["error"]["message"].get<std::string>(),
                HasSubstr("queue is full"));
    const int ms = std::stoi(answer->get_header_value("retry-after-ms"));
    EXPECT_GE(ms, 100);
    EXPECT_LE(ms, 60'000);
    EXPECT_EQ(std::stoi(answer->get_header_value("Retry-After")), (ms + 999) / 1000);
  }
  refused.set_value();
  EXPECT_TRUE(await_stats(
      [](const EngineStats& stats) { return stats.running == 0 && stats.waiting == 0; }));
  EXPECT_EQ(Post("/v1/completions", body)->status, 200);
}

TEST_F(HttpGatewayTest, BadRequestsAreAnsweredInOpenAisWords) {
  Start(/*memory=*/false);
  const Json good = {{"model", "stories260K"}, {"prompt", "Once"}};
  const auto error = [&](const Json& change) {
    Json body = good;
    body.update(change);
    const httplib::Result result = Post("/v1/completions", body);
    const Json answer = Json::parse(result->body);
    return absl::StrCat(result->status, " ", answer["error"]["param"].dump());
  };
  EXPECT_EQ(error({{"temperature", 9}}), "400 \"temperature\"");
  EXPECT_EQ(error({{"model", "gpt-9"}}), "404 \"model\"");
  EXPECT_EQ(error({{"prompt", std::vector<int>(600, 5)}}), "400 \"prompt\"");
  EXPECT_EQ(error({{"prompt", {100000}}}), "400 \"prompt[0]\"");
  EXPECT_EQ(error({{"logit_bias", {{"100000", 1}}}}), "400 \"logit_bias\"");
  EXPECT_EQ(error({{"max_tokens", 5}, {"min_tokens", 6}}), "400 \"min_tokens\"");
  EXPECT_EQ(error({{"top_p", 0}}), "400 \"top_p\"");
  EXPECT_EQ(error({{"prompt", ""}}), "400 \"prompt\"");
  EXPECT_EQ(error({{"prompt", std::string(1 << 19, 'a')}}), "400 \"prompt\"");
  for (const char* broken : {"{", R"({"model":"stories260K","prompt":"Once","temperature":NaN})",
                             "{\"model\":\"stories260K\",\"prompt\":\"\xc3\x28\"}"}) {
    EXPECT_EQ(Client().Post("/v1/completions", broken, "application/json")->status, 400) << broken;
  }
  EXPECT_EQ(Client().Post("/v1/nothing", "{}", "application/json")->status, 404);
  EXPECT_EQ(Client().Delete("/v1/models")->status, 405);
  for (const char* path : {"/", "/app.js", "/style.css"}) {
    const httplib::Result file = Client().Get(path);
    EXPECT_EQ(file->status, 200) << path;
    EXPECT_GT(file->body.size(), 1000u) << path;
    EXPECT_THAT(file->get_header_value("Content-Security-Policy"), HasSubstr("default-src 'none'"));
  }
}

}  // namespace
}  // namespace memory3
