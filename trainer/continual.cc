#include "trainer/continual.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace memory3 {
namespace {

constexpr int kCandidates = 8;  // of a search, to be filtered

int ChunksOf(int tokens, int chunk) { return (tokens - 1 + chunk - 1) / chunk; }

int Copies(double part, int sequences) { return static_cast<int>(std::lround(part * sequences)); }

Random ExerciseRandom(uint64_t seed, int64_t number, int i) {
  return Random({seed, static_cast<uint64_t>(number), static_cast<uint64_t>(i), 0xc0b1});
}

}  // namespace

absl::StatusOr<StepSchedule> StepSchedule::Parse(const std::string& text, const std::string& flag,
                                                 int least, int most) {
  StepSchedule schedule;
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    const std::vector<std::string> fields = absl::StrSplit(part, '@');
    int value = 0;
    int64_t step = 0;
    if (fields.size() != 2 || !absl::SimpleAtoi(fields[0], &value) ||
        !absl::SimpleAtoi(fields[1], &step) || value < least || value > most ||
        (schedule.steps_.empty() ? step != 0 : step <= schedule.steps_.back().first)) {
      return absl::InvalidArgumentError(absl::StrCat(
          flag, ": \"", text, "\" is not VALUE@STEP,… with the first step 0, ascending steps and ",
          "values from ", least, " to ", most));
    }
    schedule.steps_.emplace_back(step, value);
  }
  return schedule;
}

int StepSchedule::At(int64_t step) const {
  int value = steps_.front().second;
  for (const auto& [first, v] : steps_) {
    if (step >= first) value = v;
  }
  return value;
}

