#include "memory/vq_codebook.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "memory/little_endian.h"

namespace memory3 {
namespace {

// Offsets; docs/formats.md, "Codebook".
constexpr std::string_view kMagic = "m3codebk";
constexpr size_t kVersionAt = 8;
constexpr size_t kHeadDimAt = 12;
constexpr size_t kCoarseBitsAt = 16;
constexpr size_t kFineBitsAt = 20;
constexpr size_t kReservedAt = 24;
constexpr size_t kNumbersAt = 64;

constexpr float kLargestNumber = 0x1p40f;
constexpr double kRotationTolerance = 1e-3;

// "" where the extents are allowed; then no size computed from them overflows.
std::string ExtentError(uint32_t head_dim, uint32_t coarse_bits, uint32_t fine_bits) {
  if (head_dim < 8 || head_dim > kMaxVqHeadDim || head_dim % 8 != 0) {
    return absl::StrCat("head_dim is ", head_dim, ", not a multiple of 8 in 8..", kMaxVqHeadDim);
  }
  if (coarse_bits < 1 || coarse_bits > 16)
    return absl::StrCat("coarse_bits is ", coarse_bits, ", not in 1..16");
  if (fine_bits < 1 || fine_bits > 12)
    return absl::StrCat("fine_bits is ", fine_bits, ", not in 1..12");
  return "";
}

struct Sizes {
  size_t rotation, coarse, fine;
  size_t total() const { return rotation + coarse + fine; }
};

Sizes SizesOf(const VqCodebook& c) {
  const size_t d = c.head_dim;
  return {d * d, d << c.coarse_bits, d << c.fine_bits};
}

std::string NumbersError(std::span<const float> numbers, const char* name) {
  for (size_t i = 0; i < numbers.size(); ++i) {
    // NaN fails the comparison too.
    if (!(std::fabs(numbers[i]) <= kLargestNumber))
      return absl::StrCat(name, "[", i, "] is ", numbers[i], ", not a number of at most 2^40");
  }
  return "";
}

std::string RotationError(const std::vector<float>& rotation, int d) {
  for (int a = 0; a < d; ++a) {
    for (int b = 0; b <= a; ++b) {
      double dot = 0;
      for (int k = 0; k < d; ++k)
        dot += static_cast<double>(rotation[a * d + k]) * rotation[b * d + k];
      if (!(std::fabs(dot - (a == b ? 1 : 0)) <= kRotationTolerance))
        return absl::StrCat("rotation: rows ", b, " and ", a, " are not orthonormal");
    }
  }
  return "";
}

std::string ContentError(const VqCodebook& c) {
  for (std::string error : {NumbersError(c.rotation, "rotation"), NumbersError(c.coarse, "coarse"),
                            NumbersError(c.fine, "fine")}) {
    if (!error.empty()) return error;
  }
  return RotationError(c.rotation, c.head_dim);
}

absl::Status Damaged(std::string_view what) {
  return absl::DataLossError(absl::StrCat("codebook: ", std::string(what)));
}

}  // namespace

absl::Status CheckCodebook(const VqCodebook& c) {
  const auto invalid = [](std::string_view what) {
    return absl::InvalidArgumentError(absl::StrCat("codebook: ", std::string(what)));
  };
  if (std::string error = ExtentError(c.head_dim, c.coarse_bits, c.fine_bits); !error.empty())
    return invalid(error);
  const Sizes sizes = SizesOf(c);
  if (c.rotation.size() != sizes.rotation || c.coarse.size() != sizes.coarse ||
      c.fine.size() != sizes.fine) {
    return invalid(absl::StrCat("rotation, coarse and fine have ", c.rotation.size(), ", ",
                                c.coarse.size(), " and ", c.fine.size(), " numbers, not ",
                                sizes.rotation, ", ", sizes.coarse, " and ", sizes.fine));
  }
  if (std::string error = ContentError(c); !error.empty()) return invalid(error);
  return absl::OkStatus();
}

absl::StatusOr<std::string> SerializeCodebook(const VqCodebook& c) {
  if (absl::Status status = CheckCodebook(c); !status.ok()) return status;
  const size_t numbers_bytes = SizesOf(c).total() * sizeof(float);
  std::string file(kNumbersAt + numbers_bytes + 4, '\0');
  char* p = file.data();
  std::memcpy(p, kMagic.data(), kMagic.size());
  StoreLittleEndian<uint32_t>(p + kVersionAt, kCodebookVersion);
  StoreLittleEndian<uint32_t>(p + kHeadDimAt, c.head_dim);
  StoreLittleEndian<uint32_t>(p + kCoarseBitsAt, c.coarse_bits);
  StoreLittleEndian<uint32_t>(p + kFineBitsAt, c.fine_bits);
  char* to = p + kNumbersAt;
  for (const std::vector<float>* numbers : {&c.rotation, &c.coarse, &c.fine}) {
    std::memcpy(to, numbers->data(), numbers->size() * sizeof(float));
    to += numbers->size() * sizeof(float);
  }
  StoreLittleEndian<uint32_t>(to,
                              Crc32c(std::string_view(file).substr(0, kNumbersAt + numbers_bytes)));
  return file;
}

absl::StatusOr<VqCodebook> ParseCodebook(std::string_view file) {
  if (file.size() < kNumbersAt + 4)
    return Damaged(absl::StrCat("length is ", file.size(), ", too short"));
  const char* p = file.data();
  if (file.substr(0, kMagic.size()) != kMagic)
    return Damaged("wrong magic, this is no codebook of memory3");
  const auto version = LoadLittleEndian<uint32_t>(p + kVersionAt);
  if (version != kCodebookVersion) {
    return absl::UnimplementedError(
        absl::StrCat("codebook: version is ", version, ", this program reads ", kCodebookVersion));
  }
  // Extents before the checksum: a damaged length is told as such, and the sum of a huge file that
  // is no codebook never computed.
  const auto head_dim = LoadLittleEndian<uint32_t>(p + kHeadDimAt);
  const auto coarse_bits = LoadLittleEndian<uint32_t>(p + kCoarseBitsAt);
  const auto fine_bits = LoadLittleEndian<uint32_t>(p + kFineBitsAt);
  if (std::string error = ExtentError(head_dim, coarse_bits, fine_bits); !error.empty())
    return Damaged(error);
  VqCodebook c;
  c.head_dim = static_cast<int>(head_dim);
  c.coarse_bits = static_cast<int>(coarse_bits);
  c.fine_bits = static_cast<int>(fine_bits);
  const Sizes sizes = SizesOf(c);
  const size_t crc_at = kNumbersAt + sizes.total() * sizeof(float);
  if (file.size() != crc_at + 4) {
    return Damaged(absl::StrCat("length is ", file.size(), ", its header says ", crc_at + 4));
  }
  if (Crc32c(file.substr(0, crc_at)) != LoadLittleEndian<uint32_t>(p + crc_at))
    return Damaged("wrong CRC");
  if (!std::all_of(p + kReservedAt, p + kNumbersAt, [](char byte) { return byte == 0; }))
    return Damaged("reserved bytes are not zero");
  const char* from = p + kNumbersAt;
  const auto take = [&from](std::vector<float>& numbers, size_t n) {
    numbers.resize(n);
    std::memcpy(numbers.data(), from, n * sizeof(float));
    from += n * sizeof(float);
  };
  take(c.rotation, sizes.rotation);
  take(c.coarse, sizes.coarse);
  take(c.fine, sizes.fine);
  if (std::string error = ContentError(c); !error.empty()) return Damaged(error);
  return c;
}

}  // namespace memory3
