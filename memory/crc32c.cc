// CRC32C of hash.h. Three ways to the same number: tables; the CPU's crc32 instruction, which waits
// three cycles for the 8 bytes before; and, for long inputs, folding with carry-less products
// (Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ", Intel 2009, in its
// bit-reflected form), which keeps up with memory.
#include <cstring>

#include "memory/hash.h"
#include "memory/little_endian.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace memory3 {
namespace {

constexpr uint32_t kReversedPolynomial = 0x82F63B78;

// Slicing by 8: table[k][b] is the CRC of byte b followed by k zero bytes.
struct CrcTables {
  uint32_t table[8][256];
  constexpr CrcTables() : table() {
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

// x^n modulo the polynomial, bit-reflected (bit 31 is x^0), times x: what a reflected carry-less
// product of 64 bits wants as its factor.
constexpr uint64_t FoldFactor(int n) {
  uint32_t power = 0x80000000;
  for (int i = 0; i < n; ++i) power = (power >> 1) ^ ((power & 1) != 0 ? kReversedPolynomial : 0);
  return uint64_t{power} << 1;
}
// To move 128 bits `distance` bits on: factors of their low and of their high half.
struct FoldFactors {
  uint64_t low, high;
};
constexpr FoldFactors Fold(int distance) {
  return {FoldFactor(distance + 32), FoldFactor(distance - 32)};
}

// `state` is the CRC's register: not inverted.
__attribute__((target("sse4.2"))) uint32_t ByInstruction(const char* p, size_t n, uint32_t state) {
  uint64_t wide = state;
  for (; n >= 8; n -= 8, p += 8) wide = _mm_crc32_u64(wide, LoadLittleEndian<uint64_t>(p));
  state = static_cast<uint32_t>(wide);
  for (; n > 0; --n, ++p) state = _mm_crc32_u8(state, static_cast<uint8_t>(*p));
  return state;
}

__attribute__((target("sse4.2"))) uint32_t Crc32cSse42(std::string_view data, uint32_t crc) {
  return ~ByInstruction(data.data(), data.size(), ~crc);
}

__attribute__((target("sse4.2"))) __m128i Load128(const char* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

__attribute__((target("sse4.2,pclmul"))) __m128i FoldInto(__m128i x, __m128i factors,
                                                          __m128i next) {
  return _mm_xor_si128(
      _mm_xor_si128(_mm_clmulepi64_si128(x, factors, 0x00), _mm_clmulepi64_si128(x, factors, 0x11)),
      next);
}

__attribute__((target("sse4.2,pclmul"))) __m128i Factors128(FoldFactors f) {
  return _mm_set_epi64x(static_cast<int64_t>(f.high), static_cast<int64_t>(f.low));
}

// The register after 16 bytes that stand for all before them.
__attribute__((target("sse4.2"))) uint32_t Reduce(__m128i x) {
  const uint64_t low = _mm_crc32_u64(0, static_cast<uint64_t>(_mm_cvtsi128_si64(x)));
  return static_cast<uint32_t>(_mm_crc32_u64(low, static_cast<uint64_t>(_mm_extract_epi64(x, 1))));
}

// Four accumulators of 16 bytes.
__attribute__((target("sse4.2,pclmul"))) uint32_t Crc32cPclmul(std::string_view data,
                                                               uint32_t crc) {
  constexpr size_t kBlock = 64;
  const char* p = data.data();
  size_t n = data.size();
  if (n < 4 * kBlock) return Crc32cSse42(data, crc);
  __m128i x[4];
  for (int i = 0; i < 4; ++i) x[i] = Load128(p + 16 * i);
  x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128(static_cast<int>(~crc)));
  constexpr FoldFactors kByBlock = Fold(8 * kBlock);
  const __m128i by_block = Factors128(kByBlock);
  for (p += kBlock, n -= kBlock; n >= kBlock; p += kBlock, n -= kBlock) {
    for (int i = 0; i < 4; ++i) x[i] = FoldInto(x[i], by_block, Load128(p + 16 * i));
  }
  constexpr FoldFactors kByOne = Fold(128);
  const __m128i by_one = Factors128(kByOne);
  for (int i = 1; i < 4; ++i) x[0] = FoldInto(x[0], by_one, x[i]);
  return ~ByInstruction(p, n, Reduce(x[0]));
}

#define MEMORY3_TARGET_AVX512 __attribute__((target("sse4.2,pclmul,avx512f,vpclmulqdq")))

MEMORY3_TARGET_AVX512 __m512i FoldInto(__m512i x, __m512i factors, __m512i next) {
  return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(x, factors, 0x00),
                                   _mm512_clmulepi64_epi128(x, factors, 0x11), next,
                                   0x96);  // exclusive or of the three
}

MEMORY3_TARGET_AVX512 __m512i Factors512(FoldFactors f) {
  const auto low = static_cast<int64_t>(f.low), high = static_cast<int64_t>(f.high);
  return _mm512_set_epi64(high, low, high, low, high, low, high, low);
}

// Four accumulators of 64 bytes.
MEMORY3_TARGET_AVX512 uint32_t Crc32cAvx512(std::string_view data, uint32_t crc) {
  constexpr size_t kBlock = 256;
  const char* p = data.data();
  size_t n = data.size();
  if (n < 2 * kBlock) return Crc32cPclmul(data, crc);
  __m512i x[4];
  for (int i = 0; i < 4; ++i) x[i] = _mm512_loadu_si512(p + 64 * i);
  x[0] = _mm512_xor_si512(x[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(~crc))));
  constexpr FoldFactors kByBlock = Fold(8 * kBlock);
  const __m512i by_block = Factors512(kByBlock);
  for (p += kBlock, n -= kBlock; n >= kBlock; p += kBlock, n -= kBlock) {
    for (int i = 0; i < 4; ++i) x[i] = FoldInto(x[i], by_block, _mm512_loadu_si512(p + 64 * i));
  }
  constexpr FoldFactors kByOne = Fold(512);
  const __m512i by_one = Factors512(kByOne);
  for (int i = 1; i < 4; ++i) x[0] = FoldInto(x[0], by_one, x[i]);
  constexpr FoldFactors kByQuarter = Fold(128);
  const __m128i by_quarter = Factors128(kByQuarter);
  alignas(64) char quarters[64];
  _mm512_store_si512(quarters, x[0]);
  __m128i y = Load128(quarters);
  for (int i = 1; i < 4; ++i) y = FoldInto(y, by_quarter, Load128(quarters + 16 * i));
  return ~ByInstruction(p, n, Reduce(y));
}

#undef MEMORY3_TARGET_AVX512

#endif

}  // namespace

namespace internal {

std::vector<CrcFunction> Crc32cFunctions() {
  std::vector<CrcFunction> functions = {Crc32cPortable};
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("sse4.2")) return functions;
  functions.push_back(Crc32cSse42);
  if (!__builtin_cpu_supports("pclmul")) return functions;
  functions.push_back(Crc32cPclmul);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq")) {
    functions.push_back(Crc32cAvx512);
  }
#endif
  return functions;
}

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

uint32_t Crc32c(std::string_view data, uint32_t crc) {
  static const internal::CrcFunction best = internal::Crc32cFunctions().back();
  return best(data, crc);
}

}  // namespace memory3
