// A token shard: documents as token ids, with where each begins, its id and its title, so that
// training draws windows and finds references of the same document. docs/formats.md gives the
// bytes.
//
// Thread-safety: an open shard is immutable; a builder belongs to one thread.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "memory/hash.h"

namespace memory3 {

struct ShardDocument {
  uint64_t first = 0, tokens = 0;  // within the shard
  std::string_view id, title;
};

class TokenShardBuilder {
 public:
  // Ids are stored in 2 bytes up to a vocabulary of 65,536, else in 4.
  TokenShardBuilder(const Hash256& tokenizer, int vocab_size)
      : tokenizer_(tokenizer), vocab_size_(vocab_size) {}
  // INVALID_ARGUMENT: an id out of the vocabulary; names the document.
  absl::Status Add(std::string_view id, std::string_view title, std::span<const int32_t> tokens);
  uint64_t tokens() const { return tokens_; }
  // Writes the shard atomically and starts an empty one. Errors: AtomicFile's.
  absl::Status Write(const std::string& path);

 private:
  int token_bytes() const { return vocab_size_ <= 65536 ? 2 : 4; }
  const Hash256 tokenizer_;
  const int vocab_size_;
  uint64_t tokens_ = 0;
  std::string ids_, documents_, names_;
};

class TokenShard {
 public:
  // Maps the file and checks all of it. DATA_LOSS: wrong magic, length or CRC; UNIMPLEMENTED:
  // another version; NOT_FOUND. They name the path.
  static absl::StatusOr<std::unique_ptr<TokenShard>> Open(const std::string& path);
  ~TokenShard();
  TokenShard(const TokenShard&) = delete;
  TokenShard& operator=(const TokenShard&) = delete;

  const Hash256& tokenizer() const { return tokenizer_; }
  int vocab_size() const { return vocab_size_; }
  uint64_t tokens() const { return tokens_; }
  uint32_t checksum() const { return checksum_; }  // the header's: tells shards apart
  int32_t token(uint64_t i) const;
  // Tokens [first, first + n); they must exist.
  void Copy(uint64_t first, std::span<int32_t> out) const;
  uint64_t documents() const { return documents_; }
  ShardDocument document(uint64_t i) const;
  // The document that token `i` belongs to.
  uint64_t DocumentOf(uint64_t i) const;

 private:
  TokenShard() = default;
  absl::Status Check(const std::string& path);

  const char* data_ = nullptr;
  size_t bytes_ = 0;
  Hash256 tokenizer_;
  int vocab_size_ = 0, token_bytes_ = 2;
  uint64_t tokens_ = 0, documents_ = 0;
  uint32_t checksum_ = 0;
  const char *table_ = nullptr, *names_ = nullptr;
};

}  // namespace memory3
