// The offline loops: generation and scoring of one sequence with memories on the grid of retrievals
// (chunk_grid.h). The inference server's streams must equal these token for token, and the
// trainer's evaluation runs on them.
//
// Thread-safety: the decoder's thread. They load retrieved memories into the pool's slots 0, 1, …
// and expect no one else to use these meanwhile.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "memory/explicit_memory.h"
#include "transformer/chunk_grid.h"
#include "transformer/decoder.h"
#include "transformer/sampler.h"

namespace memory3 {

struct RetrievedMemory {
  std::string id;  // reported back in ChunkRead, not interpreted
  std::shared_ptr<const ExplicitMemory> memory;
};

// The memories for a query (token ids); at most the pool's slots. An error ends the loop with it.
using RetrieveFunction =
    std::function<absl::StatusOr<std::vector<RetrievedMemory>>(std::span<const int32_t> query)>;

// One retrieval: what was asked with, which tokens read the result (numbered without `<s>`, prompt
// first), what was found.
struct ChunkRead {
  ChunkGrid::Range query;
  ChunkGrid::Range readers;
  std::vector<std::string> memory_ids;
};

struct GenerateOptions {
  Layout layout = Layout::kMemory;
  int max_new_tokens = 256;
  int min_new_tokens = 0;              // no stop id before; they are banned until then
  std::vector<int32_t> stop_ids = {};  // Default: none; usually config.eos_token_ids
  SamplingOptions sampling = {};
  int slice_tokens = 0;  // longest prefill slice; 0: as long as the decoder takes
};

struct Generation {
  std::vector<int32_t> tokens;  // generated; the last is a stop id where `stopped`
  bool stopped = false;
  std::vector<ChunkRead> reads;
};

// `prompt`: ids with or without the leading bos, which is fed once. `retrieve`: null for memory
// off; must be null in the plain layout. Errors: INVALID_ARGUMENT names the field; those of
// Decoder::Forward and of `retrieve`.
absl::StatusOr<Generation> Generate(Decoder& decoder, std::span<const int32_t> prompt,
                                    const RetrieveFunction& retrieve,
                                    const GenerateOptions& options);

struct ScoreOptions {
  Layout layout = Layout::kMemory;
  int slice_tokens = 0;
};

struct Score {
  std::vector<float> logprobs;  // [continuation], natural
  std::vector<bool> is_greedy;  // [continuation]: the token is the argmax
  std::vector<ChunkRead> reads;
};

// Log-probabilities of `continuation` after `prompt`. The continuation counts as generated text, so
// that it is never part of the query of a chunk it is scored in.
absl::StatusOr<Score> ScoreContinuation(Decoder& decoder, std::span<const int32_t> prompt,
                                        std::span<const int32_t> continuation,
                                        const RetrieveFunction& retrieve,
                                        const ScoreOptions& options);

}  // namespace memory3
