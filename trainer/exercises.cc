#include "trainer/exercises.h"

#include <algorithm>
#include <set>

namespace memory3 {
namespace {

constexpr int kKeyTokens = 2, kValueTokens = 3, kPairTokens = kKeyTokens + kValueTokens;
constexpr int kFirstCopyToken = 3;  // not <unk>, <s>, </s>

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

constexpr int kLeastRun = 4, kLongestRun = 40;

int ChunksOf(int tokens, int chunk) { return (tokens - 1 + chunk - 1) / chunk; }

std::vector<int32_t> Passage(const ModelConfig& config, const TokenCorpus* corpus, int tokens,
                             Random* random) {
  if (corpus != nullptr) return RandomPassage(*corpus, tokens, random);
  std::vector<int32_t> ids(tokens);
  for (int32_t& t : ids) t = RandomToken(config, random);
  return ids;
}

int PassageLength(const ExplicitMemoryConfig& memory, Random* random) {
  const int least = std::max(kLeastRun, memory.reference_tokens / 4);
  return least + static_cast<int>(random->Below(std::max(1, memory.reference_tokens - least + 1)));
}

// Fills text [first, end) with runs of the passages; targets[i] is the token after text[i].
void FillWithRuns(const std::vector<std::vector<int32_t>>& passages, int first, int end,
                  int unforeseen, Random* random, TrainingSequence* s) {
  for (int at = first; at < end;) {
    const std::vector<int32_t>& from = passages[random->Below(passages.size())];
    const int begin = static_cast<int>(random->Below(from.size() - kLeastRun + 1));
    const int longest = std::min<int>(kLongestRun, static_cast<int>(from.size()) - begin);
    const int run = kLeastRun + static_cast<int>(random->Below(longest - kLeastRun + 1));
    for (int i = 0; i < run && at < end; ++i, ++at) {
      s->token_ids[at] = from[begin + i];
      if (i >= unforeseen) s->targets[at - 1] = from[begin + i];
    }
  }
}

}  // namespace

const char* CopyLevelName(CopyLevel level) {
  switch (level) {
    case CopyLevel::kContext:
      return "copy_context";
    case CopyLevel::kOneMemory:
      return "copy_one_memory";
    case CopyLevel::kFiveMemories:
      return "copy_five_memories";
  }
  return "";
}

std::vector<CopyQuery> AddPairExercise(const ModelConfig& config, CopyLevel level, int tokens,
                                       Random random, TrainingBatch* batch) {
  const ExplicitMemoryConfig memory = config.explicit_memory.value_or(ExplicitMemoryConfig{});
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

void AddRunExercise(const ModelConfig& config, CopyLevel level, const TokenCorpus* corpus,
                    int tokens, Random random, TrainingBatch* batch) {
  const ExplicitMemoryConfig memory = config.explicit_memory.value_or(ExplicitMemoryConfig{});
  const int unforeseen = corpus == nullptr && level != CopyLevel::kFiveMemories ? 1 : 2;
  TrainingSequence s;
  s.token_ids.assign(tokens, config.bos_token_id);
  s.targets.assign(tokens, -1);
  if (level == CopyLevel::kContext) {
    const int part = std::max(
        kLeastRun, tokens / 8 + static_cast<int>(random.Below(std::max(1, tokens * 3 / 8))));
    const std::vector<int32_t> passage = Passage(config, corpus, part, &random);
    for (int i = 0; i < part && i + 1 < tokens; ++i) {
      s.token_ids[i + 1] = passage[i];
      if (corpus != nullptr) s.targets[i] = passage[i];  // text can be foretold in part
    }
    if (part + 1 < tokens) FillWithRuns({passage}, part + 1, tokens, unforeseen, &random, &s);
  } else {
    const size_t references = level == CopyLevel::kOneMemory ? 1 : memory.references_per_chunk;
    for (int c = 0; c < ChunksOf(tokens, memory.chunk_tokens); ++c) {
      std::vector<int>& reads = s.chunk_references.emplace_back();
      // Encoding is most of the cost, so all but one are others' where the batch has enough.
      if (batch->references.size() >= references) {
        std::set<int> others;
        while (others.size() + 1 < references) {
          others.insert(static_cast<int>(random.Below(batch->references.size())));
        }
        reads.assign(others.begin(), others.end());
      }
      while (reads.size() < references) {
        reads.push_back(static_cast<int>(batch->references.size()));
        batch->references.push_back(
            Passage(config, corpus, PassageLength(memory, &random), &random));
      }
      std::vector<std::vector<int32_t>> passages;
      for (const int r : reads) {
        if (batch->references[r].size() >= kLeastRun) passages.push_back(batch->references[r]);
      }
      const int first = 1 + c * memory.chunk_tokens;
      FillWithRuns(passages, first, std::min(tokens, first + memory.chunk_tokens), unforeseen,
                   &random, &s);
    }
  }
  batch->sequences.push_back(std::move(s));
}

std::vector<int32_t> RandomPassage(const TokenCorpus& corpus, int tokens, Random* random) {
  // A shard by its share of the tokens; one that is too short gives way to the next.
  uint64_t at = random->Below(corpus.tokens());
  const auto& shards = corpus.shards();
  size_t s = 0;
  while (at >= shards[s]->tokens()) at -= shards[s++]->tokens();
  for (size_t i = 0; i < shards.size() && shards[s]->tokens() < uint64_t(tokens); ++i) {
    s = (s + 1) % shards.size();
  }
  const uint64_t n = std::min<uint64_t>(tokens, shards[s]->tokens());
  std::vector<int32_t> ids(n);
  shards[s]->Copy(std::min(at, shards[s]->tokens() - n), ids);
  return ids;
}

CopyLevel AddExercise(const ModelConfig& config, CopyLevel top, const TokenCorpus& corpus,
                      int tokens, Random random, TrainingBatch* batch) {
  const uint64_t highest = static_cast<uint64_t>(top);
  const auto level =
      static_cast<CopyLevel>(random.Below(4) == 0 ? random.Below(highest + 1) : highest);
  const uint64_t kind = random.Below(8);
  const Random rest({random.Next()});
  if (kind == 0) {
    AddPairExercise(config, level, tokens, rest, batch);
  } else {
    AddRunExercise(config, level, kind <= 2 ? nullptr : &corpus, tokens, rest, batch);
  }
  return level;
}

}  // namespace memory3
