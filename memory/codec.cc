#include "memory/codec.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "memory/little_endian.h"

namespace memory3 {
namespace {

constexpr struct {
  CodecId id;
  std::string_view name;
} kNames[] = {{CodecId::kF32, "f32"},
              {CodecId::kBF16, "bf16"},
              {CodecId::kInt8, "int8"},
              {CodecId::kVq, "vq"}};

// The exponent bits of NaN and infinity.
bool IsFiniteBits(uint32_t bits) { return (bits & 0x7F800000u) != 0x7F800000u; }

// What f32, bf16 and int8 share: no codebook, a fixed number of bytes, sizes checked here.
class PlainCodec : public Codec {
 public:
  PlainCodec(CodecId id, int head_dim, int64_t bytes_per_vector)
      : id_(id), head_dim_(head_dim), bytes_per_vector_(bytes_per_vector) {}

  CodecId id() const override { return id_; }
  int head_dim() const override { return head_dim_; }
  const Hash256& codebook_hash() const override { return no_codebook_; }
  int64_t bytes_per_vector() const override { return bytes_per_vector_; }

  absl::Status Encode(std::span<const float> vectors, std::span<uint8_t> out) const override {
    absl::Status sizes = CheckCodecSizes(*this, vectors.size(), out.size());
    if (!sizes.ok()) return sizes;
    if (absl::Status finite = CheckFinite(vectors, head_dim_); !finite.ok()) return finite;
    const size_t n = vectors.size() / head_dim_;
    for (size_t i = 0; i < n; ++i) {
      if (!EncodeVector(vectors.data() + i * head_dim_, out.data() + i * bytes_per_vector_)) {
        return absl::InvalidArgumentError(absl::StrCat("codec ", std::string(CodecName(id_)),
                                                       ": vector ", i,
                                                       " has a number too large for it"));
      }
    }
    return absl::OkStatus();
  }

  absl::Status Decode(std::span<const uint8_t> bytes, std::span<float> vectors) const override {
    absl::Status sizes = CheckCodecSizes(*this, vectors.size(), bytes.size());
    if (!sizes.ok()) return sizes;
    const size_t n = vectors.size() / head_dim_;
    for (size_t i = 0; i < n; ++i) {
      if (!DecodeVector(bytes.data() + i * bytes_per_vector_, vectors.data() + i * head_dim_)) {
        return absl::DataLossError(absl::StrCat("codec ", std::string(CodecName(id_)), ": vector ",
                                                i, " holds a number that is not finite"));
      }
    }
    return absl::OkStatus();
  }

 protected:
  // False: the vector, known to be finite, cannot be represented.
  virtual bool EncodeVector(const float* vector, uint8_t* out) const = 0;
  // False: the bytes are no finite vector.
  virtual bool DecodeVector(const uint8_t* bytes, float* vector) const = 0;

 private:
  CodecId id_;
  int head_dim_;
  int64_t bytes_per_vector_;
  Hash256 no_codebook_;
};

class F32Codec final : public PlainCodec {
 public:
  explicit F32Codec(int head_dim) : PlainCodec(CodecId::kF32, head_dim, int64_t{4} * head_dim) {}

 protected:
  bool EncodeVector(const float* vector, uint8_t* out) const override {
    std::memcpy(out, vector, bytes_per_vector());
    return true;
  }
  bool DecodeVector(const uint8_t* bytes, float* vector) const override {
    std::memcpy(vector, bytes, bytes_per_vector());
    bool finite = true;
    for (int k = 0; k < head_dim(); ++k) finite &= IsFiniteBits(std::bit_cast<uint32_t>(vector[k]));
    return finite;
  }
};

class BF16Codec final : public PlainCodec {
 public:
  explicit BF16Codec(int head_dim) : PlainCodec(CodecId::kBF16, head_dim, int64_t{2} * head_dim) {}

