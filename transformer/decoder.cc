#include "transformer/decoder.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"

namespace memory3 {
namespace {

// The key/value sources of every plan the decoder makes, in the order of the softmax.
enum Source : int { kPrefix = 0, kMemory = 1, kContext = 2, kSources = 3 };

}  // namespace

absl::StatusOr<std::unique_ptr<Decoder>> Decoder::Create(std::shared_ptr<const Model> model,
                                                         const DecoderOptions& options) {
  const ModelConfig& c = model->config();
  Device& device = model->device();
  if (options.max_rows < 1)
    return absl::InvalidArgumentError(absl::StrCat("max_rows is ", options.max_rows));
  if (options.max_logit_rows < 1) {
    return absl::InvalidArgumentError(absl::StrCat("max_logit_rows is ", options.max_logit_rows));
  }
  std::unique_ptr<Decoder> decoder(new Decoder);
  // A graph holds the pointers of the decoder it was recorded for, so no two may share a key.
  static std::atomic<uint64_t> decoders{0};
  decoder->graph_keys_ = ++decoders << 40;
  decoder->model_ = std::move(model);
  decoder->options_ = options;
  DecoderOptions& o = decoder->options_;
  o.max_logit_rows = std::min(o.max_logit_rows, o.max_rows);
  if (!o.memory) o.memory = c.explicit_memory;

  absl::StatusOr<std::unique_ptr<KvCache>> cache =
      KvCache::Create(&device, c, o.kv_dtype, o.kv_pages);
  if (!cache.ok()) return cache.status();
  decoder->cache_ = *std::move(cache);
  if (o.memory) {
    if (absl::Status status = CheckExplicitMemory(c, *o.memory); !status.ok()) return status;
    auto prefix = PrefixKv::Create(*decoder->model_, o.memory->prefix_token_ids, o.kv_dtype);
    if (!prefix.ok()) return prefix.status();
    decoder->prefix_ = *std::move(prefix);
    auto pool = MemoryPool::Create(&device, c, *o.memory, o.memory_dtype, o.memory_slots);
    if (!pool.ok()) return pool.status();
    decoder->pool_ = *std::move(pool);
  }

  for (int layer = 0; layer < c.layers; ++layer) {
    int memory_layer = -1;  // other layers do not read memories
    if (o.memory) {
      const std::vector<int>& all = o.memory->memory_layers;
      const auto it = std::find(all.begin(), all.end(), layer);
      if (it != all.end()) memory_layer = static_cast<int>(it - all.begin());
    }
    decoder->source_layers_.push_back({layer, memory_layer, layer});
  }

  absl::StatusOr<ActivationBuffers> activations =
      ActivationBuffers::Create(*decoder->model_, o.max_rows);
  if (!activations.ok()) return activations.status();
  decoder->activations_ = *std::move(activations);
  auto allocate = [&](Tensor* t, int64_t cols, DType dtype) -> absl::Status {
    absl::StatusOr<Buffer> buffer =
        device.Allocate(size_t(o.max_logit_rows) * cols * SizeOf(dtype));
    if (!buffer.ok()) return buffer.status();
    *t = {buffer->data(), dtype, o.max_logit_rows, cols, cols};
    decoder->storage_.push_back(*std::move(buffer));
    return absl::OkStatus();
  };
  absl::Status status = allocate(&decoder->logit_in_, c.hidden_size, DType::kF32);
  status.Update(allocate(&decoder->logit_norm_, c.hidden_size, device.activation_dtype()));
  status.Update(allocate(&decoder->logits_, c.vocab_size, DType::kF32));
  if (!status.ok()) return status;
  absl::StatusOr<Buffer> argmax = device.Allocate(size_t(o.max_logit_rows) * sizeof(int32_t));
  if (!argmax.ok()) return argmax.status();
  decoder->argmax_ = *std::move(argmax);
  return decoder;
}

int Decoder::max_context(Layout layout) const {
  return config().max_position_embeddings - Position(layout, 0);
}

int Decoder::Position(Layout layout, int context_index) const {
  if (layout == Layout::kPlain) return context_index;
  return prefix_->tokens() + memory()->reference_tokens + context_index;
}

absl::StatusOr<Sequence> Decoder::Start(Layout layout) const { return Start(layout, {}); }

absl::StatusOr<Sequence> Decoder::Start(Layout layout, std::vector<KvPage> full_pages) const {
  if (layout == Layout::kMemory && memory() == nullptr) {
    return absl::InvalidArgumentError("memory layout: the model has no explicit_memory geometry");
  }
  for (const KvPage& page : full_pages) {
    if (page.cache() != cache_.get())
      return absl::InvalidArgumentError("a page of another KV cache");
  }
  Sequence sequence;
  sequence.layout_ = layout;
  sequence.length_ = static_cast<int>(full_pages.size()) * kKvPageTokens;
  sequence.pages_ = std::move(full_pages);
  return sequence;
}

int Decoder::PagesNeeded(const Sequence& sequence, int tokens) {
  const int pages = (sequence.length_ + tokens + kKvPageTokens - 1) / kKvPageTokens;
  return pages - static_cast<int>(sequence.pages_.size());
}

absl::Status Decoder::CheckSlice(const Slice& slice) const {
  const Sequence& sequence = *slice.sequence;
  const int tokens = static_cast<int>(slice.tokens.size());
  if (tokens == 0) return absl::InvalidArgumentError("a slice has no tokens");
  for (int i = 0; i < tokens; ++i) {
    if (slice.tokens[i] < 0 || slice.tokens[i] >= config().vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat("token_ids[", i, "] is ", slice.tokens[i],
                                                     ", not in the vocabulary of ",
                                                     config().vocab_size));
    }
  }
  const int longest = max_context(sequence.layout());
  if (sequence.length() + tokens > longest) {
    return absl::OutOfRangeError(
        absl::StrCat("a context of ", sequence.length() + tokens,
                     " tokens with <s>, the longest this model takes in this layout is ", longest));
  }
  if (slice.logit_rows < 0 || slice.logit_rows > tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("logit_rows is ", slice.logit_rows, " of ", tokens, " tokens"));
  }
  if (slice.reads.empty()) return absl::OkStatus();
  int read_tokens = 0;
  for (const MemoryRead& read : slice.reads) {
    if (read.tokens < 1)
      return absl::InvalidArgumentError(absl::StrCat("reads: a run of ", read.tokens, " tokens"));
    read_tokens += read.tokens;
    if (!read.slots.empty() && sequence.layout() == Layout::kPlain) {
      return absl::InvalidArgumentError(
          "reads: a sequence in the plain layout cannot read memories");
    }
    absl::flat_hash_set<int> seen;
    for (int slot : read.slots) {
      if (slot < 0 || slot >= pool_->slots()) {
        return absl::InvalidArgumentError(
            absl::StrCat("reads: slot ", slot, " of ", pool_->slots()));
      }
      if (!seen.insert(slot).second) {
        return absl::InvalidArgumentError(absl::StrCat("reads: slot ", slot, " twice in one run"));
      }
      if (pool_->tokens(slot) == 0) {
        return absl::FailedPreconditionError(
            absl::StrCat("reads: slot ", slot, " holds no memory"));
      }
    }
  }
  if (read_tokens != tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("reads cover ", read_tokens, " tokens of a slice of ", tokens));
  }
  return absl::OkStatus();
}

