#include "trainer/copy_evaluation.h"

#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "transformer/decoder.h"
#include "transformer/generate.h"
#include "transformer/memory_writer.h"

namespace memory3 {

absl::StatusOr<double> CopyExactMatch(const Parameters& parameters, CopyLevel level,
                                      int tokens_kept, int exercises, uint64_t seed) {
  const std::shared_ptr<const Model> model(&parameters.model(), [](const Model*) {});
  const ModelConfig& config = model->config();
  ExplicitMemoryConfig memory = *config.explicit_memory;
  memory.tokens_kept = tokens_kept;
  const int tokens = memory.chunk_tokens + 1;
  DecoderOptions options;
  options.memory = memory;
  options.max_rows = 256;
  options.max_logit_rows = 256;
  options.kv_pages = 64;
  options.memory_slots = memory.references_per_chunk;
  auto decoder = Decoder::Create(model, options);
  if (!decoder.ok()) return decoder.status();
  auto writer = MemoryWriter::Create(model, {.memory = memory}, (*decoder)->prefix());
  if (!writer.ok()) return writer.status();
  int right = 0, asked = 0;
  for (uint64_t e = 0; asked < exercises; ++e) {
    TrainingBatch batch;
    const std::vector<CopyQuery> queries =
        AddPairExercise(config, level, tokens, Random({seed, e}), &batch);
    std::vector<RetrievedMemory> memories;
    if (!batch.references.empty()) {
      auto written = (*writer)->Write(batch.references);
      if (!written.ok()) return written.status();
      for (size_t i = 0; i < written->size(); ++i) {
        memories.push_back(
            {absl::StrCat(i), std::make_shared<const ExplicitMemory>(std::move((*written)[i]))});
      }
    }
    const RetrieveFunction retrieve =
        [&](std::span<const int32_t>) -> absl::StatusOr<std::vector<RetrievedMemory>> {
      return memories;
    };
    const std::span<const int32_t> ids = batch.sequences[0].token_ids;
    // The last value may end with a token that is a target only.
    const CopyQuery& query = queries[Random({seed, e, 1}).Below(queries.size())];
    std::vector<int32_t> value;
    value.reserve(query.tokens);
    for (int i = 0; i < query.tokens; ++i) {
      value.push_back(batch.sequences[0].targets[query.key_end + i]);
    }
    auto score = ScoreContinuation(**decoder, ids.subspan(0, query.key_end + 1), value, retrieve,
                                   {.layout = Layout::kMemory});
    if (!score.ok()) return score.status();
    bool all = true;
    for (const bool greedy : score->is_greedy) all = all && greedy;
    right += all;
    asked += 1;
  }
  return static_cast<double>(right) / asked;
}

}  // namespace memory3