 protected:
  bool EncodeVector(const float* vector, uint8_t* out) const override {
    bool finite = true;
    for (int k = 0; k < head_dim(); ++k) {
      // To the nearest, ties to even. A finite f32 above bf16's largest number rounds to infinity.
      uint32_t bits = std::bit_cast<uint32_t>(vector[k]);
      bits += 0x7FFF + (bits >> 16 & 1);
      finite &= IsFiniteBits(bits);
      StoreLittleEndian<uint16_t>(out + 2 * k, bits >> 16);
    }
    return finite;
  }
  bool DecodeVector(const uint8_t* bytes, float* vector) const override {
    bool finite = true;
    for (int k = 0; k < head_dim(); ++k) {
      const uint32_t bits = uint32_t{LoadLittleEndian<uint16_t>(bytes + 2 * k)} << 16;
      finite &= IsFiniteBits(bits);
      vector[k] = std::bit_cast<float>(bits);
    }
    return finite;
  }
};

// f32 scale = max|x| / 127, then round(x / scale) in int8, ties to even.
class Int8Codec final : public PlainCodec {
 public:
  explicit Int8Codec(int head_dim) : PlainCodec(CodecId::kInt8, head_dim, int64_t{4} + head_dim) {}

 protected:
  bool EncodeVector(const float* vector, uint8_t* out) const override {
    float largest = 0;
    for (int k = 0; k < head_dim(); ++k) largest = std::max(largest, std::fabs(vector[k]));
    float scale = largest / 127;
    if (scale > kLargestScale) return false;
    // A denormal scale has too few bits to divide by: such a vector is zero.
    if (scale < std::numeric_limits<float>::min()) scale = 0;
    StoreLittleEndian<float>(out, scale);
    if (scale == 0) {
      std::memset(out + 4, 0, head_dim());
      return true;
    }
    // Adding 1.5 * 2^23 rounds a number of this size to the nearest integer, ties to even, in any
    // compiler's vector code.
    constexpr float kRounder = 12582912;
    for (int k = 0; k < head_dim(); ++k) {
      const float rounded = (vector[k] / scale + kRounder) - kRounder;
      out[4 + k] = static_cast<uint8_t>(static_cast<int8_t>(rounded));
    }
    return true;
  }
  bool DecodeVector(const uint8_t* bytes, float* vector) const override {
    const auto scale = LoadLittleEndian<float>(bytes);
    if (!(scale >= 0 && scale <= kLargestScale)) return false;
    for (int k = 0; k < head_dim(); ++k)
      vector[k] = scale * static_cast<float>(static_cast<int8_t>(bytes[4 + k]));
    return true;
  }

 private:
  static constexpr float kLargestScale = std::numeric_limits<float>::max() / 128;
};

}  // namespace

absl::StatusOr<CodecId> ParseCodecId(std::string_view name) {
  for (const auto& codec : kNames) {
    if (codec.name == name) return codec.id;
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "codec \"", std::string(name), "\" is unknown; there are f32, bf16, int8 and vq"));
}

std::string_view CodecName(CodecId id) {
  for (const auto& codec : kNames) {
    if (codec.id == id) return codec.name;
  }
  return "unknown";
}

absl::Status CheckCodecSizes(const Codec& codec, size_t values, size_t bytes) {
  const size_t head_dim = codec.head_dim();
  const size_t per_vector = codec.bytes_per_vector();
  if (values % head_dim != 0 || bytes % per_vector != 0 ||
      values / head_dim != bytes / per_vector) {
    return absl::InvalidArgumentError(absl::StrCat("codec ", std::string(CodecName(codec.id())),
                                                   ": ", values, " numbers and ", bytes,
                                                   " bytes are not the same number of vectors of ",
                                                   head_dim, " numbers, ", per_vector, " bytes"));
  }
  return absl::OkStatus();
}

absl::Status CheckFinite(std::span<const float> vectors, int head_dim) {
  // One pass that the compiler vectorises; the place is searched for only where there is one.
  bool finite = true;
  for (const float x : vectors) finite &= IsFiniteBits(std::bit_cast<uint32_t>(x));
  if (finite) return absl::OkStatus();
  size_t i = 0;
  while (std::isfinite(vectors[i])) ++i;
  return absl::InvalidArgumentError(absl::StrCat("vector ", i / head_dim, " has ",
                                                 std::isnan(vectors[i]) ? "NaN" : "infinity",
                                                 " at ", i % head_dim));
}

std::unique_ptr<Codec> MakeF32Codec(int head_dim) { return std::make_unique<F32Codec>(head_dim); }
std::unique_ptr<Codec> MakeBF16Codec(int head_dim) { return std::make_unique<BF16Codec>(head_dim); }
std::unique_ptr<Codec> MakeInt8Codec(int head_dim) { return std::make_unique<Int8Codec>(head_dim); }

}  // namespace memory3
