#include "bench/inference_world.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "bench/random_llama.h"
#include "memory/record.h"
#include "memory_server/rocksdb_store.h"
#include "trainer/documents.h"
#include "transformer/checkpoint.h"

namespace memory3 {
namespace {

namespace fs = std::filesystem;

constexpr const char* kTenant = "default";
constexpr const char* kBase = "wikipedia";
constexpr size_t kReferenceChars = 512;  // about 128 tokens
constexpr size_t kReferencesKept = 4096;
constexpr size_t kOthers = 512;

Hash256 Writer() { return Sha256Of("random TinyLlama"); }

// Cuts at the space after kReferenceChars.
void Cut(const std::string& text, std::vector<std::string>* parts) {
  for (size_t at = 0; at < text.size();) {
    const size_t end =
        std::min(text.find(' ', std::min(text.size(), at + kReferenceChars)), text.size());
    parts->push_back(text.substr(at, end - at));
    at = end + 1;
  }
}

// The first `count` references of the articles.
std::vector<std::string> ReadReferences(const std::vector<std::string>& articles, size_t count) {
  const std::unique_ptr<DocumentReader> reader = Must(DocumentReader::Open(articles));
  std::vector<std::string> texts;
  Document document;
  while (texts.size() < count && Must(reader->Next(&document))) Cut(document.text, &texts);
  texts.resize(std::min(texts.size(), count));
  return texts;
}

DType ParseDType(const std::string& name) {
  if (name == "f32") return DType::kF32;
  if (name == "bf16") return DType::kBF16;
  std::cerr << "bench: type \"" << name << "\": there are f32 and bf16\n";
  std::exit(1);
}

// Answers as the first does, after the second has worked too.
class BothEmbedders final : public Embedder {
 public:
  BothEmbedders(const Embedder* first, std::unique_ptr<Embedder> second)
      : first_(first), second_(std::move(second)) {}
  int dimension() const override { return first_->dimension(); }
  const Hash256& fingerprint() const override { return first_->fingerprint(); }
  absl::Status Embed(std::span<const std::string_view> texts, std::span<float> out) const override {
    std::vector<float> unused(texts.size() * second_->dimension());
    if (absl::Status status = second_->Embed(texts, unused); !status.ok()) return status;
    return first_->Embed(texts, out);
  }

