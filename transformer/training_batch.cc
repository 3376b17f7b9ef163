#include "transformer/training_batch.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "transformer/block.h"

namespace memory3 {
namespace {

absl::Status CheckIds(const std::string& what, const std::vector<int32_t>& ids, int vocab_size,
                      int longest) {
  if (ids.empty()) return absl::InvalidArgumentError(absl::StrCat(what, " is empty"));
  if (ids.size() > longest) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, " has ", ids.size(), " tokens, the longest is ", longest));
  }
  for (const int32_t id : ids) {
    if (id < 0 || id >= vocab_size) {
      return absl::InvalidArgumentError(
          absl::StrCat(what, ": token id ", id, " is not in the vocabulary of ", vocab_size));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckSequence(const std::string& what, const TrainingSequence& sequence,
                           const ModelConfig& config, const TrainingBatch& batch, int longest,
                           int chunk_tokens) {
  absl::Status status = CheckIds(what, sequence.token_ids, config.vocab_size, longest);
  if (!status.ok()) return status;
  if (sequence.targets.size() != sequence.token_ids.size()) {
    return absl::InvalidArgumentError(absl::StrCat(what, " has ", sequence.token_ids.size(),
                                                   " tokens but ", sequence.targets.size(),
                                                   " targets"));
  }
  for (const int32_t target : sequence.targets) {
    if (target < -1 || target >= config.vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat(
          what, ": target ", target, " is not in the vocabulary of ", config.vocab_size));
    }
  }
  if (sequence.chunk_references.empty()) return absl::OkStatus();
  if (batch.layout == TrainingBatch::Layout::kPlain) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, " reads references, which the plain layout has not"));
  }
  const int chunks =
      std::max<int>(1, (sequence.token_ids.size() - 1 + chunk_tokens - 1) / chunk_tokens);
  if (sequence.chunk_references.size() != chunks) {
    return absl::InvalidArgumentError(absl::StrCat(what, " has ", chunks, " chunks, but ",
                                                   sequence.chunk_references.size(),
                                                   " lists of references"));
  }
  for (int c = 0; c < chunks; ++c) {
    std::vector<int> read = sequence.chunk_references[c];
    std::sort(read.begin(), read.end());
    if (!read.empty() && (read.front() < 0 || read.back() >= batch.references.size())) {
      return absl::InvalidArgumentError(
          absl::StrCat(what, ", chunk ", c, " reads a reference that is not among the batch's ",
                       batch.references.size()));
    }
    if (std::adjacent_find(read.begin(), read.end()) != read.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat(what, ", chunk ", c, " reads one reference twice"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<TrainingLayout> TrainingLayout::Create(const ModelConfig& config,
                                                      const TrainingBatch& batch) {
  const bool memory = batch.layout == TrainingBatch::Layout::kMemory;
  if (memory && !config.explicit_memory) {
    return absl::FailedPreconditionError(
        "training batch: memory layout, but the model's config.json has no explicit_memory");
  }
  if (!memory && !batch.references.empty()) {
    return absl::InvalidArgumentError("training batch: the plain layout has no references");
  }
  if (batch.tokens_kept < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("training batch: tokens_kept is ", batch.tokens_kept));
  }
  if (batch.sequences.empty()) return absl::InvalidArgumentError("training batch: no sequences");

  TrainingLayout layout;
  const ExplicitMemoryConfig m = memory ? *config.explicit_memory : ExplicitMemoryConfig{};
  const int prefix = memory ? static_cast<int>(m.prefix_token_ids.size()) : 0;
  const int start = memory ? prefix + m.reference_tokens : 0;  // position of `<s>`
  layout.prefix_tokens_ = prefix;
  layout.tokens_kept_ =
      std::min(batch.tokens_kept > 0 ? batch.tokens_kept : m.tokens_kept, m.reference_tokens);

  // The prefix stands before every other context, so that one block of it serves all: its own rows
  // see it causally, everybody else's see it whole.
  if (prefix > 0) {
    layout.AddContext(m.prefix_token_ids, /*first=*/-prefix, /*position=*/0);
    layout.segments_.push_back({{.row = 0, .rows = prefix, .first = -prefix}, {}, 0});
  }
  for (int s = 0; s < batch.sequences.size(); ++s) {
    const TrainingSequence& sequence = batch.sequences[s];
    const std::string what = absl::StrCat("training batch: sequence ", s);
    absl::Status status = CheckSequence(what, sequence, config, batch,
                                        config.max_position_embeddings - start, m.chunk_tokens);
    if (!status.ok()) return status;
    const int row = layout.rows(), tokens = static_cast<int>(sequence.token_ids.size());
    const int context = static_cast<int>(layout.contexts_.size());
    layout.AddContext(sequence.token_ids, /*first=*/0, start);
    for (int i = 0; i < tokens; ++i) {
      if (sequence.targets[i] < 0) continue;
      layout.logit_rows_.push_back(row + i);
      layout.targets_.push_back(sequence.targets[i]);
      layout.sequence_of_target_.push_back(s);
    }
    if (sequence.chunk_references.empty()) {
      layout.segments_.push_back({{.row = row, .rows = tokens, .first = 0}, {}, context});
      continue;
    }
    // `<s>` belongs to chunk 0.
    for (int c = 0; c < sequence.chunk_references.size(); ++c) {
      const int begin = c == 0 ? 0 : 1 + c * m.chunk_tokens;
      const int end = std::min(tokens, 1 + (c + 1) * m.chunk_tokens);
      layout.segments_.push_back({{.row = row + begin, .rows = end - begin, .first = begin},
                                  sequence.chunk_references[c],
                                  context});
    }
  }
  layout.rows_without_references_ = layout.rows();
  for (int r = 0; r < batch.references.size(); ++r) {
    const std::vector<int32_t>& ids = batch.references[r];
    absl::Status status = CheckIds(absl::StrCat("training batch: reference ", r), ids,
                                   config.vocab_size, m.reference_tokens);
    if (!status.ok()) return status;
    const int row = layout.rows(), tokens = static_cast<int>(ids.size());
    layout.references_.push_back({row, tokens});
    const int context = static_cast<int>(layout.contexts_.size());
    layout.AddContext(ids, /*first=*/0, /*position=*/prefix);
    layout.segments_.push_back({{.row = row, .rows = tokens, .first = 0}, {}, context});
  }
  return layout;
}

void TrainingLayout::AddContext(const std::vector<int32_t>& ids, int first, int position) {
  contexts_.push_back({rows(), static_cast<int>(ids.size()), first});
  for (const int32_t id : ids) {
    token_ids_.push_back(id);
    positions_.push_back(position++);
  }
}

BatchInput TrainingLayout::MakeInput(const ModelConfig& c, const Addresses& at,
                                     bool with_references) const {
  const int rows_wanted = with_references ? rows() : rows_without_references_;
  BatchInput input;
  input.token_ids.assign(token_ids_.begin(), token_ids_.begin() + rows_wanted);
  input.positions.assign(positions_.begin(), positions_.begin() + rows_wanted);
  input.logit_rows = logit_rows_;

  AttentionPlan& plan = input.attention;
  const int64_t head_values = int64_t{tokens_kept_} * c.head_dim;
  KvSource memory;
  memory.head_stride = head_values;
  memory.token_stride = c.head_dim;
  memory.value_offset = c.kv_heads * head_values;
  plan.sources = {LiveKvSource(c, at.qkv), memory};

  // Blocks: contexts, then memories.
  const int64_t key_column = int64_t{c.heads} * c.head_dim;
  for (const Context& context : contexts_) {
    const Tensor key = KeyOf(c, at.qkv).Rows(context.row, context.tokens);
    float* gradient = at.qkv_gradient == nullptr
                          ? nullptr
                          : at.qkv_gradient + context.row * at.qkv.stride + key_column;
    plan.blocks.push_back({kLive, key.data, gradient, context.tokens, context.first});
  }
  const int first_memory = static_cast<int>(plan.blocks.size());
  for (int r = 0; r < references_.size(); ++r) {
    const int64_t offset = r * 2 * c.kv_heads * head_values;
    plan.blocks.push_back({kMemory, at.memory + offset,
                           at.memory_gradient == nullptr ? nullptr : at.memory_gradient + offset,
                           std::min(tokens_kept_, references_[r].tokens), KvBlock::kSeenByAll});
  }

  for (const Segment& segment : segments_) {
    if (segment.rows.row >= rows_wanted) break;
    AttentionSegment s = segment.rows;
    s.block_begin = static_cast<int>(plan.block_ids.size());
    if (prefix_tokens_ > 0 && segment.context != 0) plan.block_ids.push_back(0);
    for (const int r : segment.memories) plan.block_ids.push_back(first_memory + r);
    plan.block_ids.push_back(segment.context);
    s.block_end = static_cast<int>(plan.block_ids.size());
    plan.segments.push_back(s);
  }
  return input;
}

}  // namespace memory3
