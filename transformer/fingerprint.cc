#include "transformer/fingerprint.h"

#include <sys/stat.h>

#include <cstring>
#include <filesystem>
#include <string_view>
#include <vector>

#include "absl/strings/str_cat.h"
#include "memory/little_endian.h"
#include "nlohmann/json.hpp"
#include "transformer/atomic_file.h"
#include "transformer/json.h"

namespace memory3 {
namespace {

constexpr int64_t kMaxCacheBytes = 16 << 20;
constexpr char kCacheFile[] = ".memory3_tensors.json";

template <typename T>
std::string Bytes(T value) {
  std::string bytes(sizeof(T), '\0');
  StoreLittleEndian(bytes.data(), value);
  return bytes;
}
template <typename T>
std::string Bytes(const std::vector<T>& values) {
  std::string bytes;
  for (const T value : values) bytes += Bytes(value);
  return bytes;
}

// Length-prefixed fields, name before value.
class Fields {
 public:
  void Add(std::string_view value) { hash_.UpdateLengthPrefixed(value); }
  template <typename T>
  void Add(std::string_view name, T value) {
    Add(name);
    Add(std::string_view(Bytes(value)));
  }
  Hash256 Finish() { return hash_.Finish(); }

 private:
  Sha256 hash_;
};

// The state of the weight files that a cached digest belongs to; null where it cannot be told.
nlohmann::json FileStates(const Checkpoint& checkpoint) {
  nlohmann::json states = nlohmann::json::array();
  for (const std::string& path : checkpoint.weight_files()) {
    struct stat info {};
    if (::stat(path.c_str(), &info) != 0) return nullptr;
    states.push_back({{"name", std::filesystem::path(path).filename().string()},
                      {"bytes", static_cast<int64_t>(info.st_size)},
                      {"modified", absl::StrCat(info.st_mtim.tv_sec, ".", info.st_mtim.tv_nsec)}});
  }
  // Which of the files' tensors are the model's.
  return {{"version", 1}, {"files", states}, {"tied", checkpoint.config().tie_word_embeddings}};
}

absl::StatusOr<Hash256> CachedTensorDigest(const Checkpoint& checkpoint) {
  const std::string path = (std::filesystem::path(checkpoint.directory()) / kCacheFile).string();
  const nlohmann::json states = FileStates(checkpoint);
  if (auto text = ReadSmallFile(path, kMaxCacheBytes); text.ok()) {
    const auto cache = ParseJson(*text, path);
    if (cache.ok() && cache->is_object() && cache->value("weights", nlohmann::json()) == states &&
        !states.is_null()) {
      const auto& digest = cache->value("digest", nlohmann::json());
      if (digest.is_string()) {
        if (auto hash = Hash256::FromHex(digest.get<std::string>()); hash.ok()) return hash;
      }
    }
  }
  auto digest = TensorDigest(checkpoint);
  // A file changed while it was read gives a digest of no state: not kept.
  if (digest.ok() && !states.is_null() && FileStates(checkpoint) == states) {
    const nlohmann::json cache = {{"weights", states}, {"digest", digest->ToHex()}};
    // Without it the next start hashes again, nothing more.
    WriteFileAtomically(path, cache.dump() + "\n").IgnoreError();
  }
  return digest;
}

}  // namespace

absl::StatusOr<Hash256> TensorDigest(const Checkpoint& checkpoint) {
  Fields fields;
  fields.Add("m3tensors1");
  for (const ModelTensor& tensor : ModelTensors(checkpoint.config())) {  // sorted by name
    auto stored = checkpoint.Find(tensor.name);
    if (!stored.ok()) return stored.status();
    fields.Add(tensor.name);
    fields.Add(stored->entry->dtype);
    fields.Add(Bytes(stored->entry->shape));
    fields.Add(stored->file->Bytes(*stored->entry));
    stored->file->Forget(*stored->entry);
  }
  return fields.Finish();
}

absl::StatusOr<Hash256> WriterFingerprint(const Checkpoint& checkpoint, const Tokenizer& tokenizer,
                                          const ExplicitMemoryConfig& memory) {
  auto tensors = CachedTensorDigest(checkpoint);
  if (!tensors.ok()) return tensors.status();
  const ModelConfig& c = checkpoint.config();
  Fields fields;
  fields.Add("m3fp1");
  fields.Add("vocab_size", int64_t{c.vocab_size});
  fields.Add("hidden_size", int64_t{c.hidden_size});
  fields.Add("intermediate_size", int64_t{c.intermediate_size});
  fields.Add("num_hidden_layers", int64_t{c.layers});
  fields.Add("num_attention_heads", int64_t{c.heads});
  fields.Add("num_key_value_heads", int64_t{c.kv_heads});
  fields.Add("head_dim", int64_t{c.head_dim});
  fields.Add("tie_word_embeddings", int64_t{c.tie_word_embeddings});
  fields.Add("rms_norm_eps", double{c.rms_norm_eps});
  fields.Add("rope_theta", c.rope_theta);
  fields.Add("rope_type");
  const RopeScaling& s = c.rope_scaling;
  switch (s.kind) {
    case RopeScaling::Kind::kNone:
      fields.Add("default");
      break;
    case RopeScaling::Kind::kLinear:
      fields.Add("linear");
      fields.Add("factor", s.factor);
      break;
    case RopeScaling::Kind::kLlama3:
      fields.Add("llama3");
      fields.Add("factor", s.factor);
      fields.Add("low_freq_factor", s.low_freq_factor);
      fields.Add("high_freq_factor", s.high_freq_factor);
      fields.Add("original_max_position_embeddings", int64_t{s.original_max_position_embeddings});
      break;
  }
  fields.Add("tensors");
  fields.Add(tensors->view());
  fields.Add("tokenizer");
  fields.Add(tokenizer.file_hash().view());
  fields.Add("memory_layers", memory.memory_layers);
  fields.Add("tokens_kept", int64_t{memory.tokens_kept});
  fields.Add("reference_tokens", int64_t{memory.reference_tokens});
  fields.Add("prefix_token_ids", memory.prefix_token_ids);
  return fields.Finish();
}

}  // namespace memory3
