// How rare a word is: inverse document frequency over hash buckets, built once from training text.
//
// File (little endian), idf.bin:
//   offset size
//   0      8    magic "M3IDF\0\0\0"
//   8      4    version, 1
//   12     4    b: there are 2^b buckets, 8 <= b <= 18
//   16     8    N: paragraphs counted
//   24     4    words in fewer paragraphs than this were left out, and count as unknown
//   28     4    CRC32C of bytes 0..27 and of the buckets
//   32     2·2^b  weights, u16, in units of 1/4096
// Bucket i holds the least weight of the words w with HashWord(w) >> (64 - b) == i, so the
// commonest word of a bucket decides; an empty bucket holds the weight of a word never seen, the
// largest. weight = ln(1 + (N - df + 0.5) / (df + 0.5)), the IDF of BM25 (Robertson and Zaragoza
// 2009, in Lucene's form, which is never negative); df is the number of paragraphs that hold the
// word.
//
// Thread-safety: IdfTable is immutable; IdfBuilder belongs to one thread.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "embedder/words.h"
#include "memory/hash.h"

namespace memory3 {

// FNV-1a, 64 bit, then the finaliser of splitmix64 (MixHash).
uint64_t HashWord(std::string_view word);
inline uint64_t MixHash(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

class IdfTable {
 public:
  // `source` names the file in errors. DATA_LOSS: wrong magic, length or checksum;
  // INVALID_ARGUMENT: a version or size that is not supported.
  static absl::StatusOr<IdfTable> Parse(std::string_view bytes, const std::string& source);
  static absl::StatusOr<IdfTable> Load(const std::string& path);

  // `word_hash`: HashWord of the word.
  float Weight(uint64_t word_hash) const { return weights_[word_hash >> shift_]; }
  // The weight of a word in no bucket.
  float unknown_weight() const { return unknown_weight_; }
  uint64_t paragraphs() const { return paragraphs_; }
  // SHA-256 of the file.
  const Hash256& digest() const { return digest_; }

 private:
  std::vector<float> weights_;
  int shift_ = 0;
  float unknown_weight_ = 0;
  uint64_t paragraphs_ = 0;
  Hash256 digest_;
};

class IdfBuilder {
 public:
  // Counts every line of `text` that has at least ten words as one paragraph; shorter ones are
  // headings.
  void AddDocument(std::string_view text);
  uint64_t paragraphs() const { return paragraphs_; }
  size_t words() const { return counts_.size(); }
  // The bytes of an idf.bin. Requires 8 <= buckets_log2 <= 18.
  std::string Finish(int buckets_log2, uint32_t min_count) const;

 private:
  struct Count {
    uint32_t paragraphs = 0;
    uint64_t last = 0;  // the last paragraph that counted, from 1
  };
  WordSplitter splitter_;
  absl::flat_hash_map<uint64_t, Count> counts_;  // by HashWord
  uint64_t paragraphs_ = 0;
};

}  // namespace memory3
