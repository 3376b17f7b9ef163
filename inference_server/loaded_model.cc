#include "inference_server/loaded_model.h"

#include <algorithm>
#include <filesystem>
#include <limits>
#include <optional>
#include <string_view>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "inference_server/embedded_memory_source.h"
#include "inference_server/remote_memory_source.h"
#include "memory_server/rocksdb_store.h"
#include "transformer/checkpoint.h"
#include "transformer/fingerprint.h"
#include "transformer/model.h"

namespace memory3 {
namespace {

constexpr std::string_view kEmbedded = "embedded:";
constexpr int kMinLogitRows = 128;  // of one pass, for scores

absl::Status Named(const char* flag, std::string_view value, const absl::Status& status) {
  return absl::Status(status.code(),
                      absl::StrCat("--", flag, " ", std::string(value), ": ", status.message()));
}

absl::StatusOr<WeightFormat> ParseWeights(const std::string& name) {
  if (name == "f32") return WeightFormat::kF32;
  if (name == "bf16") return WeightFormat::kBF16;
  if (name == "int8") return WeightFormat::kInt8;
  return absl::InvalidArgumentError(
      absl::StrCat("--weights is \"", name, "\", none of f32, bf16, int8"));
}

absl::StatusOr<std::unique_ptr<Device>> OpenDevice(const ModelOptions& options) {
  if (options.device == "cpu") return MakeCpuDevice({.threads = options.threads});
  if (options.device == "cuda") {
    absl::StatusOr<std::unique_ptr<Device>> cuda = MakeCudaDevice({});
    if (!cuda.ok()) return Named("device", options.device, cuda.status());
    return cuda;
  }
  if (options.device != "auto") {
    return absl::InvalidArgumentError(
        absl::StrCat("--device is \"", options.device, "\", none of cpu, cuda, auto"));
  }
  absl::StatusOr<std::unique_ptr<Device>> cuda = MakeCudaDevice({});
  if (cuda.ok()) return cuda;
  return MakeCpuDevice({.threads = options.threads});
}

absl::StatusOr<ChatTemplate> ChooseChatTemplate(const std::string& name,
                                                const Tokenizer& tokenizer) {
  if (name != "auto") return ParseChatTemplate(name);
  const bool chatml = tokenizer.IsSpecial(tokenizer.TokenId("<|im_start|>")) &&
                      tokenizer.IsSpecial(tokenizer.TokenId("<|im_end|>"));
  return chatml ? ChatTemplate::kChatMl : ChatTemplate::kPlain;
}

// How many units of `unit` bytes there are in `bytes`, at most `useful`.
int Units(uint64_t bytes, int64_t unit, int64_t useful) {
  const uint64_t count = bytes / static_cast<uint64_t>(std::max<int64_t>(unit, 1));
  return static_cast<int>(std::min<uint64_t>(count, static_cast<uint64_t>(useful)));
}

// Bytes of the keys and values of `tokens` tokens in `layers` layers.
int64_t KvBytes(const ModelConfig& config, int64_t layers, int64_t tokens, DType dtype) {
  return 2 * layers * config.kv_heads * config.head_dim * tokens * SizeOf(dtype);
}

absl::StatusOr<DecoderOptions> SizeDecoder(const ModelOptions& options, const ModelConfig& config,
                                           const std::optional<ExplicitMemoryConfig>& memory,
                                           bool reads, bool cpu) {
  DecoderOptions decoder;
  decoder.memory = memory;
  decoder.max_rows = options.slice_tokens + options.max_running;
  decoder.max_logit_rows = std::max(kMinLogitRows, options.max_running);
  decoder.kv_dtype = decoder.memory_dtype = cpu ? DType::kF32 : DType::kBF16;
  // No more than all sequences of the batch can fill.
  const int64_t pages_of_one = config.max_position_embeddings / kKvPageTokens + 1;
  decoder.kv_pages =
      Units(options.kv_cache_bytes, KvBytes(config, config.layers, kKvPageTokens, decoder.kv_dtype),
            std::min<int64_t>(pages_of_one * options.max_running, std::numeric_limits<int>::max()));
  if (decoder.kv_pages < 1) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--kv_cache_bytes is ", options.kv_cache_bytes, ", a page of ", kKvPageTokens,
        " tokens takes ", KvBytes(config, config.layers, kKvPageTokens, decoder.kv_dtype)));
  }
  decoder.memory_slots = 0;
  if (!reads) return decoder;
  const int64_t slot =
      KvBytes(config, static_cast<int64_t>(memory->memory_layers.size()),
              std::min(memory->tokens_kept, memory->reference_tokens), decoder.memory_dtype);
  decoder.memory_slots = Units(options.device_cache_bytes, slot, std::numeric_limits<int>::max());
  if (decoder.memory_slots < memory->references_per_chunk) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--device_cache_bytes is ", options.device_cache_bytes, ", room for ", decoder.memory_slots,
        " memories of ", slot, " bytes; a chunk reads ", memory->references_per_chunk));
  }
  return decoder;
}

