// The writer fingerprint: what makes one model's memories another model's nonsense, as one SHA-256
// (architecture.md, decision 4). docs/formats.md gives it byte by byte,
// tests/goldens/fingerprint.py computes it without our C++.
//
// Thread-safety: functions.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "memory/hash.h"
#include "transformer/checkpoint.h"
#include "transformer/config.h"
#include "transformer/tokenizer.h"

namespace memory3 {

// `memory`: the checkpoint's explicit_memory, or DenseMode's, or what an experiment replaces it
// with. The tensors' digest, which reads the whole model, is kept in
// <directory>/.memory3_tensors.json, valid while name, size and modification time of every weight
// file are what they were; where it cannot be written that is no error. Everything else is hashed
// each time.
absl::StatusOr<Hash256> WriterFingerprint(const Checkpoint& checkpoint, const Tokenizer& tokenizer,
                                          const ExplicitMemoryConfig& memory);

// SHA-256 over every tensor the model reads: name, dtype, shape, bytes. Independent of sharding.
absl::StatusOr<Hash256> TensorDigest(const Checkpoint& checkpoint);

}  // namespace memory3
