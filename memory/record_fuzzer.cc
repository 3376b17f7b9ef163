// Any bytes are a record that decodes to finite numbers or an error, never a crash. To get behind
// the checksums the input is also tried with both CRCs made right.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "memory/little_endian.h"
#include "memory/record.h"

namespace memory3 {
namespace {

void Try(const std::string& record) {
  const absl::StatusOr<RecordHeader> header = CheckRecord(record);
  if (!header.ok()) return;
  if (header->shape.values() > kMaxRecordValues || header->codec == CodecId::kVq) return;
  const auto codec = MakeCodec(header->codec, header->shape.head_dim);
  if (!codec.ok()) std::abort();
  const auto memory = DecodeRecord(record, header->writer_fingerprint, **codec);
  if (!memory.ok()) return;
  for (const float x : memory->values) {
    if (!std::isfinite(x)) std::abort();
  }
  if (!EncodeRecord(*memory, header->writer_fingerprint, **codec).ok()) std::abort();
}

}  // namespace
}  // namespace memory3

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string record(reinterpret_cast<const char*>(data), size);
  memory3::Try(record);
  if (size >= memory3::kRecordHeaderBytes) {
    memory3::StoreLittleEndian<uint32_t>(record.data() + 120,
                                         memory3::Crc32c(memory3::RecordPayload(record)));
    memory3::StoreLittleEndian<uint32_t>(record.data() + 124,
                                         memory3::Crc32c(std::string_view(record).substr(0, 124)));
    memory3::Try(record);
  }
  return 0;
}
