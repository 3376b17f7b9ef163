// What the trainer's benchmarks compute: a step's floating point operations, and batches of random
// tokens with and without references.
#pragma once

#include <algorithm>
#include <random>
#include <vector>

#include "transformer/config.h"
#include "transformer/training_batch.h"

namespace memory3 {

// A weight and how often a token meets it.
struct Product {
  int64_t out, in;
  int layers;
};

inline std::vector<Product> Products(const ModelConfig& c) {
  return {{int64_t{c.heads + 2 * c.kv_heads} * c.head_dim, c.hidden_size, c.layers},
          {c.hidden_size, int64_t{c.heads} * c.head_dim, c.layers},
          {int64_t{2} * c.intermediate_size, c.hidden_size, c.layers},
          {c.hidden_size, c.intermediate_size, c.layers},
          {c.vocab_size, c.hidden_size, 1}};
}

// 6 per parameter of a product and token; attention: a query meets on average half the tokens, with
// two products forward and four backward.
inline double StepOperations(const ModelConfig& c, int64_t sequences, int64_t tokens) {
  double parameters = 0;
  for (const Product& p : Products(c)) {
    parameters += static_cast<double>(p.out) * static_cast<double>(p.in) * p.layers;
  }
  const double attention =
      12.0 * c.layers * c.heads * c.head_dim * (static_cast<double>(tokens) + 1) / 2.0;
  return static_cast<double>(sequences * tokens) * (6 * parameters + attention);
}

inline TrainingBatch RandomBatch(const ModelConfig& c, int sequences, int tokens) {
  std::mt19937 generator(7);
  std::uniform_int_distribution<int32_t> id(0, c.vocab_size - 1);
  TrainingBatch batch;
  batch.sequences.resize(sequences);
  for (TrainingSequence& s : batch.sequences) {
    for (int i = 0; i < tokens; ++i) {
      s.token_ids.push_back(id(generator));
      s.targets.push_back(id(generator));
    }
  }
  return batch;
}

// Continual training: each chunk reads a reference of its own and those of the four chunks before
// it, encoded live.
inline void AddReferences(const ModelConfig& c, TrainingBatch* batch) {
  const ExplicitMemoryConfig& m = *c.explicit_memory;
  std::mt19937 generator(8);
  std::uniform_int_distribution<int32_t> id(0, c.vocab_size - 1);
  batch->layout = TrainingBatch::Layout::kMemory;
  for (TrainingSequence& s : batch->sequences) {
    const int first = static_cast<int>(batch->references.size());
    const int chunks =
        static_cast<int>(s.token_ids.size() - 1 + m.chunk_tokens - 1) / m.chunk_tokens;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      std::vector<int32_t>& reference = batch->references.emplace_back(m.reference_tokens);
      for (int32_t& token : reference) token = id(generator);
      std::vector<int>& read = s.chunk_references.emplace_back();
      for (int r = std::max(0, chunk - m.references_per_chunk + 1); r <= chunk; ++r) {
        read.push_back(first + r);
      }
    }
  }
}

}  // namespace memory3
