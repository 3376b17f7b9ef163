#include "memory/hash.h"

#include <openssl/evp.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "memory/little_endian.h"

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace memory3 {
namespace {

int HexDigit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

// OpenSSL fails here only without memory or without its default provider; nothing can go on then.
void Require(bool ok) {
  if (ok) return;
  std::fputs("memory3: OpenSSL's SHA-256 failed\n", stderr);
  std::abort();
}

EVP_MD_CTX* Context(void* context) { return static_cast<EVP_MD_CTX*>(context); }

// Slicing by 8: table[k][b] is the CRC of byte b followed by k zero bytes.
struct CrcTables {
  uint32_t table[8][256];
  constexpr CrcTables() : table() {
    constexpr uint32_t kReversedPolynomial = 0x82F63B78;
    for (uint32_t b = 0; b < 256; ++b) {
      uint32_t crc = b;
      for (int bit = 0; bit < 8; ++bit)
        crc = (crc >> 1) ^ ((crc & 1) != 0 ? kReversedPolynomial : 0);
      table[0][b] = crc;
    }
    for (int k = 1; k < 8; ++k)
      for (uint32_t b = 0; b < 256; ++b)
        table[k][b] = (table[k - 1][b] >> 8) ^ table[0][table[k - 1][b] & 0xFF];
  }
};
constexpr CrcTables kCrc;

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) uint32_t Crc32cSse42(std::string_view data, uint32_t crc) {
  const char* p = data.data();
  size_t n = data.size();
  uint64_t state = ~crc;
  for (; n >= 8; n -= 8, p += 8) state = _mm_crc32_u64(state, LoadLittleEndian<uint64_t>(p));
  auto state32 = static_cast<uint32_t>(state);
  for (; n > 0; --n, ++p) state32 = _mm_crc32_u8(state32, static_cast<uint8_t>(*p));
  return ~state32;
}
#endif

using CrcFunction = uint32_t (*)(std::string_view, uint32_t);

CrcFunction PickCrc32c() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("sse4.2")) return Crc32cSse42;
#endif
  return internal::Crc32cPortable;
}

}  // namespace

std::string Hash256::ToHex() const { return absl::BytesToHexString(std::string(view())); }

absl::StatusOr<Hash256> Hash256::FromHex(std::string_view hex) {
  Hash256 hash;
  if (hex.size() != 2 * hash.bytes.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("a SHA-256 has 64 hex digits, this has ", hex.size()));
  }
  for (size_t i = 0; i < hash.bytes.size(); ++i) {
    const int high = HexDigit(hex[2 * i]);
    const int low = HexDigit(hex[2 * i + 1]);
    if (high < 0 || low < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("a SHA-256 has hex digits only; byte ", i, " is not"));
    }
    hash.bytes[i] = static_cast<uint8_t>(high << 4 | low);
  }
  return hash;
}

absl::StatusOr<Hash256> Hash256::FromBytes(std::string_view bytes) {
  Hash256 hash;
  if (bytes.size() != hash.bytes.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("a SHA-256 has 32 bytes, this has ", bytes.size()));
  }
  std::memcpy(hash.bytes.data(), bytes.data(), bytes.size());
  return hash;
}

Sha256::Sha256() : context_(EVP_MD_CTX_new()) {
  Require(context_ != nullptr && EVP_DigestInit_ex(Context(context_), EVP_sha256(), nullptr) == 1);
}

Sha256::~Sha256() { EVP_MD_CTX_free(Context(context_)); }

void Sha256::Update(std::string_view data) {
  Require(EVP_DigestUpdate(Context(context_), data.data(), data.size()) == 1);
}

void Sha256::UpdateLengthPrefixed(std::string_view data) {
  char length[8];
  StoreLittleEndian<uint64_t>(length, data.size());
  Update({length, sizeof(length)});
  Update(data);
}

Hash256 Sha256::Finish() {
  Hash256 hash;
  unsigned int size = 0;
  Require(EVP_DigestFinal_ex(Context(context_), hash.bytes.data(), &size) == 1 &&
          size == hash.bytes.size());
  return hash;
}

Hash256 Sha256Of(std::string_view data) {
  Sha256 sha;
  sha.Update(data);
  return sha.Finish();
}

uint32_t Crc32c(std::string_view data, uint32_t crc) {
  static const CrcFunction crc32c = PickCrc32c();
  return crc32c(data, crc);
}

namespace internal {

uint32_t Crc32cPortable(std::string_view data, uint32_t crc) {
  const char* p = data.data();
  size_t n = data.size();
  uint32_t state = ~crc;
  const auto& t = kCrc.table;
  for (; n >= 8; n -= 8, p += 8) {
    const uint32_t low = state ^ LoadLittleEndian<uint32_t>(p);
    const auto high = LoadLittleEndian<uint32_t>(p + 4);
    state = t[7][low & 0xFF] ^ t[6][low >> 8 & 0xFF] ^ t[5][low >> 16 & 0xFF] ^ t[4][low >> 24] ^
            t[3][high & 0xFF] ^ t[2][high >> 8 & 0xFF] ^ t[1][high >> 16 & 0xFF] ^ t[0][high >> 24];
  }
  for (; n > 0; --n, ++p) state = state >> 8 ^ t[0][(state ^ static_cast<uint8_t>(*p)) & 0xFF];
  return ~state;
}

}  // namespace internal
}  // namespace memory3
