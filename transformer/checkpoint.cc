#include "transformer/checkpoint.h"

#include <algorithm>
#include <filesystem>
#include <set>
#include <system_error>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "nlohmann/json.hpp"
#include "transformer/atomic_file.h"
#include "transformer/json.h"

namespace memory3 {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kMaxConfigBytes = 16 << 20;
constexpr int64_t kMaxIndexBytes = 64 << 20;
constexpr int64_t kMaxTokenizerBytes = 256 << 20;
constexpr char kSingleFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";
constexpr char kEmbedding[] = "model.embed_tokens.weight";
constexpr char kHead[] = "lm_head.weight";

// The shards an index names. The map tensor -> file is not relied on: the files' own headers are.
absl::StatusOr<std::set<std::string>> ShardsOf(const std::string& path) {
  auto text = ReadSmallFile(path, kMaxIndexBytes);
  if (!text.ok()) return text.status();
  auto index = ParseJson(*text, path);
  if (!index.ok()) return index.status();
  const auto map = index->is_object() ? index->find("weight_map") : index->end();
  if (map == index->end() || !map->is_object() || map->empty()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": weight_map: missing or no object"));
  }
  std::set<std::string> shards;
  for (const auto& [name, file] : map->items()) {
    const std::string shard = file.is_string() ? file.get<std::string>() : "";
    // A name, not a path: an index must not reach out of its directory.
    if (!absl::EndsWith(shard, ".safetensors") || absl::StrContains(shard, "/")) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": weight_map: ", name, ": no name of a safetensors file"));
    }
    shards.insert(shard);
  }
  return shards;
}

}  // namespace

std::vector<ModelTensor> ModelTensors(const ModelConfig& c) {
  const int64_t q = int64_t{c.heads} * c.head_dim;
  const int64_t kv = int64_t{c.kv_heads} * c.head_dim;
  std::vector<ModelTensor> out = {{kEmbedding, c.vocab_size, c.hidden_size},
                                  {"model.norm.weight", c.hidden_size, 1}};
  if (!c.tie_word_embeddings) out.push_back({kHead, c.vocab_size, c.hidden_size});
  for (int l = 0; l < c.layers; ++l) {
    const std::string layer = absl::StrCat("model.layers.", l, ".");
    out.push_back({layer + "input_layernorm.weight", c.hidden_size, 1});
    out.push_back({layer + "post_attention_layernorm.weight", c.hidden_size, 1});
    out.push_back({layer + "self_attn.q_proj.weight", q, c.hidden_size});
    out.push_back({layer + "self_attn.k_proj.weight", kv, c.hidden_size});
    out.push_back({layer + "self_attn.v_proj.weight", kv, c.hidden_size});
    out.push_back({layer + "self_attn.o_proj.weight", c.hidden_size, q});
    out.push_back({layer + "mlp.gate_proj.weight", c.intermediate_size, c.hidden_size});
    out.push_back({layer + "mlp.up_proj.weight", c.intermediate_size, c.hidden_size});
    out.push_back({layer + "mlp.down_proj.weight", c.hidden_size, c.intermediate_size});
  }
  std::sort(out.begin(), out.end(),
            [](const ModelTensor& a, const ModelTensor& b) { return a.name < b.name; });
  return out;
}

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& directory) {
  std::unique_ptr<Checkpoint> checkpoint(new Checkpoint);
  checkpoint->directory_ = directory;
  const std::string path = (fs::path(directory) / "config.json").string();
  auto text = ReadSmallFile(path, kMaxConfigBytes);
  if (!text.ok()) return text.status();
  auto config = ParseModelConfig(*text, path);
  if (!config.ok()) return config.status();
  checkpoint->config_ = *std::move(config);
  if (auto status = checkpoint->OpenFiles(); !status.ok()) return status;
  if (auto status = checkpoint->CheckTensors(); !status.ok()) return status;
  return checkpoint;
}

absl::Status Checkpoint::OpenFiles() {
  const fs::path directory(directory_);
  std::set<std::string> names;
  std::error_code error;
  // transformers' order: a single file first.
  if (fs::exists(directory / kSingleFile, error)) {
    names = {kSingleFile};
  } else if (fs::exists(directory / kIndexFile, error)) {
    auto shards = ShardsOf((directory / kIndexFile).string());
    if (!shards.ok()) return shards.status();
    names = *std::move(shards);
  } else {
    return absl::NotFoundError(
        absl::StrCat(directory_, ": neither ", kSingleFile, " nor ", kIndexFile));
  }
  for (const std::string& name : names) {
    auto file = SafetensorsFile::Open((directory / name).string());
    if (!file.ok()) return file.status();
    for (const auto& [tensor, entry] : (*file)->header().tensors) {
      const auto [it, added] = tensors_.try_emplace(tensor, Stored{file->get(), &entry});
      if (!added) {
        return absl::InvalidArgumentError(absl::StrCat((*file)->path(), ": tensor ", tensor,
                                                       " stands in ", it->second.file->path(),
                                                       " as well"));
      }
    }
    files_.push_back(*std::move(file));
  }
  return absl::OkStatus();
}

