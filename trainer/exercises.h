// Reading exercises: sequences whose text can only be foretold by looking something up, in the
// context or in memories. Nothing but content tells where: places, distances and offsets are drawn
// at random (a fixed distance is learned as a positional shortcut and carries over to nothing).
//
// Thread-safety: pure functions.
#pragma once

#include <cstdint>
#include <vector>

#include "trainer/corpus.h"
#include "trainer/random.h"
#include "transformer/config.h"
#include "transformer/training_batch.h"

namespace memory3 {

// Where what is looked up stands.
enum class CopyLevel : uint8_t { kContext = 0, kOneMemory = 1, kFiveMemories = 2 };

const char* CopyLevelName(CopyLevel level);  // "copy_context", …

struct CopyQuery {
  int key_end = 0;  // index into token_ids of the last key token
  int tokens = 0;   // of the value
};

// Pairs of random tokens, key (2) and value (3), among random tokens: in the first part of the
// sequence, or in the references of each chunk. Later the keys come again, in random order and
// places, and the loss is on the values that follow. The sequence gets `tokens` tokens; it and its
// references are appended to `batch`.
std::vector<CopyQuery> AddPairExercise(const ModelConfig& config, CopyLevel level, int tokens,
                                       Random random, TrainingBatch* batch);

// Passages, and then runs of 4 … 40 tokens of them from random offsets, one after the other; the
// loss is on the runs but for their first tokens (one of random tokens, two of text), which nothing
// foretells. kContext: the passage stands in the first part of the sequence. Memories: every chunk
// reads a passage of its own, at kFiveMemories beside others of the batch, where it has them.
// `corpus`: where passages come from; null: of random tokens.
void AddRunExercise(const ModelConfig& config, CopyLevel level, const TokenCorpus* corpus,
                    int tokens, Random random, TrainingBatch* batch);

// `tokens` tokens of a random place of the corpus, within one shard.
std::vector<int32_t> RandomPassage(const TokenCorpus& corpus, int tokens, Random* random);

// One exercise: of eight, one pairs, two runs of random tokens, five runs of text. Three in four
// are at level `top`, the others below or at it, so that nothing is unlearned. Returns the level.
CopyLevel AddExercise(const ModelConfig& config, CopyLevel top, const TokenCorpus& corpus,
                      int tokens, Random random, TrainingBatch* batch);

}  // namespace memory3
