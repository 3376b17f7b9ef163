// The record: what stands on disk and goes over the wire for one explicit memory. Self-describing
// and self-checking; docs/formats.md gives it byte by byte, memory/testdata holds a stored one of
// each version and codec.
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

inline constexpr uint32_t kRecordVersion = 1;
inline constexpr int64_t kRecordHeaderBytes = 128;
// The dense f32 memory of a 7 B model, 32 layers * 2 * 32 heads * 128 tokens * 128 numbers, is
// exactly this. No memory may have more numbers than that, whatever its codec, so that a record of
// a few bytes a vector cannot ask for more memory than one of f32.
inline constexpr int64_t kMaxPayloadBytes = int64_t{128} << 20;
inline constexpr int64_t kMaxRecordBytes = kRecordHeaderBytes + kMaxPayloadBytes;
inline constexpr int64_t kMaxRecordValues = kMaxPayloadBytes / 4;

// The first kRecordHeaderBytes of a record, in memory.
struct RecordHeader {
  uint32_t version = kRecordVersion;
  CodecId codec = CodecId::kF32;
  MemoryShape shape;
  int reference_tokens = 0;
  Hash256 writer_fingerprint;
  Hash256 codebook_hash;  // zero: the codec has none
  uint64_t payload_bytes = 0;
};

// id = SHA-256 over the length-prefixed fields "m3id1", tenant, writer fingerprint, codec name,
// codebook hash, token ids (u32 LE). Each length is a u64 LE.
RecordId ComputeRecordId(std::string_view tenant, const Hash256& writer_fingerprint, CodecId codec,
                         const Hash256& codebook_hash, std::span<const int32_t> token_ids);

// Serialises. INVALID_ARGUMENT names what is wrong with `memory` (shape, NaN, size).
absl::StatusOr<std::string> EncodeRecord(const ExplicitMemory& memory,
                                         const Hash256& writer_fingerprint, const Codec& codec);

// Reads and checks header and CRCs without decoding the payload. DATA_LOSS for wrong magic, length
// or CRC, UNIMPLEMENTED for another version; the message says which.
absl::StatusOr<RecordHeader> CheckRecord(std::string_view record);

// The payload of a record that CheckRecord accepted: shape.vectors() codes in the tensor's order.
inline std::string_view RecordPayload(std::string_view record) {
  return record.substr(kRecordHeaderBytes);
}

// FAILED_PRECONDITION where writer fingerprint, codec, codebook or head_dim is not the expected one
// (the message says which and gives both).
absl::Status CheckRecordFits(const RecordHeader& header, const Hash256& expected_fingerprint,
                             const Codec& codec);

// CheckRecord and CheckRecordFits, then decodes into `values`, which has header.shape.values()
// floats (else INVALID_ARGUMENT). On an error `values` holds anything.
absl::StatusOr<RecordHeader> DecodeRecordInto(std::string_view record,
                                              const Hash256& expected_fingerprint,
                                              const Codec& codec, std::span<float> values);

// The same into a memory of its own.
absl::StatusOr<ExplicitMemory> DecodeRecord(std::string_view record,
                                            const Hash256& expected_fingerprint,
                                            const Codec& codec);

}  // namespace memory3
