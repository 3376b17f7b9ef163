// Any bytes are a codebook whose codec encodes and decodes finite numbers, or an error, never a
// crash. The input is also tried with its CRC made right.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "memory/codec.h"
#include "memory/little_endian.h"
#include "memory/vq_codebook.h"

namespace memory3 {
namespace {

void Try(const std::string& file) {
  const auto codec = MakeVqCodec(file);
  if (!codec.ok()) return;
  const int64_t d = (*codec)->head_dim();
  const auto book = ParseCodebook(file);
  if (!book.ok() || SerializeCodebook(*book).value_or("") != file) std::abort();
  std::vector<float> x(3 * d);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 7) - 3;
  std::vector<uint8_t> codes(3 * (*codec)->bytes_per_vector());
  if (!(*codec)->Encode(x, codes).ok() || !(*codec)->Decode(codes, x).ok()) std::abort();
  // No encoder's codes either: bytes of the input, then all ones.
  std::vector<uint8_t> any(codes.size());
  for (size_t i = 0; i < any.size(); ++i) any[i] = static_cast<uint8_t>(file[i * 31 % file.size()]);
  for (const std::vector<uint8_t>& bytes : {any, std::vector<uint8_t>(codes.size(), 0xFF)}) {
    if (!(*codec)->Decode(bytes, x).ok()) continue;
    for (const float value : x) {
      if (!std::isfinite(value)) std::abort();
    }
  }
}

}  // namespace
}  // namespace memory3

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string file(reinterpret_cast<const char*>(data), size);
  memory3::Try(file);
  if (size >= 4) {
    memory3::StoreLittleEndian<uint32_t>(
        file.data() + size - 4, memory3::Crc32c(std::string_view(file).substr(0, size - 4)));
    memory3::Try(file);
  }
  return 0;
}
