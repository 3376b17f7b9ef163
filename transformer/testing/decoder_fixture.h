// What the decoder's tests share: small models, contexts fed in slices, the measure of agreement.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "transformer/decoder.h"
#include "transformer/device.h"
#include "transformer/memory_writer.h"
#include "transformer/model.h"

namespace memory3 {

// Numerical agreement: max|a - b| / max|b|.
inline double Difference(std::span<const float> a, std::span<const float> b) {
  EXPECT_EQ(a.size(), b.size());
  if (a.size() != b.size() || b.empty()) return INFINITY;
  double largest = 0, difference = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    if (!std::isfinite(a[i])) return INFINITY;
    largest = std::max<double>(largest, std::abs(b[i]));
    difference = std::max<double>(difference, std::abs(double{a[i]} - b[i]));
  }
  return difference / largest;
}

inline std::unique_ptr<Device> TestDevice(const std::string& instructions = "", int threads = 1) {
  auto device = MakeCpuDevice({threads, instructions});
  EXPECT_TRUE(device.ok()) << device.status();
  return *std::move(device);
}

// The instruction sets a CPU device can be held to; one the CPU has not is lowered by the device.
inline std::vector<std::string> InstructionSets() {
  return {"generic", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"};
}

// Directory of the shared data, for tests that skip where it is absent.
inline std::filesystem::path SharedData() {
  const char* data = std::getenv("MEMORY3_DATA");
  return data != nullptr ? data : "../shared/data";
}

// Grouped-query attention, memories in every other layer, short references: every path in little
// time.
inline ModelConfig SmallConfig() {
  ModelConfig c;
  c.vocab_size = 96;
  c.hidden_size = 48;
  c.intermediate_size = 80;
  c.layers = 4;
  c.heads = 6;
  c.kv_heads = 2;
  c.head_dim = 8;
  c.max_position_embeddings = 512;
  c.bos_token_id = 1;
  c.explicit_memory.emplace();
  c.explicit_memory->memory_layers = {0, 2};
  c.explicit_memory->tokens_kept = 4;
  c.explicit_memory->reference_tokens = 32;
  c.explicit_memory->chunk_tokens = 16;
  c.explicit_memory->references_per_chunk = 3;
  c.explicit_memory->prefix_token_ids = {1, 20, 30};
  return c;
}

inline std::shared_ptr<const Model> RandomModel(Device* device, const ModelConfig& config,
                                                WeightFormat format = WeightFormat::kF32,
                                                uint64_t seed = 7) {
  // About 1/sqrt(hidden_size): activations keep their size from layer to layer, as trained ones do.
  auto model = Model::Load(device, config, RandomWeights(seed, 0.15f), format);
  EXPECT_TRUE(model.ok()) << model.status();
  return *std::move(model);
}

inline std::unique_ptr<Decoder> TestDecoder(std::shared_ptr<const Model> model,
                                            const DecoderOptions& options = {}) {
  auto decoder = Decoder::Create(std::move(model), options);
  EXPECT_TRUE(decoder.ok()) << decoder.status();
  return *std::move(decoder);
}

inline std::vector<int32_t> RandomIds(const ModelConfig& config, int count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> ids(count);
  for (int32_t& id : ids) id = 2 + random() % (config.vocab_size - 2);
  return ids;
}

inline std::vector<ExplicitMemory> WriteMemories(
    const Decoder& decoder, const std::vector<std::vector<int32_t>>& references) {
  auto writer = MemoryWriter::Create(decoder.shared_model(), {.memory = decoder.options().memory});
  EXPECT_TRUE(writer.ok()) << writer.status();
  auto memories = (*writer)->Write(references);
  EXPECT_TRUE(memories.ok()) << memories.status();
  return *std::move(memories);
}

inline void LoadMemories(Decoder& decoder, const std::vector<ExplicitMemory>& memories) {
  for (size_t i = 0; i < memories.size(); ++i) {
    const absl::Status status = decoder.pool().Load(static_cast<int>(i), memories[i]);
    EXPECT_TRUE(status.ok()) << status;
  }
}

// `reads` of a whole context, cut to tokens [begin, end).
inline std::vector<MemoryRead> CutReads(const std::vector<MemoryRead>& reads, int begin, int end) {
  std::vector<MemoryRead> cut;
  int at = 0;
  for (const MemoryRead& read : reads) {
    const int from = std::max(at, begin), to = std::min(at + read.tokens, end);
    if (from < to) cut.push_back({to - from, read.slots});
    at += read.tokens;
  }
  return cut;
}

// Feeds `ids` in slices of the given lengths (the last one repeats) and returns the logits of all
// tokens, [ids, vocab].
inline std::vector<float> Feed(Decoder& decoder, Sequence& sequence, std::span<const int32_t> ids,
                               const std::vector<MemoryRead>& reads = {},
                               std::vector<int> slices = {1 << 20}) {
  std::vector<float> all, logits;
  size_t slice_index = 0;
  for (int begin = 0; begin < static_cast<int>(ids.size());) {
    const int length = slices[std::min(slice_index++, slices.size() - 1)];
    const int end =
        std::min<int>(begin + std::min(length, decoder.options().max_logit_rows), ids.size());
    const std::vector<MemoryRead> own = CutReads(reads, begin, end);
    const Slice slice{&sequence, ids.subspan(begin, end - begin), own, end - begin};
    absl::Status status = decoder.Forward({&slice, 1});
    if (status.ok()) status = decoder.DownloadLogits(&logits);
    EXPECT_TRUE(status.ok()) << status;
    if (!status.ok()) return {};
    all.insert(all.end(), logits.begin(), logits.end());
    begin = end;
  }
  return all;
}

inline std::vector<float> FeedNew(Decoder& decoder, Layout layout, std::span<const int32_t> ids,
                                  const std::vector<MemoryRead>& reads = {},
                                  std::vector<int> slices = {1 << 20}) {
  auto sequence = decoder.Start(layout);
  EXPECT_TRUE(sequence.ok()) << sequence.status();
  return Feed(decoder, *sequence, ids, reads, std::move(slices));
}

}  // namespace memory3
