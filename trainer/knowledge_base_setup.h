// The knowledge base that memories are written to: found and checked against the model, or made.
//
// Thread-safety: functions.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "embedder/embedder.h"
#include "memory/codec.h"
#include "memory_server/client.h"
#include "trainer/memory_writing.h"
#include "trainer/writing_model.h"

namespace memory3 {

struct TargetKnowledgeBase {
  std::unique_ptr<Codec> codec;
  bool has_records = false;
};

// The codec that `options` and, unless null, the knowledge base ask for. INVALID_ARGUMENT: vq
// without a codebook, or a codebook without vq.
absl::StatusOr<std::unique_ptr<Codec>> CodecFor(const MemoryWritingOptions& options,
                                                const WritingModel& model,
                                                const v1::KnowledgeBase* knowledge_base);

// FAILED_PRECONDITION says in which of them (writer fingerprint, geometry, codec, codebook,
// embedder) the knowledge base differs. UNAVAILABLE: the server is not reached.
absl::StatusOr<TargetKnowledgeBase> OpenOrCreateKnowledgeBase(const MemoryWritingOptions& options,
                                                              const WritingModel& model,
                                                              const Embedder& embedder,
                                                              MemoryClient* client);

}  // namespace memory3
