#include "memory/hash.h"

#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace memory3 {
namespace {

using ::testing::HasSubstr;

TEST(Sha256Test, KnownAnswers) {  // FIPS 180-4 examples
  EXPECT_EQ(Sha256Of("").ToHex(),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(Sha256Of("abc").ToHex(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(Sha256Of(std::string(1000000, 'a')).ToHex(),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(Sha256Test, PiecesAreTheWhole) {
  Sha256 sha;
  sha.Update("a");
  sha.Update("");
  sha.Update("bc");
  EXPECT_EQ(sha.Finish(), Sha256Of("abc"));
}

TEST(Sha256Test, LengthPrefixIsU64LittleEndian) {
  Sha256 sha;
  sha.UpdateLengthPrefixed("abc");
  EXPECT_EQ(sha.Finish(), Sha256Of(std::string("\3\0\0\0\0\0\0\0abc", 11)));
}

TEST(Hash256Test, HexAndBytesRoundTrip) {
  const Hash256 hash = Sha256Of("x");
  EXPECT_EQ(Hash256::FromHex(hash.ToHex()).value(), hash);
  EXPECT_EQ(Hash256::FromHex(absl::AsciiStrToUpper(hash.ToHex())).value(), hash);
  EXPECT_EQ(Hash256::FromBytes(hash.view()).value(), hash);
  EXPECT_FALSE(hash.is_zero());
  EXPECT_TRUE(Hash256{}.is_zero());
}

TEST(Hash256Test, RefusesWhatIsNone) {
  EXPECT_THAT(std::string(Hash256::FromHex("ab").status().message()), HasSubstr("64 hex digits"));
  EXPECT_THAT(std::string(Hash256::FromHex(std::string(63, 'a') + "g").status().message()),
              HasSubstr("byte 31"));
  EXPECT_THAT(std::string(Hash256::FromBytes("abc").status().message()), HasSubstr("32 bytes"));
}

struct CrcCase {
  std::string data;
  uint32_t crc;
};

std::vector<CrcCase> Rfc3720() {  // appendix B.4
  std::string up, down;
  for (int i = 0; i < 32; ++i) {
    up.push_back(static_cast<char>(i));
    down.push_back(static_cast<char>(31 - i));
  }
  return {
      {std::string(32, '\0'), 0x8A9136AA},
      {std::string(32, '\xFF'), 0x62A8AB43},
      {up, 0x46DD794E},
      {down, 0x113FDB5C},
      {absl::HexStringToBytes("01c000000000000000000000000000001400000000000400"
                              "000000140000001828000000000000000200000000000000"),
       0xD9963A56},
      {"123456789", 0xE3069283},
      {"", 0},
  };
}

TEST(Crc32cTest, Rfc3720Vectors) {
  for (const CrcCase& c : Rfc3720()) {
    EXPECT_EQ(Crc32c(c.data), c.crc) << absl::BytesToHexString(c.data);
    for (const internal::CrcFunction crc32c : internal::Crc32cFunctions())
      EXPECT_EQ(crc32c(c.data, 0), c.crc) << absl::BytesToHexString(c.data);
  }
}

TEST(Crc32cTest, AllWaysContinueAndAgreeAtEveryLengthAndOffset) {
  std::string data;
  uint32_t x = 12345;
  for (int i = 0; i < 1300; ++i)  // beyond two blocks of the widest, and every remainder
    data.push_back(static_cast<char>((x = x * 1664525 + 1013904223) >> 24));
  const std::string_view view = data;
  for (const internal::CrcFunction crc32c : internal::Crc32cFunctions()) {
    for (size_t from = 0; from < 9; ++from) {
      for (size_t n = 0; from + n <= view.size(); ++n) {
        const std::string_view piece = view.substr(from, n);
        const uint32_t expected = internal::Crc32cPortable(piece, 0);
        ASSERT_EQ(crc32c(piece, 0), expected) << n;
        ASSERT_EQ(crc32c(piece.substr(n / 3), crc32c(piece.substr(0, n / 3), 0)), expected) << n;
      }
    }
  }
}

TEST(Crc32cTest, SeesEveryFlippedBitOfALongInput) {
  std::string data(4096 + 77, 'm');
  for (const internal::CrcFunction crc32c : internal::Crc32cFunctions()) {
    const uint32_t whole = crc32c(data, 0);
    for (size_t bit = 0; bit < 8 * data.size(); bit += 3) {
      data[bit / 8] ^= static_cast<char>(1 << bit % 8);
      ASSERT_NE(crc32c(data, 0), whole) << bit;
      data[bit / 8] ^= static_cast<char>(1 << bit % 8);
    }
  }
}

}  // namespace
}  // namespace memory3