 private:
  const Embedder* const first_;
  const std::unique_ptr<Embedder> second_;
};

}  // namespace

void InferenceWorld::MakeModel(const std::string& tokenizer_file) {
  if (fs::exists(model_directory_ + "/config.json")) return;
  const std::string tokenizer = options_.directory + "/tokenizer";
  fs::create_directories(tokenizer);
  fs::copy_file(tokenizer_file, tokenizer + "/tokenizer.model",
                fs::copy_options::overwrite_existing);
  const TableWeights weights;
  std::error_code ignored;
  fs::remove_all(model_directory_, ignored);  // what a run that was ended left
  Must(SaveModelDirectory(
      model_directory_, TinyLlama(), DType::kBF16,
      [&](const ModelTensor& tensor, std::span<float> out) {
        return weights.Read(tensor.name, tensor.rows, tensor.cols, out);
      },
      tokenizer));
}

void InferenceWorld::MakeKnowledgeBase(const std::vector<std::string>& articles) {
  const std::string done = base_directory_ + "/done";
  if (fs::exists(done)) return;
  std::error_code ignored;
  fs::remove_all(base_directory_, ignored);
  std::cout << "filling " << base_directory_ << std::endl;
  const std::vector<std::string> texts = ReadReferences(articles, options_.references);
  if (texts.size() < options_.references) {
    Must(absl::InvalidArgumentError(
        absl::StrCat("--references: the articles have ", texts.size(), " only")));
  }
  const ModelConfig config = TinyLlama();
  const ExplicitMemoryConfig& memory = *config.explicit_memory;
  RocksDbStoreOptions store_options;
  store_options.directory = base_directory_ + "/db";
  fs::create_directories(base_directory_);
  const std::unique_ptr<MemoryStore> store = Must(OpenRocksDbStore(store_options));
  KnowledgeBaseSpec spec;
  spec.name = kBase;
  spec.writer_fingerprint = Writer();
  spec.geometry.memory_layers.assign(memory.memory_layers.begin(), memory.memory_layers.end());
  spec.geometry.kv_heads = config.kv_heads;
  spec.geometry.head_dim = config.head_dim;
  spec.geometry.tokens_kept = memory.tokens_kept;
  spec.geometry.reference_tokens = memory.reference_tokens;
  spec.codec = options_.codec;
  spec.embedder_fingerprint = embedder_->fingerprint();
  spec.embedding_dimension = embedder_->dimension();
  Must(store->CreateKnowledgeBase(kTenant, spec, false).status());
  const std::string load =
      Must(store->BeginLoad(kTenant, kBase, "bench", LoadMode::kAppend, texts.size())).load.load_id;
  const std::unique_ptr<Codec> codec = Must(MakeCodec(options_.codec, config.head_dim, ""));
  std::vector<float> normal(1 << 20);
  std::mt19937 random(7);
  std::normal_distribution<float> distribution;
  for (float& x : normal) x = distribution(random);
  ExplicitMemory value;
  value.shape = {static_cast<int>(memory.memory_layers.size()), config.kv_heads, memory.tokens_kept,
                 config.head_dim};
  value.reference_tokens = memory.reference_tokens;
  value.values.resize(value.shape.values());
  constexpr size_t kBatch = 32;
  for (size_t first = 0; first < texts.size(); first += kBatch) {
    const size_t count = std::min(kBatch, texts.size() - first);
    std::vector<std::string_view> views(texts.begin() + first, texts.begin() + first + count);
    std::vector<float> vectors(count * embedder_->dimension());
    Must(embedder_->Embed(views, vectors));
    std::vector<std::string> records;
    std::vector<NewEntry> entries(count);
    for (size_t i = 0; i < count; ++i) {
      const size_t n = first + i;
      // Another place of the table for every reference, and a number of its own.
      const size_t at = n * 7919 % (normal.size() - value.values.size());
      std::copy_n(normal.begin() + at, value.values.size(), value.values.begin());
      value.values[n % value.values.size()] += static_cast<float>(n % 13);
      records.push_back(Must(EncodeRecord(value, Writer(), *codec)));
    }
    for (size_t i = 0; i < count; ++i) {
      NewEntry& entry = entries[i];
      entry.source.document_id = absl::StrCat("document-", (first + i) / 16);
      entry.source.ordinal = (first + i) % 16;
      entry.source.title = absl::StrCat("Title of ", (first + i) / 16);
      entry.source.char_end = views[i].size();
      entry.record_id = Sha256Of(absl::StrCat("reference ", first + i));
      entry.record = records[i];
      entry.embedding =
          std::span(vectors).subspan(i * embedder_->dimension(), embedder_->dimension());
    }
    Must(store->PutLoad(kTenant, load, entries, false).status());
  }
  const LoadInfo info = Must(store->CommitLoad(kTenant, load, true));
  if (info.state != LoadState::kCommitted) Must(absl::InternalError(info.failure));
  Must(store->Sync());
  if (!std::ofstream(done)) Must(absl::UnavailableError(done + " cannot be written"));
}

std::unique_ptr<InferenceWorld> InferenceWorld::Create(const InferenceWorldOptions& options) {
  const char* set = std::getenv("MEMORY3_DATA");
  const std::string data = set != nullptr ? set : "../shared/data";
  std::vector<std::string> articles;
  for (int shard = 0; shard < 8; ++shard) {
    std::string path = absl::StrCat(data, "/enwiki/articles-", shard, ".jsonl.zst");
    if (fs::exists(path)) articles.push_back(std::move(path));
  }
  const std::string tokenizer_file = data + "/fixtures/tokenizers/llama2.model";
  if (articles.size() < 2 || !fs::exists(tokenizer_file)) {
    std::cout << "bench: no articles in " << data << "/enwiki; nothing measured\n";
    return nullptr;
  }
  std::unique_ptr<InferenceWorld> world(new InferenceWorld);
  world->options_ = options;
  world->model_directory_ = options.directory + "/model";
  world->base_directory_ = absl::StrCat(options.directory, "/", options.references, "-",
                                        std::string(CodecName(options.codec)));
  world->embedder_ = Must(MakeEmbedder("lexical"));
  world->others_ = ReadReferences({articles.back()}, 4 * kOthers);
  articles.pop_back();
  world->references_ =
      ReadReferences(articles, std::min<size_t>(options.references, kReferencesKept));
  world->MakeModel(tokenizer_file);
  world->MakeKnowledgeBase(articles);

  world->server_.emplace("memory_server",
                         std::vector<std::string>{"--data", world->base_directory_ + "/db",
                                                  "--listen", "127.0.0.1:0"});
  const auto port = world->server_->WaitForLine(R"(gRPC on port (\d+))", std::chrono::seconds(300));
  if (!port) Must(absl::InternalError("memory_server: " + world->server_->output()));
  world->memory_target_ = "127.0.0.1:" + *port;

  const std::unique_ptr<Checkpoint> checkpoint = Must(Checkpoint::Open(world->model_directory_));
  const ModelConfig& config = checkpoint->config();
  world->tokenizer_ = Must(OpenTokenizer(world->model_directory_, config));
  world->device_ = Must(MakeCpuDevice({}));
  const WeightFormat format = options.weights == "int8" ? WeightFormat::kInt8 : WeightFormat::kBF16;
  auto model = Must(Model::Load(world->device_.get(), config, *checkpoint, format));
  DecoderOptions decoder;
  decoder.max_rows = options.max_rows;
  decoder.max_logit_rows = options.batch;
  decoder.kv_pages = options.kv_pages > 0 ? options.kv_pages : options.batch * 18 + 64;
  decoder.memory_slots = options.memory_slots;
  decoder.memory_dtype = ParseDType(options.memory_dtype);
  decoder.kv_dtype = ParseDType(options.kv_dtype);

  const ExplicitMemoryConfig& memory = *config.explicit_memory;
  ReaderIdentity identity;
  identity.writer_fingerprint = Writer();
  identity.embedder_fingerprint = world->embedder_->fingerprint();
  identity.embedding_dimension = world->embedder_->dimension();
  identity.geometry.mutable_memory_layers()->Add(memory.memory_layers.begin(),
                                                 memory.memory_layers.end());
  identity.geometry.set_kv_heads(config.kv_heads);
  identity.geometry.set_head_dim(config.head_dim);
  identity.geometry.set_tokens_kept(memory.tokens_kept);
  identity.geometry.set_reference_tokens(memory.reference_tokens);
  RemoteMemoryOptions remote;
  remote.client.target = world->memory_target_;
  world->source_ = Must(RemoteMemorySource::Create(remote, identity));
  world->base_ = Must(world->source_->Open(kTenant, kBase, absl::InfiniteFuture()));
  if (!options.also_embed.empty()) {
    world->query_embedder_ = std::make_unique<BothEmbedders>(
        world->embedder_.get(), Must(MakeEmbedder("bert:" + options.also_embed)));
  }
  world->reader_ = std::make_unique<MemoryReader>(
      world->query_embedder_ != nullptr ? world->query_embedder_.get() : world->embedder_.get(),
      Writer(),
      MemoryShape{static_cast<int>(memory.memory_layers.size()), config.kv_heads,
                  memory.tokens_kept, config.head_dim},
      MemoryReaderOptions{options.host_cache_bytes, options.reader_threads});
  EngineOptions engine;
  engine.max_running = options.batch;
  engine.slice_tokens = options.slice_tokens;
  engine.prompt_cache_pages = 0;  // every prompt is computed
  world->engine_ = Must(Engine::Create(Must(Decoder::Create(std::move(model), decoder)),
                                       world->tokenizer_.get(), world->reader_.get(), engine));
  return world;
}

InferenceWorld::~InferenceWorld() {
  engine_.reset();
  reader_.reset();
  base_.reset();
  source_.reset();
}

std::vector<int32_t> InferenceWorld::Prompt(int number, int tokens) const {
  std::vector<int32_t> ids;
  for (size_t i = 0; static_cast<int>(ids.size()) < tokens; ++i) {
    const std::vector<int32_t> more =
        tokenizer_->Encode(others_[(size_t(number) * 4 + i) % others_.size()]);
    ids.insert(ids.end(), more.begin(), more.end());
  }
  ids.resize(tokens);
  return ids;
}

std::string InferenceWorld::description() const {
  return absl::StrCat(device_->name(), "; TinyLlama-1.1B geometry, random ", options_.weights,
                      " weights, KV ", options_.kv_dtype, ", memories ", options_.memory_dtype,
                      "; ", options_.references, " Wikipedia references, ",
                      std::string(CodecName(options_.codec)), " records, lexical",
                      options_.also_embed.empty() ? "" : " and, not used, a BERT-family embedder");
}

void TimingSink::Send(v1::GenerateResponse event) {
  if (event.has_delta() && event.delta().token_ids_size() > 0)
    tokens.push_back(absl::ToDoubleSeconds(absl::Now() - start_));
  if (event.has_provenance() && !event.provenance().inherited())
    memories += event.provenance().memories_size();
  if (event.has_finish()) finish = std::move(*event.mutable_finish());
}

void TimingSink::End(absl::Status status) {
  const std::lock_guard lock(mutex_);
  end = absl::ToDoubleSeconds(absl::Now() - start_);
  status_ = std::move(status);
  ended_ = true;
  changed_.notify_all();
}

void TimingSink::Wait() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return ended_; });
  Must(status_);
}

}  // namespace memory3
