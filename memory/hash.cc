#include "memory/hash.h"

#include <openssl/evp.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "memory/little_endian.h"

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

}  // namespace memory3
