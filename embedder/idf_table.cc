#include "embedder/idf_table.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace memory3 {
namespace {

constexpr std::string_view kMagic("M3IDF\0\0\0", 8);
constexpr uint32_t kVersion = 1;
constexpr size_t kHeaderBytes = 32, kCrcOffset = 28;
constexpr float kUnit = 1.0f / 4096;
constexpr int kMinLog2 = 8, kMaxLog2 = 18;
constexpr size_t kLeastWords = 10;

double Idf(double paragraphs, double df) {
  return std::log1p((paragraphs - df + 0.5) / (df + 0.5));
}

uint16_t Quantise(double weight) {
  return static_cast<uint16_t>(std::min(65535.0, std::round(weight / kUnit)));
}

template <typename T>
void Put(T value, std::string* out) {
  for (size_t i = 0; i < sizeof(T); ++i) out->push_back(static_cast<char>(value >> (8 * i)));
}

template <typename T>
T Get(std::string_view bytes, size_t offset) {
  T value = 0;
  for (size_t i = 0; i < sizeof(T); ++i) {
    value |= static_cast<T>(static_cast<uint8_t>(bytes[offset + i])) << (8 * i);
  }
  return value;
}

uint32_t Checksum(std::string_view bytes) {
  return Crc32c(bytes.substr(kHeaderBytes), Crc32c(bytes.substr(0, kCrcOffset)));
}

}  // namespace

uint64_t HashWord(std::string_view word) {
  uint64_t h = 0xCBF29CE484222325ull;
  for (const char c : word) h = (h ^ static_cast<uint8_t>(c)) * 0x100000001B3ull;
  return MixHash(h);
}

absl::StatusOr<IdfTable> IdfTable::Parse(std::string_view bytes, const std::string& source) {
  if (bytes.size() < kHeaderBytes || bytes.substr(0, 8) != kMagic) {
    return absl::DataLossError(absl::StrCat(source, ": not an IDF table (magic M3IDF missing)"));
  }
  const auto version = Get<uint32_t>(bytes, 8);
  if (version != kVersion) {
    return absl::InvalidArgumentError(
        absl::StrCat(source, ": version is ", version, ", only ", kVersion, " is supported"));
  }
  const auto log2 = Get<uint32_t>(bytes, 12);
  if (log2 < kMinLog2 || log2 > kMaxLog2) {
    return absl::InvalidArgumentError(absl::StrCat(
        source, ": 2^", log2, " buckets, supported are 2^", kMinLog2, " to 2^", kMaxLog2));
  }
  const size_t buckets = size_t{1} << log2;
  if (bytes.size() != kHeaderBytes + 2 * buckets) {
    return absl::DataLossError(absl::StrCat(
        source, ": ", bytes.size(), " bytes, its header promises ", kHeaderBytes + 2 * buckets));
  }
  if (Get<uint32_t>(bytes, kCrcOffset) != Checksum(bytes)) {
    return absl::DataLossError(
        absl::StrCat(source, ": checksum does not match, the file is damaged"));
  }
  IdfTable table;
  table.shift_ = 64 - static_cast<int>(log2);
  table.digest_ = Sha256Of(bytes);
  table.paragraphs_ = Get<uint64_t>(bytes, 16);
  table.unknown_weight_ = Quantise(Idf(static_cast<double>(table.paragraphs_), 0)) * kUnit;
  table.weights_.resize(buckets);
  for (size_t i = 0; i < buckets; ++i) {
    table.weights_[i] = Get<uint16_t>(bytes, kHeaderBytes + 2 * i) * kUnit;
  }
  return table;
}

absl::StatusOr<IdfTable> IdfTable::Load(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) return absl::NotFoundError(absl::StrCat(path, ": cannot be opened"));
  const std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  if (in.bad()) return absl::UnavailableError(absl::StrCat(path, ": cannot be read"));
  return Parse(bytes, path);
}

void IdfBuilder::AddDocument(std::string_view text) {
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    splitter_.Split(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
    if (splitter_.size() < kLeastWords) continue;
    ++paragraphs_;
    for (size_t i = 0; i < splitter_.size(); ++i) {
      Count& count = counts_[HashWord(splitter_.word(i))];
      if (count.last == paragraphs_) continue;
      count.last = paragraphs_;
      ++count.paragraphs;
    }
  }
}

std::string IdfBuilder::Finish(int buckets_log2, uint32_t min_count) const {
  const double n = static_cast<double>(paragraphs_);
  std::vector<uint16_t> weights(size_t{1} << buckets_log2, Quantise(Idf(n, 0)));
  for (const auto& [hash, count] : counts_) {
    if (count.paragraphs < min_count) continue;
    uint16_t& weight = weights[hash >> (64 - buckets_log2)];
    weight = std::min(weight, Quantise(Idf(n, count.paragraphs)));
  }
  std::string bytes(kMagic);
  Put<uint32_t>(kVersion, &bytes);
  Put<uint32_t>(static_cast<uint32_t>(buckets_log2), &bytes);
  Put<uint64_t>(paragraphs_, &bytes);
  Put<uint32_t>(min_count, &bytes);
  Put<uint32_t>(0, &bytes);
  for (const uint16_t weight : weights) Put<uint16_t>(weight, &bytes);
  std::string crc;
  Put<uint32_t>(Checksum(bytes), &crc);
  bytes.replace(kCrcOffset, crc.size(), crc);
  return bytes;
}

}  // namespace memory3