absl::Status AttachReferences(const ModelConfig& config, const Tokenizer& tokenizer,
                              const TokenCorpus& corpus, const ReferenceIndex& index,
                              const std::vector<Window>& windows, const RetrievalOptions& options,
                              uint64_t seed, TrainingBatch* batch) {
  const ExplicitMemoryConfig& memory = *config.explicit_memory;
  const int chunk_tokens = memory.chunk_tokens;
  const int own = options.share_previous ? 1 : memory.references_per_chunk;
  for (size_t w = 0; w < windows.size(); ++w) {
    TrainingSequence& s = batch->sequences[w];
    const int tokens = static_cast<int>(s.token_ids.size());
    const TokenShard& shard = *corpus.shards()[windows[w].shard];
    const int chunks = ChunksOf(tokens, chunk_tokens);
    std::vector<std::string> queries(chunks);
    for (int c = 0; c < chunks; ++c) {
      const int from = options.own_chunk_query ? c : c - 1;
      if (from < 0) continue;
      const int first = 1 + from * chunk_tokens;
      queries[c] = tokenizer.DecodeQuery(
          std::span(s.token_ids).subspan(first, std::min(chunk_tokens, tokens - first)));
    }
    absl::StatusOr<std::vector<std::vector<int>>> found = index.Search(queries, own + kCandidates);
    if (!found.ok()) return found.status();
    std::set<std::string> left_out;
    if (options.leave_out_document) {
      const uint64_t last = shard.DocumentOf(windows[w].first + tokens - 1);
      for (uint64_t d = shard.DocumentOf(windows[w].first); d <= last; ++d) {
        left_out.insert(std::string(shard.document(d).id));
      }
    }
    std::vector<std::vector<int>> chunk_own(chunks);
    std::set<int> taken;  // a sequence's chunks that share get different references
    for (int c = 0; c < chunks; ++c) {
      Random random({seed, static_cast<uint64_t>(windows[w].shard), windows[w].first,
                     static_cast<uint64_t>(c)});
      const auto add = [&](std::vector<int32_t> ids) {
        if (options.overlap_limit < 1 && Overlap(ids, s.targets) > options.overlap_limit) return;
        chunk_own[c].push_back(static_cast<int>(batch->references.size()));
        batch->references.push_back(std::move(ids));
      };
      if (options.same_document > 0 && random.Unit() < options.same_document) {
        const uint64_t at = windows[w].first + std::min(tokens - 1, c * chunk_tokens);
        std::vector<int32_t> ids =
            index.FromSameDocument(corpus, windows[w], tokens, at, random.Next());
        if (!ids.empty()) add(std::move(ids));
      }
      for (const int r : (*found)[c]) {
        if (static_cast<int>(chunk_own[c].size()) >= own) break;
        if (options.share_previous && taken.contains(r)) continue;
        if (left_out.contains(std::string(index.DocumentId(r)))) continue;
        const size_t before = chunk_own[c].size();
        add(index.Tokens(r));
        if (chunk_own[c].size() > before) taken.insert(r);
      }
    }
    s.chunk_references.resize(chunks);
    for (int c = 0; c < chunks; ++c) {
      const int first =
          options.share_previous ? std::max(0, c - memory.references_per_chunk + 1) : c;
      for (int from = first; from <= c; ++from) {
        s.chunk_references[c].insert(s.chunk_references[c].end(), chunk_own[from].begin(),
                                     chunk_own[from].end());
      }
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<TrainingBatch> WarmupBatches::Make(int64_t number) {
  TrainingBatch batch;
  const int copies = Copies(options_.copy, options_.sequences);
  const int texts = options_.sequences - copies;
  for (int i = 0; i < texts; ++i) {
    batch.sequences.push_back(SequenceOf(*corpus_, order_.At(number * texts + i), options_.tokens,
                                         config_->bos_token_id));
  }
  for (int i = 0; i < copies; ++i) {
    AddExercise(*config_, CopyLevel::kContext, *corpus_, options_.tokens,
                ExerciseRandom(options_.seed, number, i), &batch);
  }
  return batch;
}

std::vector<std::string> WarmupBatches::Kinds() const {
  const int copies = Copies(options_.copy, options_.sequences);
  if (copies == 0) return {};
  std::vector<std::string> kinds(options_.sequences - copies, "text");
  kinds.resize(options_.sequences, "copy_context");
  return kinds;
}

absl::StatusOr<TrainingBatch> ContinualBatches::Make(int64_t number) {
  const int64_t step = number / options_.accumulate;
  TrainingBatch batch;
  batch.layout = TrainingBatch::Layout::kMemory;
  batch.tokens_kept = options_.kept.At(step);
  batch.gradient_through_writing = options_.gradient_through_writing;
  // The first sequences are text, so that windows and sequences go together.
  const int copies = Copies(options_.copy, options_.sequences);
  const int texts = options_.sequences - copies;
  std::vector<Window> windows;
  for (int i = 0; i < texts; ++i) {
    windows.push_back(order_.At(number * texts + i));
    batch.sequences.push_back(
        SequenceOf(*corpus_, windows.back(), options_.tokens, tokenizer_->bos_id()));
  }
  windows.resize(std::lround(options_.retrieve * texts));
  RetrievalOptions retrieval = options_.retrieval;
  if (Random({options_.seed, static_cast<uint64_t>(number), 0x93e7}).Unit() <
      options_.previous_query) {
    retrieval.own_chunk_query = false;
  }
  absl::Status status = AttachReferences(*config_, *tokenizer_, *corpus_, *index_, windows,
                                         retrieval, options_.seed, &batch);
  if (!status.ok()) return status;
  kinds_.assign(windows.size(), "text_with_references");
  kinds_.resize(texts, "text");
  const int top = options_.level.At(step);
  for (int i = 0; i < copies; ++i) {
    const CopyLevel level =
        AddExercise(*config_, static_cast<CopyLevel>(top), *corpus_, options_.tokens,
                    ExerciseRandom(options_.seed, number, i), &batch);
    kinds_.push_back(CopyLevelName(level));
  }
  return batch;
}

}  // namespace memory3