absl::StatusOr<std::unique_ptr<MemorySource>> OpenSource(const ModelOptions& options,
                                                         ReaderIdentity identity,
                                                         std::unique_ptr<MemoryStore>* store) {
  if (absl::StartsWith(options.memory, absl::string_view(kEmbedded.data(), kEmbedded.size()))) {
    absl::StatusOr<std::unique_ptr<MemoryStore>> opened =
        OpenRocksDbStore({.directory = options.memory.substr(kEmbedded.size())});
    if (!opened.ok()) return Named("memory", options.memory, opened.status());
    *store = *std::move(opened);
    return std::make_unique<EmbeddedMemorySource>(store->get(), std::move(identity));
  }
  const size_t colon = options.memory.rfind(':');
  int port = 0;
  if (colon == std::string::npos || colon == 0 ||
      !absl::SimpleAtoi(options.memory.substr(colon + 1), &port) || port < 1 || port > 65535) {
    return absl::InvalidArgumentError(absl::StrCat("--memory is \"", options.memory,
                                                   "\", none of embedded:PATH, HOST:PORT, none"));
  }
  RemoteMemoryOptions remote;
  remote.client.target = options.memory;
  remote.client.api_key = options.memory_api_key;
  remote.client.tls = {options.memory_tls_ca, options.memory_tls_certificate,
                       options.memory_tls_key};
  remote.tenant = options.memory_tenant;
  absl::StatusOr<std::unique_ptr<RemoteMemorySource>> source =
      RemoteMemorySource::Create(std::move(remote), std::move(identity));
  if (!source.ok()) return Named("memory", options.memory, source.status());
  return *std::move(source);
}

}  // namespace

LoadedModel::~LoadedModel() {
  engine.reset();
  // Nobody waits any more for what is under way.
  if (source != nullptr) source->Shutdown();
}

v1::Geometry GeometryOf(const ModelConfig& config, const ExplicitMemoryConfig& memory) {
  v1::Geometry geometry;
  geometry.mutable_memory_layers()->Add(memory.memory_layers.begin(), memory.memory_layers.end());
  geometry.set_kv_heads(config.kv_heads);
  geometry.set_head_dim(config.head_dim);
  geometry.set_tokens_kept(memory.tokens_kept);
  geometry.set_reference_tokens(memory.reference_tokens);
  return geometry;
}

