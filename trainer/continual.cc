#include "trainer/continual.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace memory3 {
namespace {

constexpr int kKeyTokens = 2, kValueTokens = 3, kPairTokens = kKeyTokens + kValueTokens;
constexpr int kFirstCopyToken = 3;  // not <unk>, <s>, </s>
constexpr int kCandidates = 8;      // of a search, to be filtered

using Pair = std::vector<int32_t>;  // key, value

int32_t RandomToken(const ModelConfig& config, Random* random) {
  return kFirstCopyToken + static_cast<int32_t>(random->Below(config.vocab_size - kFirstCopyToken));
}

// `n` starts of pairs within [first, first + length), apart, in random places; fewer where they do
// not fit.
std::vector<int> RandomPlaces(int first, int length, int n, Random* random) {
  n = std::min(n, length / kPairTokens);
  // n sorted cuts of the free tokens.
  std::vector<int> gaps(n);
  for (int& g : gaps) g = static_cast<int>(random->Below(length - n * kPairTokens + 1));
  std::sort(gaps.begin(), gaps.end());
  for (int i = 0; i < n; ++i) gaps[i] += first + i * kPairTokens;
  return gaps;
}

int ChunksOf(int tokens, int chunk) { return (tokens - 1 + chunk - 1) / chunk; }

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

std::vector<CopyQuery> AddCopyExercise(const ModelConfig& config, CopyLevel level, int tokens,
                                       Random random, TrainingBatch* batch) {
  const ExplicitMemoryConfig& memory = *config.explicit_memory;
  TrainingSequence s;
  std::vector<int32_t> text(tokens);  // one more than needed: the last is a target only
  text.push_back(0);
  for (int32_t& t : text) t = RandomToken(config, &random);
  text[0] = config.bos_token_id;
  s.targets.assign(tokens, -1);
  std::vector<CopyQuery> queries;
  const auto pair = [&] {
    Pair p(kPairTokens);
    for (int32_t& t : p) t = RandomToken(config, &random);
    return p;
  };
  const auto ask = [&](const std::vector<Pair>& pairs, int first, int length) {
    for (const int at : RandomPlaces(first, length, std::max(1, length / 12), &random)) {
      const Pair& p = pairs[random.Below(pairs.size())];
      std::copy(p.begin(), p.end(), text.begin() + at);
      for (int i = 0; i < kValueTokens; ++i) {
        s.targets[at + kKeyTokens - 1 + i] = p[kKeyTokens + i];
      }
      queries.push_back({at + kKeyTokens - 1, kValueTokens});
    }
  };
  if (level == CopyLevel::kContext) {
    // The pairs stand in a first part of random length.
    const int part = tokens / 4 + static_cast<int>(random.Below(tokens / 4));
    std::vector<Pair> pairs;
    for (const int at : RandomPlaces(1, part, std::max(1, part / 16), &random)) {
      pairs.push_back(pair());
      std::copy(pairs.back().begin(), pairs.back().end(), text.begin() + at);
    }
    ask(pairs, part + 1, tokens - part - 1);
  } else {
    const int references = level == CopyLevel::kOneMemory ? 1 : memory.references_per_chunk;
    for (int c = 0; c < ChunksOf(tokens, memory.chunk_tokens); ++c) {
      std::vector<Pair> pairs;
      std::vector<int>& reads = s.chunk_references.emplace_back();
      for (int r = 0; r < references; ++r) {
        const int length = std::max(
            kPairTokens, memory.reference_tokens / 4 +
                             static_cast<int>(random.Below(memory.reference_tokens -
                                                           memory.reference_tokens / 4 + 1)));
        std::vector<int32_t> reference(std::min(length, memory.reference_tokens));
        for (int32_t& t : reference) t = RandomToken(config, &random);
        for (const int at : RandomPlaces(0, static_cast<int>(reference.size()), 2, &random)) {
          pairs.push_back(pair());
          std::copy(pairs.back().begin(), pairs.back().end(), reference.begin() + at);
        }
        reads.push_back(static_cast<int>(batch->references.size()));
        batch->references.push_back(std::move(reference));
      }
      const int first = 1 + c * memory.chunk_tokens;
      ask(pairs, first, std::min(memory.chunk_tokens, tokens - first));
    }
  }
  text.resize(tokens);
  s.token_ids = std::move(text);
  batch->sequences.push_back(std::move(s));
  return queries;
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

absl::StatusOr<TrainingBatch> ContinualBatches::Make(int64_t number) {
  const int64_t step = number / options_.accumulate;
  TrainingBatch batch;
  batch.layout = TrainingBatch::Layout::kMemory;
  batch.tokens_kept = options_.kept.At(step);
  batch.gradient_through_writing = options_.gradient_through_writing;
  // The first sequences are text, so that windows and sequences go together.
  const int copies = static_cast<int>(std::lround(options_.copy * options_.sequences));
  const int texts = options_.sequences - copies;
  std::vector<Window> windows;
  for (int i = 0; i < texts; ++i) {
    windows.push_back(order_.At(number * texts + i));
    batch.sequences.push_back(
        SequenceOf(*corpus_, windows.back(), options_.tokens, tokenizer_->bos_id()));
  }
  absl::Status status = AttachReferences(*config_, *tokenizer_, *corpus_, *index_, windows,
                                         options_.retrieval, options_.seed, &batch);
  if (!status.ok()) return status;
  const int top = options_.level.At(step);
  for (int i = 0; i < copies; ++i) {
    // The level reached, and now and then an easier one, so that it is not lost.
    Random random({options_.seed, static_cast<uint64_t>(number), static_cast<uint64_t>(i), 0xc0b1});
    const auto level =
        static_cast<CopyLevel>(random.Below(4) == 0 ? random.Below(top + 1) : uint64_t(top));
    AddCopyExercise(*config_, level, options_.tokens, Random({random.Next()}), &batch);
  }
  return batch;
}

}  // namespace memory3
