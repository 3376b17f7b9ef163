#include "transformer/memory_writer.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace memory3 {
namespace {

enum Source : int { kPrefix = 0, kReference = 1 };

// Activations and kept values grow with the references of a batch; the many short ones of a batch
// are bounded by this.
constexpr int kShortestExpected = 16;

}  // namespace

absl::StatusOr<std::unique_ptr<MemoryWriter>> MemoryWriter::Create(
    std::shared_ptr<const Model> model, const MemoryWriterOptions& options,
    std::shared_ptr<const PrefixKv> prefix) {
  const ModelConfig& c = model->config();
  std::unique_ptr<MemoryWriter> writer(new MemoryWriter);
  writer->model_ = model;
  if (!options.memory && !c.explicit_memory) {
    return absl::FailedPreconditionError(
        "memory writer: the model's config.json has no explicit_memory");
  }
  writer->memory_ = options.memory ? *options.memory : *c.explicit_memory;
  const ExplicitMemoryConfig& m = writer->memory_;
  if (absl::Status status = CheckExplicitMemory(c, m); !status.ok()) return status;
  if (options.max_rows < m.reference_tokens) {
    return absl::InvalidArgumentError(absl::StrCat(
        "max_rows is ", options.max_rows, ", less than one reference of ", m.reference_tokens));
  }
  Device& device = model->device();
  writer->max_rows_ = options.max_rows;
  writer->max_references_ = std::max(1, options.max_rows / kShortestExpected);
  writer->keep_ = std::min(m.tokens_kept, m.reference_tokens);
  if (prefix == nullptr) {
    auto made = PrefixKv::Create(*model, m.prefix_token_ids, DType::kF32);
    if (!made.ok()) return made.status();
    prefix = *std::move(made);
  }
  writer->prefix_ = std::move(prefix);
  absl::StatusOr<ActivationBuffers> activations =
      ActivationBuffers::Create(*model, writer->max_rows_);
  if (!activations.ok()) return activations.status();
  writer->activations_ = *std::move(activations);
  const int64_t heads = c.kv_heads, references = writer->max_references_;
  auto allocate = [&](Buffer* buffer, int64_t elements) {
    absl::StatusOr<Buffer> made = device.Allocate(elements * sizeof(float));
    if (made.ok()) *buffer = *std::move(made);
    return made.status();
  };
  absl::Status status = allocate(&writer->scores_, writer->max_rows_ * heads);
  status.Update(allocate(&writer->kept_, references * heads * writer->keep_));
  status.Update(allocate(&writer->values_, m.memory_layers.size() * references * 2 * heads *
                                               writer->keep_ * c.head_dim));
  if (!status.ok()) return status;
  return writer;
}