BatchInput Decoder::MakeBatch(std::span<const Slice> slices) const {
  BatchInput input;
  AttentionPlan& plan = input.attention;
  const KvSource& context_source = cache_->source();
  plan.sources.resize(kSources);
  plan.sources[kContext] = context_source;
  input.destination_source = kContext;
  int prefix_block = -1;
  if (prefix_ != nullptr) {
    plan.sources[kPrefix] = prefix_->source();
    plan.sources[kMemory] = pool_->source();
    prefix_block = static_cast<int>(plan.blocks.size());
    plan.blocks.push_back(prefix_->Block(kPrefix));
  }
  absl::flat_hash_map<int, int>
      memory_blocks;  // by slot: a memory that many rows read is one block
  const auto memory_block = [&](int slot) {
    const auto [it, is_new] = memory_blocks.try_emplace(slot, static_cast<int>(plan.blocks.size()));
    if (is_new)
      plan.blocks.push_back(
          {kMemory, pool_->data(slot), nullptr, pool_->tokens(slot), KvBlock::kSeenByAll});
    return it->second;
  };

  for (const Slice& slice : slices) {
    const Sequence& sequence = *slice.sequence;
    const int first_row = static_cast<int>(input.token_ids.size());
    const int tokens = static_cast<int>(slice.tokens.size());
    const int begin = sequence.length(), end = begin + tokens;
    for (int i = begin; i < end; ++i) {
      input.token_ids.push_back(slice.tokens[i - begin]);
      input.positions.push_back(Position(sequence.layout(), i));
      input.destination.push_back(static_cast<char*>(sequence.pages()[i / kKvPageTokens].data()) +
                                  (i % kKvPageTokens) * context_source.token_stride *
                                      SizeOf(context_source.dtype));
    }
    for (int i = tokens - slice.logit_rows; i < tokens; ++i)
      input.logit_rows.push_back(first_row + i);

    const int first_page_block = static_cast<int>(plan.blocks.size());
    for (int i = 0; i * kKvPageTokens < end; ++i) {
      plan.blocks.push_back({kContext, sequence.pages()[i].data(), nullptr,
                             std::min(kKvPageTokens, end - i * kKvPageTokens), i * kKvPageTokens});
    }

    const MemoryRead no_memories{tokens, {}};
    const std::span<const MemoryRead> runs =
        slice.reads.empty() ? std::span(&no_memories, 1) : slice.reads;
    int done = 0;
    for (const MemoryRead& run : runs) {
      AttentionSegment segment;
      segment.row = first_row + done;
      segment.rows = run.tokens;
      segment.first = begin + done;
      segment.block_begin = static_cast<int>(plan.block_ids.size());
      if (sequence.layout() == Layout::kMemory) plan.block_ids.push_back(prefix_block);
      std::vector<int> slots = run.slots;
      std::sort(slots.begin(), slots.end(), [&](int a, int b) {
        return std::pair(pool_->order(a), a) < std::pair(pool_->order(b), b);
      });
      for (int slot : slots) plan.block_ids.push_back(memory_block(slot));
      for (int i = 0; i * kKvPageTokens < segment.first + segment.rows; ++i) {
        plan.block_ids.push_back(first_page_block + i);
      }
      segment.block_end = static_cast<int>(plan.block_ids.size());
      plan.segments.push_back(segment);
      done += run.tokens;
    }
  }
  return input;
}

