#include "trainer/token_shard.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "memory/little_endian.h"
#include "transformer/atomic_file.h"

namespace memory3 {
namespace {

constexpr char kMagic[] = "m3shard";  // 8 bytes with the zero
constexpr uint32_t kVersion = 1;
constexpr size_t kHeaderBytes = 96, kDocumentBytes = 24;

template <typename T>
void Append(std::string* to, T value) {
  char bytes[sizeof(T)];
  StoreLittleEndian(bytes, value);
  to->append(bytes, sizeof(T));
}

size_t Padded(size_t n) { return (n + 7) / 8 * 8; }

}  // namespace

absl::Status TokenShardBuilder::Add(std::string_view id, std::string_view title,
                                    std::span<const int32_t> tokens) {
  for (const int32_t t : tokens) {
    if (t < 0 || t >= vocab_size_) {
      return absl::InvalidArgumentError(absl::StrCat("document ", std::string(id), ": token id ", t,
                                                     " is not within the vocabulary of ",
                                                     vocab_size_));
    }
  }
  Append<uint64_t>(&documents_, tokens_);
  Append<uint64_t>(&documents_, names_.size());
  Append<uint32_t>(&documents_, static_cast<uint32_t>(id.size()));
  Append<uint32_t>(&documents_, static_cast<uint32_t>(title.size()));
  names_.append(id).append(title);
  for (const int32_t t : tokens) {
    if (token_bytes() == 2) {
      Append<uint16_t>(&ids_, static_cast<uint16_t>(t));
    } else {
      Append<int32_t>(&ids_, t);
    }
  }
  tokens_ += tokens.size();
  return absl::OkStatus();
}

absl::Status TokenShardBuilder::Write(const std::string& path) {
  ids_.resize(Padded(ids_.size()), '\0');
  std::string header(kMagic, 8);
  Append<uint32_t>(&header, kVersion);
  Append<uint32_t>(&header, static_cast<uint32_t>(token_bytes()));
  Append<uint64_t>(&header, tokens_);
  Append<uint64_t>(&header, documents_.size() / kDocumentBytes);
  Append<uint64_t>(&header, names_.size());
  header.append(tokenizer_.view());
  Append<uint32_t>(&header, Crc32c(ids_));
  Append<uint32_t>(&header, Crc32c(names_, Crc32c(documents_)));
  Append<uint32_t>(&header, static_cast<uint32_t>(vocab_size_));
  Append<uint64_t>(&header, 0);
  Append<uint32_t>(&header, Crc32c(header));
  absl::StatusOr<std::unique_ptr<AtomicFile>> file = AtomicFile::Create(path);
  if (!file.ok()) return file.status();
  for (const std::string* part : {&header, &ids_, &documents_, &names_}) {
    if (absl::Status status = (*file)->Append(*part); !status.ok()) return status;
  }
  tokens_ = 0;
  ids_.clear();
  documents_.clear();
  names_.clear();
  return (*file)->Commit();
}

absl::StatusOr<std::unique_ptr<TokenShard>> TokenShard::Open(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    const std::string message = absl::StrCat(path, ": ", std::strerror(errno));
    return errno == ENOENT ? absl::NotFoundError(message) : absl::UnavailableError(message);
  }
  struct stat info = {};
  void* map = MAP_FAILED;
  if (fstat(fd, &info) == 0 && info.st_size >= static_cast<off_t>(kHeaderBytes)) {
    map = mmap(nullptr, info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
  }
  close(fd);
  if (map == MAP_FAILED) {
    return absl::DataLossError(absl::StrCat(path, ": too short for a token shard"));
  }
  std::unique_ptr<TokenShard> shard(new TokenShard);
  shard->data_ = static_cast<const char*>(map);
  shard->bytes_ = info.st_size;
  if (absl::Status status = shard->Check(path); !status.ok()) return status;
  return shard;
}

absl::Status TokenShard::Check(const std::string& path) {
  const auto bad = [&](const char* what) {
    return absl::DataLossError(absl::StrCat(path, ": token shard: ", what));
  };
  if (std::memcmp(data_, kMagic, 8) != 0) return bad("wrong magic");
  const uint32_t version = LoadLittleEndian<uint32_t>(data_ + 8);
  if (version != kVersion) {
    return absl::UnimplementedError(absl::StrCat(path, ": token shard of version ", version));
  }
  checksum_ = LoadLittleEndian<uint32_t>(data_ + kHeaderBytes - 4);
  if (Crc32c({data_, kHeaderBytes - 4}) != checksum_) return bad("wrong CRC of the header");
  token_bytes_ = static_cast<int>(LoadLittleEndian<uint32_t>(data_ + 12));
  tokens_ = LoadLittleEndian<uint64_t>(data_ + 16);
  documents_ = LoadLittleEndian<uint64_t>(data_ + 24);
  const uint64_t names = LoadLittleEndian<uint64_t>(data_ + 32);
  tokenizer_ = *Hash256::FromBytes({data_ + 40, 32});
  vocab_size_ = static_cast<int>(LoadLittleEndian<uint32_t>(data_ + 80));
  if (token_bytes_ != 2 && token_bytes_ != 4) return bad("wrong bytes per token");
  if (tokens_ > bytes_ || documents_ > bytes_ || names > bytes_ ||
      kHeaderBytes + Padded(tokens_ * token_bytes_) + documents_ * kDocumentBytes + names !=
          bytes_) {
    return bad("wrong length");
  }
  const size_t ids = Padded(tokens_ * token_bytes_);
  table_ = data_ + kHeaderBytes + ids;
  names_ = table_ + documents_ * kDocumentBytes;
  if (Crc32c({data_ + kHeaderBytes, ids}) != LoadLittleEndian<uint32_t>(data_ + 72)) {
    return bad("wrong CRC of the tokens");
  }
  if (Crc32c({table_, documents_ * kDocumentBytes + names}) !=
      LoadLittleEndian<uint32_t>(data_ + 76)) {
    return bad("wrong CRC of the documents");
  }
  return absl::OkStatus();
}

TokenShard::~TokenShard() { munmap(const_cast<char*>(data_), bytes_); }

int32_t TokenShard::token(uint64_t i) const {
  const char* at = data_ + kHeaderBytes + i * token_bytes_;
  return token_bytes_ == 2 ? LoadLittleEndian<uint16_t>(at) : LoadLittleEndian<int32_t>(at);
}

void TokenShard::Copy(uint64_t first, std::span<int32_t> out) const {
  for (size_t i = 0; i < out.size(); ++i) out[i] = token(first + i);
}

ShardDocument TokenShard::document(uint64_t i) const {
  const char* at = table_ + i * kDocumentBytes;
  ShardDocument d;
  d.first = LoadLittleEndian<uint64_t>(at);
  d.tokens =
      (i + 1 < documents_ ? LoadLittleEndian<uint64_t>(at + kDocumentBytes) : tokens_) - d.first;
  const char* name = names_ + LoadLittleEndian<uint64_t>(at + 8);
  const uint32_t id_bytes = LoadLittleEndian<uint32_t>(at + 16);
  d.id = {name, id_bytes};
  d.title = {name + id_bytes, LoadLittleEndian<uint32_t>(at + 20)};
  return d;
}

uint64_t TokenShard::DocumentOf(uint64_t i) const {
  uint64_t low = 0, high = documents_;
  while (low + 1 < high) {
    const uint64_t middle = (low + high) / 2;
    (LoadLittleEndian<uint64_t>(table_ + middle * kDocumentBytes) <= i ? low : high) = middle;
  }
  return low;
}

}  // namespace memory3
