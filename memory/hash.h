// SHA-256 (through OpenSSL) and CRC32C (no library of Debian's offers it: crc32c.cc) as values.
//
// Thread-safety: free functions from any thread; a Sha256 by one.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace memory3 {

struct Hash256 {
  std::array<uint8_t, 32> bytes{};

  bool operator==(const Hash256&) const = default;
  // The check takes the comparison with 0 that the compiler writes for a pointer.
  auto operator<=>(const Hash256&) const = default;  // NOLINT(modernize-use-nullptr)
  bool is_zero() const { return *this == Hash256{}; }
  std::string ToHex() const;  // 64 lower-case digits
  std::string_view view() const {
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }
  static absl::StatusOr<Hash256> FromHex(std::string_view hex);
  static absl::StatusOr<Hash256> FromBytes(std::string_view bytes);  // exactly 32

  template <typename H>
  friend H AbslHashValue(H h, const Hash256& v) {
    return H::combine(std::move(h), v.bytes);
  }
};

// Streaming SHA-256. Not copyable; one thread.
class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;
  void Update(std::string_view data);
  // u64 little endian length, then the bytes: the framing of every identity in memory3.
  void UpdateLengthPrefixed(std::string_view data);
  Hash256 Finish();

 private:
  void* context_;
};
Hash256 Sha256Of(std::string_view data);

// CRC32C (Castagnoli, RFC 3720 B.4) of `data`, continuing from `crc` (0 to start), by the fastest
// means that this CPU has.
uint32_t Crc32c(std::string_view data, uint32_t crc = 0);

namespace internal {
// For tests: all that this CPU can run, the fastest last, and the one by tables.
using CrcFunction = uint32_t (*)(std::string_view data, uint32_t crc);
std::vector<CrcFunction> Crc32cFunctions();
uint32_t Crc32cPortable(std::string_view data, uint32_t crc);
}  // namespace internal

}  // namespace memory3