void Decoder::RunModel(const PreparedBatch& batch, const LayerActivations& a,
                       const Tensor& logit_in, const Tensor& logit_norm, const Tensor& logits) {
  Device& device = model_->device();
  const ModelWeights& w = model_->weights();
  device.Embed(a.x, batch, w.embedding);
  for (int layer = 0; layer < config().layers; ++layer) {
    BlockForward(*model_, layer, batch, {source_layers_[layer], layer}, a);
  }
  if (logits.rows == 0) return;
  device.GatherRows(logit_in, a.x, batch);
  device.RmsNorm(logit_norm, logit_in, w.final_norm, config().rms_norm_eps, nullptr);
  device.MatMul(logits, logit_norm, *w.lm_head, /*accumulate=*/false);
}

absl::Status Decoder::Forward(std::span<const Slice> slices) {
  int64_t rows = 0, logit_rows = 0;
  int pages = 0;
  bool all_decode = true;
  absl::flat_hash_set<const Sequence*> sequences;
  for (const Slice& slice : slices) {
    if (absl::Status status = CheckSlice(slice); !status.ok()) return status;
    if (!sequences.insert(slice.sequence).second) {
      return absl::InvalidArgumentError("two slices of one sequence in one Forward");
    }
    rows += slice.tokens.size();
    logit_rows += slice.logit_rows;
    pages += PagesNeeded(*slice.sequence, static_cast<int>(slice.tokens.size()));
    all_decode = all_decode && slice.tokens.size() == 1;
  }
  if (rows < 1 || rows > options_.max_rows) {
    return absl::InvalidArgumentError(
        absl::StrCat("a batch of ", rows, " rows, max_rows is ", options_.max_rows));
  }
  if (logit_rows > options_.max_logit_rows) {
    return absl::InvalidArgumentError(absl::StrCat("logits of ", logit_rows,
                                                   " rows are asked for, max_logit_rows is ",
                                                   options_.max_logit_rows));
  }
  if (pages > cache_->free_pages()) {
    return absl::ResourceExhaustedError(absl::StrCat("KV cache: ", pages, " pages are needed, ",
                                                     cache_->free_pages(), " are free"));
  }
  for (const Slice& slice : slices) {
    for (int i = PagesNeeded(*slice.sequence, static_cast<int>(slice.tokens.size())); i > 0; --i) {
      absl::StatusOr<KvPage> page = cache_->Allocate();
      if (!page.ok()) return page.status();
      slice.sequence->pages_.push_back(*std::move(page));
    }
  }

  Device& device = model_->device();
  const PreparedBatch* batch = device.Prepare(MakeBatch(slices), /*slot=*/0);
  logit_rows_ = static_cast<int>(logit_rows);
  const LayerActivations a = activations_->View(static_cast<int>(rows));
  const Tensor logit_in = logit_in_.Rows(0, logit_rows),
               logit_norm = logit_norm_.Rows(0, logit_rows);
  // A batch of decode steps comes again and again in the same shape, so it is worth a graph.
  const uint64_t key =
      all_decode ? graph_keys_ + rows * (options_.max_logit_rows + 1) + logit_rows : 0;
  device.Run(key, [&] { RunModel(*batch, a, logit_in, logit_norm, logits()); });
  for (const Slice& slice : slices)
    slice.sequence->length_ += static_cast<int>(slice.tokens.size());
  return absl::OkStatus();
}

absl::Status Decoder::DownloadLogits(std::vector<float>* out) const {
  out->resize(int64_t{logit_rows_} * config().vocab_size);
  return model_->device().Download(out->data(), logits_.data, out->size() * sizeof(float));
}

absl::StatusOr<std::vector<int32_t>> Decoder::ArgMax() {
  std::vector<int32_t> ids(logit_rows_);
  if (ids.empty()) return ids;
  model_->device().ArgMax(argmax_.as<int32_t>(), logits());
  absl::Status status =
      model_->device().Download(ids.data(), argmax_.data(), ids.size() * sizeof(int32_t));
  if (!status.ok()) return status;
  return ids;
}

}  // namespace memory3
