#include "memory/record.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "memory/little_endian.h"

namespace memory3 {
namespace {

// Offsets of the header's fields; docs/formats.md, "Record".
constexpr std::string_view kMagic = "m3record";
enum Offset : size_t {
  kMagicAt = 0,
  kVersionAt = 8,
  kCodecAt = 12,
  kCodebookScopeAt = 13,
  kReserved1At = 14,
  kLayersAt = 16,
  kKvHeadsAt = 20,
  kTokensAt = 24,
  kHeadDimAt = 28,
  kReferenceTokensAt = 32,
  kReserved2At = 36,
  kFingerprintAt = 40,
  kCodebookHashAt = 72,
  kPayloadBytesAt = 104,
  kReserved3At = 112,
  kPayloadCrcAt = 120,
  kHeaderCrcAt = 124,
};
static_assert(kHeaderCrcAt + 4 == kRecordHeaderBytes);

constexpr int64_t kMaxExtent = 1 << 16;  // of any of a memory's dimensions
constexpr int64_t kMaxReferenceTokens = 1 << 24;

// Says what is wrong with a geometry, "" where nothing is. Cannot overflow: every factor is below
// 2^16 and the product of the first four is bounded before head_dim multiplies it.
std::string GeometryError(const MemoryShape& shape, int64_t reference_tokens) {
  const struct {
    const char* name;
    int64_t value;
  } extents[] = {{"layers", shape.layers},
                 {"kv_heads", shape.kv_heads},
                 {"tokens", shape.tokens},
                 {"head_dim", shape.head_dim}};
  for (const auto& extent : extents) {
    if (extent.value < 1 || extent.value > kMaxExtent)
      return absl::StrCat(extent.name, " is ", extent.value, ", not in 1..", kMaxExtent);
  }
  if (reference_tokens < shape.tokens || reference_tokens > kMaxReferenceTokens) {
    return absl::StrCat("reference_tokens is ", reference_tokens, ", not in tokens (", shape.tokens,
                        ")..", kMaxReferenceTokens);
  }
  if (shape.vectors() > kMaxRecordValues || shape.values() > kMaxRecordValues) {
    return absl::StrFormat("shape [%d, 2, %d, %d, %d] has more than %d numbers", shape.layers,
                           shape.kv_heads, shape.tokens, shape.head_dim, kMaxRecordValues);
  }
  return "";
}

bool IsKnownCodec(uint8_t codec) { return codec >= 1 && codec <= 4; }

// The bytes of one vector where the codec alone decides it, 0 where the codebook does.
int64_t FixedBytesPerVector(CodecId codec, int64_t head_dim) {
  switch (codec) {
    case CodecId::kF32:
      return 4 * head_dim;
    case CodecId::kBF16:
      return 2 * head_dim;
    case CodecId::kInt8:
      return 4 + head_dim;
    case CodecId::kVq:
      return 0;
  }
  return 0;
}

absl::Status Damaged(std::string_view what) {
  return absl::DataLossError(absl::StrCat("record: ", std::string(what)));
}

Hash256 LoadHash(const char* at) {
  Hash256 hash;
  std::memcpy(hash.bytes.data(), at, hash.bytes.size());
  return hash;
}

absl::Status DecodePayload(const RecordHeader& header, std::string_view record, const Codec& codec,
                           std::span<float> values) {
  const std::string_view payload = RecordPayload(record);
  if (payload.size() != static_cast<size_t>(header.shape.vectors() * codec.bytes_per_vector())) {
    return Damaged(absl::StrCat("payload length ", payload.size(), " is not ",
                                header.shape.vectors(), " vectors of ", codec.bytes_per_vector(),
                                " bytes"));
  }
  return codec.Decode({reinterpret_cast<const uint8_t*>(payload.data()), payload.size()}, values);
}

}  // namespace

RecordId ComputeRecordId(std::string_view tenant, const Hash256& writer_fingerprint, CodecId codec,
                         const Hash256& codebook_hash, std::span<const int32_t> token_ids) {
  Sha256 sha;
  sha.UpdateLengthPrefixed("m3id1");
  sha.UpdateLengthPrefixed(tenant);
  sha.UpdateLengthPrefixed(writer_fingerprint.view());
  sha.UpdateLengthPrefixed(CodecName(codec));
  sha.UpdateLengthPrefixed(codebook_hash.view());
  sha.UpdateLengthPrefixed(
      {reinterpret_cast<const char*>(token_ids.data()), token_ids.size_bytes()});
  return sha.Finish();
}

absl::StatusOr<std::string> EncodeRecord(const ExplicitMemory& memory,
                                         const Hash256& writer_fingerprint, const Codec& codec) {
  const MemoryShape& shape = memory.shape;
  if (const std::string error = GeometryError(shape, memory.reference_tokens); !error.empty())
    return absl::InvalidArgumentError(absl::StrCat("memory: ", error));
  if (memory.values.size() != static_cast<size_t>(shape.values())) {
    return absl::InvalidArgumentError(absl::StrCat("memory: has ", memory.values.size(),
                                                   " numbers, its shape wants ", shape.values()));
  }
  if (codec.head_dim() != shape.head_dim) {
    return absl::InvalidArgumentError(absl::StrCat("memory: head_dim is ", shape.head_dim,
                                                   ", the codec's is ", codec.head_dim()));
  }
  const int64_t payload_bytes = shape.vectors() * codec.bytes_per_vector();
  if (payload_bytes > kMaxPayloadBytes) {
    return absl::InvalidArgumentError(absl::StrCat("memory: its record would have ", payload_bytes,
                                                   " bytes of payload, more than ",
                                                   kMaxPayloadBytes));
  }

  std::string record(kRecordHeaderBytes + payload_bytes, '\0');
  char* header = record.data();
  const absl::Status encoded =
      codec.Encode(memory.values, {reinterpret_cast<uint8_t*>(header) + kRecordHeaderBytes,
                                   static_cast<size_t>(payload_bytes)});
  if (!encoded.ok()) return encoded;

  std::memcpy(header + kMagicAt, kMagic.data(), kMagic.size());
  StoreLittleEndian<uint32_t>(header + kVersionAt, kRecordVersion);
  header[kCodecAt] = static_cast<char>(codec.id());
  StoreLittleEndian<uint32_t>(header + kLayersAt, shape.layers);
  StoreLittleEndian<uint32_t>(header + kKvHeadsAt, shape.kv_heads);
  StoreLittleEndian<uint32_t>(header + kTokensAt, shape.tokens);
  StoreLittleEndian<uint32_t>(header + kHeadDimAt, shape.head_dim);
  StoreLittleEndian<uint32_t>(header + kReferenceTokensAt, memory.reference_tokens);
  std::memcpy(header + kFingerprintAt, writer_fingerprint.bytes.data(), 32);
  std::memcpy(header + kCodebookHashAt, codec.codebook_hash().bytes.data(), 32);
  StoreLittleEndian<uint64_t>(header + kPayloadBytesAt, payload_bytes);
  StoreLittleEndian<uint32_t>(header + kPayloadCrcAt, Crc32c(RecordPayload(record)));
  StoreLittleEndian<uint32_t>(header + kHeaderCrcAt, Crc32c({header, kHeaderCrcAt}));
  return record;
}

absl::StatusOr<RecordHeader> CheckRecord(std::string_view record) {
  // What can be told of any version comes first; fields of this version only behind the header's
  // CRC.
  if (record.size() < kVersionAt + 4)
    return Damaged(absl::StrCat("length is ", record.size(), ", too short for a header"));
  const char* header = record.data();
  if (record.substr(kMagicAt, kMagic.size()) != kMagic)
    return Damaged("wrong magic, this is no record of memory3");
  const auto version = LoadLittleEndian<uint32_t>(header + kVersionAt);
  if (version != kRecordVersion) {
    return absl::UnimplementedError(
        absl::StrCat("record: version is ", version, ", this program reads ", kRecordVersion));
  }
  if (record.size() < static_cast<size_t>(kRecordHeaderBytes))
    return Damaged(absl::StrCat("length is ", record.size(), ", too short for a header"));
  if (Crc32c({header, kHeaderCrcAt}) != LoadLittleEndian<uint32_t>(header + kHeaderCrcAt))
    return Damaged("wrong CRC of the header");

  const auto codec = static_cast<uint8_t>(header[kCodecAt]);
  if (!IsKnownCodec(codec)) return Damaged(absl::StrCat("codec ", codec, " is unknown"));
  if (header[kCodebookScopeAt] != 0) {
    return absl::UnimplementedError(
        absl::StrCat("record: codebook scope ", static_cast<uint8_t>(header[kCodebookScopeAt]),
                     ", this program reads 0 (one codebook per model)"));
  }
  if (LoadLittleEndian<uint16_t>(header + kReserved1At) != 0 ||
      LoadLittleEndian<uint32_t>(header + kReserved2At) != 0 ||
      LoadLittleEndian<uint64_t>(header + kReserved3At) != 0)
    return Damaged("reserved bytes of the header are not zero");
  // As u32 an extent may exceed int: bounded here, told apart in GeometryError.
  const auto extent = [&](Offset at) {
    const auto value = LoadLittleEndian<uint32_t>(header + at);
    return static_cast<int>(std::min<uint32_t>(value, INT32_MAX));
  };
  RecordHeader h;
  h.version = version;
  h.codec = static_cast<CodecId>(codec);
  h.shape = {.layers = extent(kLayersAt),
             .kv_heads = extent(kKvHeadsAt),
             .tokens = extent(kTokensAt),
             .head_dim = extent(kHeadDimAt)};
  h.reference_tokens = extent(kReferenceTokensAt);
  h.writer_fingerprint = LoadHash(header + kFingerprintAt);
  h.codebook_hash = LoadHash(header + kCodebookHashAt);
  h.payload_bytes = LoadLittleEndian<uint64_t>(header + kPayloadBytesAt);
  if (const std::string error = GeometryError(h.shape, h.reference_tokens); !error.empty())
    return Damaged(error);
  if ((h.codec == CodecId::kVq) == h.codebook_hash.is_zero()) {
    return Damaged(absl::StrCat("codec ", std::string(CodecName(h.codec)), " with",
                                h.codebook_hash.is_zero() ? "out" : "", " a codebook hash"));
  }
  const uint64_t vectors = h.shape.vectors();
  assert(vectors > 0);
  const uint64_t per_vector = FixedBytesPerVector(h.codec, h.shape.head_dim);
  const bool payload_fits = per_vector != 0
                                ? h.payload_bytes == vectors * per_vector
                                : h.payload_bytes != 0 && h.payload_bytes % vectors == 0;
  if (!payload_fits || h.payload_bytes > static_cast<uint64_t>(kMaxPayloadBytes)) {
    return Damaged(absl::StrCat("payload length ", h.payload_bytes, " does not suit ", vectors,
                                " vectors of codec ", std::string(CodecName(h.codec))));
  }
  if (record.size() - kRecordHeaderBytes != h.payload_bytes) {
    return Damaged(absl::StrCat("length is ", record.size(), ", the header says ",
                                kRecordHeaderBytes + h.payload_bytes));
  }
  if (Crc32c(RecordPayload(record)) != LoadLittleEndian<uint32_t>(header + kPayloadCrcAt))
    return Damaged("wrong CRC of the payload");
  return h;
}

absl::Status CheckRecordFits(const RecordHeader& header, const Hash256& expected_fingerprint,
                             const Codec& codec) {
  if (header.writer_fingerprint != expected_fingerprint) {
    return absl::FailedPreconditionError(absl::StrCat(
        "record: writer fingerprint is ", header.writer_fingerprint.ToHex(), ", this model's is ",
        expected_fingerprint.ToHex(), ": another model wrote it"));
  }
  if (header.codec != codec.id()) {
    return absl::FailedPreconditionError(
        absl::StrCat("record: codec is ", std::string(CodecName(header.codec)), ", expected ",
                     std::string(CodecName(codec.id()))));
  }
  if (header.codebook_hash != codec.codebook_hash()) {
    return absl::FailedPreconditionError(absl::StrCat("record: codebook hash is ",
                                                      header.codebook_hash.ToHex(), ", expected ",
                                                      codec.codebook_hash().ToHex()));
  }
  if (header.shape.head_dim != codec.head_dim()) {
    return absl::FailedPreconditionError(absl::StrCat("record: head_dim is ", header.shape.head_dim,
                                                      ", the codec's is ", codec.head_dim()));
  }
  return absl::OkStatus();
}

absl::StatusOr<RecordHeader> DecodeRecordInto(std::string_view record,
                                              const Hash256& expected_fingerprint,
                                              const Codec& codec, std::span<float> values) {
  absl::StatusOr<RecordHeader> header = CheckRecord(record);
  if (!header.ok()) return header;
  if (absl::Status fits = CheckRecordFits(*header, expected_fingerprint, codec); !fits.ok())
    return fits;
  if (values.size() != static_cast<size_t>(header->shape.values())) {
    return absl::InvalidArgumentError(absl::StrCat("record: has ", header->shape.values(),
                                                   " numbers, there is room for ", values.size()));
  }
  if (absl::Status decoded = DecodePayload(*header, record, codec, values); !decoded.ok())
    return decoded;
  return header;
}

absl::StatusOr<ExplicitMemory> DecodeRecord(std::string_view record,
                                            const Hash256& expected_fingerprint,
                                            const Codec& codec) {
  absl::StatusOr<RecordHeader> header = CheckRecord(record);
  if (!header.ok()) return header.status();
  if (absl::Status fits = CheckRecordFits(*header, expected_fingerprint, codec); !fits.ok())
    return fits;
  ExplicitMemory memory;
  memory.shape = header->shape;
  memory.reference_tokens = header->reference_tokens;
  memory.values.resize(memory.shape.values());
  if (absl::Status decoded = DecodePayload(*header, record, codec, memory.values); !decoded.ok())
    return decoded;
  return memory;
}

}  // namespace memory3
