#include "trainer/writing_model.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "transformer/fingerprint.h"
#include "transformer/model.h"

namespace memory3 {

absl::StatusOr<WeightFormat> ParseWeightFormat(std::string_view name) {
  for (const WeightFormat f : {WeightFormat::kF32, WeightFormat::kBF16, WeightFormat::kInt8}) {
    if (WeightFormatName(f) == name) return f;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("weights \"", std::string(name), "\": must be f32, bf16 or int8"));
}

std::string_view WeightFormatName(WeightFormat format) {
  switch (format) {
    case WeightFormat::kF32:
      return "f32";
    case WeightFormat::kBF16:
      return "bf16";
    case WeightFormat::kInt8:
      return "int8";
  }
  return "?";
}

absl::StatusOr<std::unique_ptr<WritingModel>> WritingModel::Open(const std::string& directory) {
  auto checkpoint = Checkpoint::Open(directory);
  if (!checkpoint.ok()) return checkpoint.status();
  const ModelConfig& config = (*checkpoint)->config();
  auto tokenizer = OpenTokenizer(directory, config);
  if (!tokenizer.ok()) return tokenizer.status();
  const ExplicitMemoryConfig memory = config.explicit_memory
                                          ? *config.explicit_memory
                                          : DenseMode(config, PrefixTokenIds(**tokenizer));
  auto fingerprint = WriterFingerprint(**checkpoint, **tokenizer, memory);
  if (!fingerprint.ok()) return fingerprint.status();
  ModelConfig with_memory = config;
  with_memory.explicit_memory = memory;
  return Of(with_memory, *std::move(checkpoint), *std::move(tokenizer), *fingerprint);
}

std::unique_ptr<WritingModel> WritingModel::Of(const ModelConfig& config,
                                               std::unique_ptr<const TensorSource> weights,
                                               std::unique_ptr<Tokenizer> tokenizer,
                                               const Hash256& fingerprint) {
  std::unique_ptr<WritingModel> model(new WritingModel);
  model->config_ = config;
  model->memory_ = *config.explicit_memory;
  model->weights_ = std::move(weights);
  model->tokenizer_ = std::move(tokenizer);
  model->fingerprint_ = fingerprint;
  return model;
}

absl::Status WritingModel::LoadWriter(Device* device, WeightFormat format, int rows) {
  auto model = Model::Load(device, config_, *weights_, format);
  if (!model.ok()) return model.status();
  auto writer = MemoryWriter::Create(
      *model, {.memory = memory_, .max_rows = std::max(rows, memory_.reference_tokens)});
  if (!writer.ok()) return writer.status();
  writer_ = *std::move(writer);
  format_ = format;
  return absl::OkStatus();
}

MemoryShape WritingModel::ShapeOf(int tokens) const {
  return {static_cast<int>(memory_.memory_layers.size()), config().kv_heads,
          std::min(tokens, memory_.tokens_kept), config().head_dim};
}

}  // namespace memory3
