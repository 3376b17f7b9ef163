// A model directory opened for writing memories: tokenizer, geometry, fingerprint and, on a device,
// the writer itself.
//
// Thread-safety: const methods from any thread, writer() the device's thread. Owns everything.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "memory/hash.h"
#include "transformer/checkpoint.h"
#include "transformer/memory_writer.h"
#include "transformer/tokenizer.h"

namespace memory3 {

absl::StatusOr<WeightFormat> ParseWeightFormat(std::string_view name);  // "f32", "bf16", "int8"
std::string_view WeightFormatName(WeightFormat format);

class WritingModel {
 public:
  // Reads everything but the weights' numbers (the fingerprint reads them once, then is cached
  // beside the model). A model without explicit_memory writes dense memories. Errors:
  // Checkpoint::Open's, OpenTokenizer's.
  static absl::StatusOr<std::unique_ptr<WritingModel>> Open(const std::string& directory);
  // Of parts, for benchmarks: weights that stand in no directory, under a name of their own.
  // `config` has explicit_memory.
  static std::unique_ptr<WritingModel> Of(const ModelConfig& config,
                                          std::unique_ptr<const TensorSource> weights,
                                          std::unique_ptr<Tokenizer> tokenizer,
                                          const Hash256& fingerprint);

  // Loads the weights. `rows`: tokens encoded at once. The device must outlive the model. Errors:
  // Model::Load's, MemoryWriter::Create's.
  absl::Status LoadWriter(Device* device, WeightFormat format, int rows);

  const ModelConfig& config() const { return config_; }
  const ExplicitMemoryConfig& memory() const { return memory_; }
  const Tokenizer& tokenizer() const { return *tokenizer_; }
  const Hash256& fingerprint() const { return fingerprint_; }
  WeightFormat format() const { return format_; }
  MemoryWriter* writer() const { return writer_.get(); }  // null before LoadWriter

  // Of a memory of a reference of `tokens` tokens.
  MemoryShape ShapeOf(int tokens) const;

 private:
  WritingModel() = default;

  ModelConfig config_;
  std::unique_ptr<const TensorSource> weights_;
  std::unique_ptr<Tokenizer> tokenizer_;
  ExplicitMemoryConfig memory_;
  Hash256 fingerprint_;
  WeightFormat format_ = WeightFormat::kF32;
  std::unique_ptr<MemoryWriter> writer_;
};

}  // namespace memory3
