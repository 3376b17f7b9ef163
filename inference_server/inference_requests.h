// Requests of the wire as the engine's: what can be told from the message, the tokenizer and the
// vocabulary alone. What the engine itself checks (ids, lengths, ranges of sampling) is left to it.
//
// Thread-safety: functions.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "inference_server/engine.h"
#include "memory3/v1/inference.pb.h"
#include "transformer/sampler.h"
#include "transformer/tokenizer.h"

namespace memory3 {

// Everything of `request` but layout and memory. `eos`: the model's.
absl::StatusOr<EngineRequest> ToEngineRequest(const v1::GenerateRequest& request,
                                              const Tokenizer& tokenizer,
                                              const std::vector<int32_t>& eos);
absl::StatusOr<EngineRequest> ToEngineRequest(const v1::ScoreRequest& request,
                                              const Tokenizer& tokenizer);

// Memory is wanted: said so, or a knowledge base is named and nothing is said. INVALID_ARGUMENT:
// wanted, but no knowledge base named.
absl::StatusOr<bool> WantsMemory(const v1::MemoryOptions& options);
// Everything of `options` but the base. `references_per_chunk`: the model's.
absl::StatusOr<MemoryPlan> ToMemoryPlan(const v1::MemoryOptions& options, int references_per_chunk);

}  // namespace memory3
