// The record: what stands on disk and goes over the wire for one explicit memory. Self-describing and
// self-checking; docs/formats.md gives it byte by byte, memory/testdata holds a stored one of each
// version and codec.
//
// Thread-safety: functions and plain values.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "memory/codec.h"
#include "memory/explicit_memory.h"
#include "memory/hash.h"

namespace memory3 {

using RecordId = Hash256;

inline constexpr int64_t kMaxRecordBytes = int64_t{128} << 20;
inline constexpr uint32_t kRecordVersion = 1;

// The first kRecordHeaderBytes of a record, in memory.
struct RecordHeader {
  uint32_t version = kRecordVersion;
  CodecId codec = CodecId::kF32;
  MemoryShape shape;
  int reference_tokens = 0;
  Hash256 writer_fingerprint;
  Hash256 codebook_hash;      // zero: the codec has none
  uint64_t payload_bytes = 0;
};

// id = SHA-256 over the length-prefixed fields "m3id1", tenant, writer fingerprint, codec name,
// codebook hash, token ids (u32 LE). Each length is a u64 LE.
RecordId ComputeRecordId(std::string_view tenant, const Hash256& writer_fingerprint, CodecId codec,
                         const Hash256& codebook_hash, std::span<const int32_t> token_ids);

// Serialises. INVALID_ARGUMENT names what is wrong with `memory` (shape, NaN, size).
absl::StatusOr<std::string> EncodeRecord(const ExplicitMemory& memory, const Hash256& writer_fingerprint,
                                         const Codec& codec);

// Reads and checks header and CRCs without decoding the payload. DATA_LOSS for wrong magic, length or
// CRC, UNIMPLEMENTED for another version; the message says which.
absl::StatusOr<RecordHeader> CheckRecord(std::string_view record);

// CheckRecord, then FAILED_PRECONDITION where the fingerprint or the codebook is not the expected one,
// then decodes into `values` (header.shape.values() floats).
absl::StatusOr<ExplicitMemory> DecodeRecord(std::string_view record, const Hash256& expected_fingerprint,
                                            const Codec& codec);

}  // namespace memory3
