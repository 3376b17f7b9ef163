// A model directory in Hugging Face's layout: config.json and model.safetensors, or
// model.safetensors.index.json with the shards it names.
//
// Thread-safety: const methods from any thread. Owns the maps of its files; they must not be
// changed while it is open (replace a model by renaming directories).
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "transformer/config.h"
#include "transformer/safetensors.h"
#include "transformer/tensor_source.h"

namespace memory3 {

struct ModelTensor {
  std::string name;            // Hugging Face's
  int64_t rows = 0, cols = 0;  // cols == 1: a vector
};

// What a LlamaForCausalLM of this shape consists of, sorted by name; no lm_head where tied.
std::vector<ModelTensor> ModelTensors(const ModelConfig& config);

class Checkpoint : public TensorSource {
 public:
  // Opens and checks everything but the numbers themselves: each tensor of ModelTensors there, with
  // its shape and a float type, none that a Llama does not have (a bias, a norm of queries, a layer
  // too many). `rotary_emb.inv_freq`, computed from the configuration, is passed over, and so is an
  // lm_head equal to the embedding it is tied to.
  // Errors: NOT_FOUND (file or tensor missing), INVALID_ARGUMENT, DATA_LOSS; they name file and
  // tensor.
  static absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const std::string& directory);

  const ModelConfig& config() const { return config_; }
  const std::string& directory() const { return directory_; }
  // Files that hold the tensors, in the order of their names.
  std::vector<std::string> weight_files() const;

  absl::Status Read(std::string_view name, int64_t rows, int64_t cols,
                    std::span<float> out) const override;

  // A tensor as it stands in its file.
  struct Stored {
    const SafetensorsFile* file;
    const SafetensorsEntry* entry;
  };
  // For names of ModelTensors(config()).
  absl::StatusOr<Stored> Find(std::string_view name) const;

 private:
  Checkpoint() = default;
  absl::Status OpenFiles();
  absl::Status CheckTensors() const;

  std::string directory_;
  ModelConfig config_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  absl::flat_hash_map<std::string, Stored> tensors_;
};

// Writes a model directory that Checkpoint::Open and transformers load: model.safetensors as
// `dtype` (kF32 or kBF16), the tokenizer's files copied from `tokenizer_directory` (none where
// empty), and config.json last, so that a directory left unfinished is no model. Makes the
// directory; one that holds a config.json already is ALREADY_EXISTS. `fill` gives a tensor of
// ModelTensors(config).
absl::Status SaveModelDirectory(
    const std::string& directory, const ModelConfig& config, DType dtype,
    const std::function<absl::Status(const ModelTensor&, std::span<float>)>& fill,
    const std::string& tokenizer_directory);

}  // namespace memory3