absl::Status MemoryWriter::Check(std::span<const std::vector<int32_t>> references) const {
  for (size_t r = 0; r < references.size(); ++r) {
    const std::vector<int32_t>& ids = references[r];
    if (ids.empty()) return absl::InvalidArgumentError(absl::StrCat("reference ", r, " is empty"));
    if (static_cast<int>(ids.size()) > memory_.reference_tokens) {
      return absl::InvalidArgumentError(absl::StrCat("reference ", r, " has ", ids.size(),
                                                     " tokens, the longest is ",
                                                     memory_.reference_tokens));
    }
    for (int32_t id : ids) {
      if (id < 0 || id >= model_->config().vocab_size) {
        return absl::InvalidArgumentError(absl::StrCat("reference ", r, ": token id ", id,
                                                       " is not in the vocabulary of ",
                                                       model_->config().vocab_size));
      }
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<ExplicitMemory>> MemoryWriter::Write(
    std::span<const std::vector<int32_t>> references) {
  if (absl::Status status = Check(references); !status.ok()) return status;
  std::vector<ExplicitMemory> memories;
  memories.reserve(references.size());
  for (size_t begin = 0; begin < references.size();) {
    size_t end = begin;
    int rows = 0;
    while (end < references.size() && static_cast<int>(end - begin) < max_references_ &&
           rows + static_cast<int>(references[end].size()) <= max_rows_) {
      rows += static_cast<int>(references[end++].size());
    }
    absl::Status status = WriteBatch(references.subspan(begin, end - begin), &memories);
    if (!status.ok()) return status;
    begin = end;
  }
  return memories;
}

BatchInput MemoryWriter::MakeBatch(std::span<const std::vector<int32_t>> references,
                                   const LayerActivations& a) const {
  const ModelConfig& c = model_->config();
  BatchInput input;
  AttentionPlan& plan = input.attention;
  plan.sources = {prefix_->source(), LiveKvSource(c, a.qkv)};
  plan.blocks.push_back(prefix_->Block(kPrefix));
  for (const std::vector<int32_t>& ids : references) {
    const int row = static_cast<int>(input.token_ids.size()), tokens = static_cast<int>(ids.size());
    for (int j = 0; j < tokens; ++j) {
      input.token_ids.push_back(ids[j]);
      input.positions.push_back(prefix_->tokens() + j);
    }
    const int begin = static_cast<int>(plan.block_ids.size());
    plan.block_ids.insert(plan.block_ids.end(), {0, static_cast<int>(plan.blocks.size())});
    plan.blocks.push_back(
        {kReference, KeyOf(c, a.qkv).Rows(row, tokens).data, nullptr, tokens, /*first=*/0});
    plan.segments.push_back({row, tokens, /*first=*/0, begin, begin + 2});
  }
  return input;
}

absl::Status MemoryWriter::WriteBatch(std::span<const std::vector<int32_t>> references,
                                      std::vector<ExplicitMemory>* out) {
  const ModelConfig& c = model_->config();
  Device& device = model_->device();
  std::vector<ReferenceRows> rows;
  int total = 0;
  for (const std::vector<int32_t>& ids : references) {
    rows.push_back({total, static_cast<int>(ids.size())});
    total += rows.back().tokens;
  }
  const int n = static_cast<int>(references.size());
  const LayerActivations a = activations_->View(total);
  const PreparedBatch* batch = device.Prepare(MakeBatch(references, a), /*slot=*/0);
  const Tensor scores{scores_.data(), DType::kF32, total, c.kv_heads, c.kv_heads};
  const int64_t head_values = int64_t{keep_} * c.head_dim,
                layer_values = n * 2 * c.kv_heads * head_values;
  const bool keeps_all = keep_ == memory_.reference_tokens;
  const int last = memory_.memory_layers.back();

  device.Run(0, [&] {
    // Equal scores keep every token of a whole reference, the lower first.
    if (keeps_all) device.Zero(scores.data, total * c.kv_heads * sizeof(float));
    device.Embed(a.x, *batch, model_->weights().embedding);
    size_t written = 0;
    for (int layer = 0; layer <= last; ++layer) {
      const bool is_memory_layer = memory_.memory_layers[written] == layer;
      BlockQkv(*model_, layer, a);
      if (is_memory_layer) {
        if (!keeps_all) {
          device.AttentionReceived(scores, QueryOf(c, a.qkv), KeyOf(c, a.qkv), rows,
                                   model_->attention_shape());
        }
        device.SelectKept(kept_.as<int32_t>(), scores, rows, keep_);
      }
      BlockRope(*model_, *batch, a);
      if (is_memory_layer) {
        device.GatherKept(values_.as<float>() + written * layer_values, kept_.as<int32_t>(),
                          KeyOf(c, a.qkv), ValueOf(c, a.qkv), n, keep_, c.kv_heads, c.head_dim);
        ++written;
      }
      if (layer == last) break;
      const int source_layer[] = {layer, 0};
      BlockAttention(*model_, layer, *batch, {source_layer, -1}, a);
      BlockMlp(*model_, layer, a);
    }
  });

  const int layers = static_cast<int>(memory_.memory_layers.size());
  host_.resize(layers * layer_values);
  absl::Status status = device.Download(host_.data(), values_.data(), host_.size() * sizeof(float));
  if (!status.ok()) return status;
  for (int r = 0; r < n; ++r) {
    ExplicitMemory& memory = out->emplace_back();
    memory.reference_tokens = rows[r].tokens;
    memory.shape = {layers, c.kv_heads, std::min(keep_, rows[r].tokens), c.head_dim};
    memory.values.reserve(memory.shape.values());
    for (int layer = 0; layer < layers; ++layer) {
      const float* of_reference =
          host_.data() + layer * layer_values + r * 2 * c.kv_heads * head_values;
      for (int head = 0; head < 2 * c.kv_heads; ++head) {  // K's heads, then V's
        const float* run = of_reference + head * head_values;
        memory.values.insert(memory.values.end(), run,
                             run + int64_t{memory.shape.tokens} * c.head_dim);
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace memory3
