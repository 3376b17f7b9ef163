// The shape of a model: Hugging Face's config.json for LlamaForCausalLM, and the `explicit_memory`
// object that says how it writes and reads memories (docs/formats.md).
//
// Whatever in a config.json would change the forward pass and is not represented here is refused by
// the field's name. Thread-safety: plain values.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace memory3 {

struct RopeScaling {
  enum class Kind : uint8_t { kNone, kLinear, kLlama3 } kind = Kind::kNone;
  double factor = 1;
  // llama3 only.
  double low_freq_factor = 1, high_freq_factor = 4;
  int original_max_position_embeddings = 8192;
};

// Default: the paper's numbers; `memory_layers` has none, it is given by the checkpoint.
struct ExplicitMemoryConfig {
  int version = 1;
  std::vector<int> memory_layers;  // ascending, within [0, layers)
  int tokens_kept = 8;             // per KV head
  int reference_tokens = 128;      // longest reference; also the width of the memories' positions
  int chunk_tokens = 64;
  int references_per_chunk = 5;
  std::vector<int32_t> prefix_token_ids;  // bos + encode("Reference:")
};

struct ModelConfig {
  int vocab_size = 0;
  int hidden_size = 0;
  int intermediate_size = 0;
  int layers = 0;
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int max_position_embeddings = 2048;
  float rms_norm_eps = 1e-6f;
  double rope_theta = 10000;
  RopeScaling rope_scaling;
  bool tie_word_embeddings = false;
  int32_t bos_token_id = -1;
  std::vector<int32_t> eos_token_ids;
  // Absent: the checkpoint was not trained for memory; it works in dense mode (DenseMode below).
  std::optional<ExplicitMemoryConfig> explicit_memory;

  int64_t parameter_count() const;
};

// The geometry of a checkpoint without `explicit_memory`: all layers, 128 tokens kept, the given
// prefix, everything else the default.
ExplicitMemoryConfig DenseMode(const ModelConfig& config, std::vector<int32_t> prefix_token_ids);

// Errors: INVALID_ARGUMENT naming `source` and the field.
absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view json, std::string_view source);
std::string ModelConfigToJson(const ModelConfig& config);

// inv_freq[i], i < head_dim/2, with scaling applied, as transformers computes it (in f32).
std::vector<float> RopeInverseFrequencies(const ModelConfig& config);

}  // namespace memory3