absl::StatusOr<std::unique_ptr<LoadedModel>> LoadModel(
    const ModelOptions& options, std::function<void(absl::Duration)> on_retrieved) {
  auto model = std::make_unique<LoadedModel>();
  const std::filesystem::path directory(options.model);
  model->name = !options.name.empty()      ? options.name
                : directory.has_filename() ? directory.filename().string()
                                           : directory.parent_path().filename().string();
  model->weights = options.weights;
  model->wait_cap = absl::Seconds(options.wait_cap_seconds);
  const absl::StatusOr<WeightFormat> format = ParseWeights(options.weights);
  if (!format.ok()) return format.status();
  const absl::StatusOr<std::unique_ptr<Checkpoint>> checkpoint = Checkpoint::Open(options.model);
  if (!checkpoint.ok()) return Named("model", options.model, checkpoint.status());
  const ModelConfig& config = (*checkpoint)->config();
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = OpenTokenizer(options.model, config);
  if (!tokenizer.ok()) return Named("model", options.model, tokenizer.status());
  model->tokenizer = *std::move(tokenizer);
  const absl::StatusOr<ChatTemplate> chat =
      ChooseChatTemplate(options.chat_template, *model->tokenizer);
  if (!chat.ok()) return Named("chat_template", options.chat_template, chat.status());
  model->chat = *chat;

  const bool reads = options.memory != "none";
  model->dense_mode = !config.explicit_memory.has_value();
  const ExplicitMemoryConfig geometry = config.explicit_memory
                                            ? *config.explicit_memory
                                            : DenseMode(config, PrefixTokenIds(*model->tokenizer));
  const absl::StatusOr<Hash256> fingerprint =
      WriterFingerprint(**checkpoint, *model->tokenizer, geometry);
  if (!fingerprint.ok()) return Named("model", options.model, fingerprint.status());
  model->writer_fingerprint = *fingerprint;

  absl::StatusOr<std::unique_ptr<Device>> device = OpenDevice(options);
  if (!device.ok()) return device.status();
  model->device = *std::move(device);
  // A dense-mode checkpoint without memories knows the plain layout only.
  const std::optional<ExplicitMemoryConfig> memory =
      model->dense_mode && !reads ? std::nullopt : std::optional(geometry);
  const absl::StatusOr<DecoderOptions> decoder_options =
      SizeDecoder(options, config, memory, reads, model->device->is_cpu());
  if (!decoder_options.ok()) return decoder_options.status();

  if (reads) {
    absl::StatusOr<std::unique_ptr<Embedder>> embedder = MakeEmbedder(options.embedder);
    if (!embedder.ok()) return Named("embedder", options.embedder, embedder.status());
    model->embedder = *std::move(embedder);
    absl::StatusOr<std::unique_ptr<MemorySource>> source = OpenSource(
        options,
        {model->writer_fingerprint, model->embedder->fingerprint(),
         static_cast<uint32_t>(model->embedder->dimension()), GeometryOf(config, geometry)},
        &model->store);
    if (!source.ok()) return source.status();
    model->source = *std::move(source);
    model->reader = std::make_unique<MemoryReader>(
        model->embedder.get(), model->writer_fingerprint,
        MemoryShape{static_cast<int>(geometry.memory_layers.size()), config.kv_heads,
                    std::min(geometry.tokens_kept, geometry.reference_tokens), config.head_dim},
        MemoryReaderOptions{.cache_bytes = static_cast<int64_t>(options.host_cache_bytes),
                            .device_decodes_vq = model->device->DecodesVectors(CodecId::kVq),
                            .on_retrieved = std::move(on_retrieved)});
  }

  absl::StatusOr<std::shared_ptr<const Model>> weights =
      Model::Load(model->device.get(), config, **checkpoint, *format);
  if (!weights.ok()) return Named("model", options.model, weights.status());
  absl::StatusOr<std::unique_ptr<Decoder>> decoder =
      Decoder::Create(*std::move(weights), *decoder_options);
  if (!decoder.ok()) return Named("model", options.model, decoder.status());
  absl::StatusOr<std::unique_ptr<Engine>> engine =
      Engine::Create(*std::move(decoder), model->tokenizer.get(), model->reader.get(),
                     {.max_running = options.max_running,
                      .max_waiting = options.max_waiting,
                      .slice_tokens = options.slice_tokens,
                      .wait_cap = model->wait_cap,
                      .model_name = model->name});
  if (!engine.ok()) return engine.status();
  model->engine = *std::move(engine);
  return model;
}

}  // namespace memory3