absl::Status Checkpoint::CheckTensors() const {
  std::set<std::string> known;
  for (const ModelTensor& t : ModelTensors(config_)) {
    auto stored = Find(t.name);
    if (!stored.ok()) return stored.status();
    std::vector<int64_t> shape = {t.rows};
    if (t.cols != 1) shape.push_back(t.cols);
    // A matrix of one column has both dimensions.
    const std::vector<int64_t> column = {t.rows, 1};
    const SafetensorsEntry& entry = *stored->entry;
    if (entry.shape != shape && !(t.cols == 1 && entry.shape == column)) {
      return absl::InvalidArgumentError(absl::StrCat(
          stored->file->path(), ": tensor ", t.name, ": shape [", absl::StrJoin(entry.shape, ", "),
          "], config.json wants [", absl::StrJoin(shape, ", "), "]"));
    }
    if (entry.dtype != "F32" && entry.dtype != "BF16" && entry.dtype != "F16") {
      return absl::InvalidArgumentError(absl::StrCat(stored->file->path(), ": tensor ", t.name,
                                                     ": dtype ", entry.dtype,
                                                     "; F32, BF16 and F16 are supported"));
    }
    known.insert(t.name);
  }
  for (const auto& [name, stored] : tensors_) {
    if (known.contains(name) || absl::EndsWith(name, "rotary_emb.inv_freq")) continue;
    if (name == kHead) {
      const Stored& embedding = tensors_.at(kEmbedding);
      if (stored.entry->dtype == embedding.entry->dtype &&
          stored.file->Bytes(*stored.entry) == embedding.file->Bytes(*embedding.entry)) {
        continue;
      }
      return absl::InvalidArgumentError(absl::StrCat(stored.file->path(), ": tensor ", name,
                                                     ": differs from ", kEmbedding,
                                                     ", but config.json has tie_word_embeddings"));
    }
    return absl::InvalidArgumentError(absl::StrCat(stored.file->path(), ": tensor ", name,
                                                   ": not part of this LlamaForCausalLM"));
  }
  return absl::OkStatus();
}

std::vector<std::string> Checkpoint::weight_files() const {
  std::vector<std::string> paths;
  for (const auto& file : files_) paths.push_back(file->path());
  return paths;
}

absl::StatusOr<Checkpoint::Stored> Checkpoint::Find(std::string_view name) const {
  const auto it = tensors_.find(std::string(name));
  if (it == tensors_.end()) {
    return absl::NotFoundError(absl::StrCat(directory_, ": no tensor ", std::string(name)));
  }
  return it->second;
}

absl::Status Checkpoint::Read(std::string_view name, int64_t rows, int64_t cols,
                              std::span<float> out) const {
  auto stored = Find(name);
  if (!stored.ok()) return stored.status();
  const std::vector<int64_t>& shape = stored->entry->shape;
  const int64_t stored_rows = shape.empty() ? 1 : shape[0];
  if (shape.size() > 2 || stored_rows != rows || stored->entry->elements() != rows * cols ||
      static_cast<int64_t>(out.size()) != rows * cols) {
    return absl::InvalidArgumentError(
        absl::StrCat(stored->file->path(), ": tensor ", std::string(name), ": shape [",
                     absl::StrJoin(shape, ", "), "], wanted [", rows, ", ", cols, "]"));
  }
  return stored->file->ReadFloats(name, out);
}

absl::Status SaveModelDirectory(
    const std::string& directory, const ModelConfig& config, DType dtype,
    const std::function<absl::Status(const ModelTensor&, std::span<float>)>& fill,
    const std::string& tokenizer_directory) {
  const fs::path to(directory);
  std::error_code error;
  fs::create_directories(to, error);
  if (error) return absl::UnavailableError(absl::StrCat(directory, ": ", error.message()));
  if (fs::exists(to / "config.json", error) || fs::exists(to / kIndexFile, error)) {
    return absl::AlreadyExistsError(absl::StrCat(directory, ": holds a model already"));
  }

  std::vector<SafetensorsOutput> outputs;
  for (const ModelTensor& t : ModelTensors(config)) {
    SafetensorsOutput output{t.name, {t.rows}, nullptr};
    if (!absl::EndsWith(t.name, "norm.weight")) output.shape.push_back(t.cols);
    output.fill = [&fill, t](std::span<float> out) { return fill(t, out); };
    outputs.push_back(std::move(output));
  }
  if (auto status = WriteSafetensors((to / kSingleFile).string(), outputs, dtype); !status.ok()) {
    return status;
  }

  if (!tokenizer_directory.empty()) {
    bool found = false;
    for (const char* name : {"tokenizer.model", "tokenizer.json", "tokenizer_config.json",
                             "special_tokens_map.json", "added_tokens.json"}) {
      const fs::path from = fs::path(tokenizer_directory) / name;
      if (!fs::exists(from, error)) continue;
      auto bytes = ReadSmallFile(from.string(), kMaxTokenizerBytes);
      if (!bytes.ok()) return bytes.status();
      if (auto status = WriteFileAtomically((to / name).string(), *bytes); !status.ok()) {
        return status;
      }
      found |=
          std::string_view(name) == "tokenizer.model" || std::string_view(name) == "tokenizer.json";
    }
    if (!found) {
      return absl::NotFoundError(
          absl::StrCat(tokenizer_directory, ": neither tokenizer.model nor tokenizer.json"));
    }
  }

  auto json = nlohmann::ordered_json::parse(ModelConfigToJson(config));
  json["torch_dtype"] = dtype == DType::kBF16 ? "bfloat16" : "float32";
  return WriteFileAtomically((to / "config.json").string(), json.dump(2) + "\n");
}

}  // namespace memory3
