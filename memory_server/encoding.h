// How the store's keys and values become bytes (docs/store.md has them byte by byte). Key numbers
// are big endian so that keys sort by them; value numbers are little endian.
//
// Thread-safety: functions and plain values.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "memory/hash.h"
#include "memory/record.h"
#include "memory_server/memory_store.h"

namespace memory3 {

class ByteWriter {
 public:
  void U8(uint8_t v) { out_.push_back(static_cast<char>(v)); }
  void U32(uint32_t v) { Little(v, 4); }
  void U64(uint64_t v) { Little(v, 8); }
  void I64(int64_t v) { U64(static_cast<uint64_t>(v)); }
  void Bytes(std::string_view v) { out_.append(v); }
  void String(std::string_view v) {  // u32 length, bytes
    U32(static_cast<uint32_t>(v.size()));
    out_.append(v);
  }
  const std::string& str() const { return out_; }
  std::string Take() { return std::move(out_); }

 private:
  void Little(uint64_t v, int n) {
    char b[8];
    for (int i = 0; i < n; ++i) b[i] = static_cast<char>(v >> (8 * i));
    out_.append(b, n);
  }
  std::string out_;
};

// Reads what ByteWriter wrote. Past the end every read gives zero and ok() turns false.
class ByteReader {
 public:
  explicit ByteReader(std::string_view data) : data_(data) {}
  uint8_t U8() { return static_cast<uint8_t>(Little(1)); }
  uint32_t U32() { return static_cast<uint32_t>(Little(4)); }
  uint64_t U64() { return Little(8); }
  int64_t I64() { return static_cast<int64_t>(Little(8)); }
  std::string_view Bytes(size_t n) {
    if (n > data_.size()) {
      ok_ = false;
      data_ = {};
      return {};
    }
    std::string_view v = data_.substr(0, n);
    data_.remove_prefix(n);
    return v;
  }
  std::string_view String() { return Bytes(U32()); }
  Hash256 Hash() {
    Hash256 h;
    std::string_view v = Bytes(32);
    if (v.size() == 32) std::memcpy(h.bytes.data(), v.data(), 32);
    return h;
  }
  bool ok() const { return ok_; }
  bool done() const { return ok_ && data_.empty(); }

 private:
  uint64_t Little(int n) {
    std::string_view v = Bytes(n);
    uint64_t r = 0;
    for (size_t i = 0; i < v.size(); ++i) r |= uint64_t{static_cast<uint8_t>(v[i])} << (8 * i);
    return r;
  }
  std::string_view data_;
  bool ok_ = true;
};

// --- keys ---
void AppendBig32(std::string* key, uint32_t v);
void AppendBig64(std::string* key, uint64_t v);
uint64_t ReadBig64(const char* p);
// u8 length, bytes. Tenants are 1 to 128 bytes.
std::string TenantPrefix(std::string_view tenant);
// The document id with 00 written as 00 FF, ended by 00 01: sorts as the id, no id's key begins
// another's.
void AppendDocumentKey(std::string* key, std::string_view document_id);
// Takes one document key off the front of `key`. False: malformed.
bool TakeDocumentKey(std::string_view* key, std::string* document_id);
// Document key, then the ordinal: what names an entry within a segment.
std::string EntrySuffix(std::string_view document_id, uint32_t ordinal);
bool ParseEntrySuffix(std::string_view suffix, std::string* document_id, uint32_t* ordinal);
// The part of an entry suffix that is the document's key.
std::string_view DocumentKeyOf(std::string_view suffix);
// The smallest key above all that begin with `prefix`.
std::string PrefixEnd(std::string prefix);

// --- values ---
// One row of an entry. A tombstone hides the entry of the same name in the segments below.
struct EntryRow {
  bool tombstone = false;
  RecordId record_id;
  uint64_t embedding_hash = 0;
  uint64_t record_bytes = 0;
  uint64_t char_begin = 0;
  uint64_t char_end = 0;
  std::string title;
  std::string uri;
  std::map<std::string, std::string> metadata;
};
std::string EncodeEntryRow(const RecordId& id, uint64_t embedding_hash, uint64_t record_bytes,
                           const Source& source);
std::string EncodeTombstoneRow();
bool DecodeEntryRow(std::string_view value, EntryRow* row);
// The first fields only; cheaper.
bool DecodeEntryRowHead(std::string_view value, bool* tombstone, RecordId* id, uint64_t* hash);

// Names an embedding among those of one record: a 64-bit mix of its bytes.
uint64_t EmbeddingHash(std::span<const float> embedding);

// Checks that all numbers are finite (INVALID_ARGUMENT names the first that is not) and, for
// cosine, scales to length 1. All zero (a text without words has no direction) stays: it scores 0
// everywhere.
absl::Status NormaliseEmbedding(Metric metric, std::vector<float>* embedding);

// The spec without its codebook.
void WriteSpec(const KnowledgeBaseSpec& spec, ByteWriter* w);
bool ReadSpec(ByteReader* r, KnowledgeBaseSpec* spec);

// --- checks of what callers send ---
// [A-Za-z0-9][A-Za-z0-9._-]{0,127}, the rule of memory.proto; the message names `field`.
absl::Status CheckName(std::string_view field, std::string_view name);
absl::Status CheckTenant(std::string_view tenant);
absl::Status CheckSpec(const KnowledgeBaseSpec& spec);
absl::Status CheckSource(const Source& source);
bool IsUtf8(std::string_view text);

// Relative, no "." or ".." component, no NUL, not empty; the message names `field`.
absl::Status CheckRelativePath(std::string_view field, std::string_view path);

}  // namespace memory3
