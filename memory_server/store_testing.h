// What the store's tests and benchmarks share: a small knowledge base, records and vectors made
// from numbers, a directory that goes when the test ends.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "memory/record.h"
#include "memory_server/memory_store.h"

namespace memory3::store_testing {

class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string pattern = std::filesystem::temp_directory_path() / "memory3_store_XXXXXX";
    path_ = mkdtemp(pattern.data());
  }
  ~TemporaryDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

inline Hash256 FingerprintOf(std::string_view what) { return Sha256Of(what); }

inline KnowledgeBaseSpec SmallSpec(std::string name, uint32_t dimension = 8) {
  KnowledgeBaseSpec spec;
  spec.name = std::move(name);
  spec.writer_fingerprint = FingerprintOf("writer");
  spec.geometry = {{0, 1}, 1, 4, 2, 16};
  spec.codec = CodecId::kF32;
  spec.embedder_fingerprint = FingerprintOf("embedder");
  spec.embedding_dimension = dimension;
  spec.metric = Metric::kCosine;
  return spec;
}

// A sound record of SmallSpec's kind whose numbers follow from `n`.
inline std::string MakeRecord(uint64_t n, std::string_view writer = "writer") {
  ExplicitMemory memory;
  memory.shape = {2, 1, 2, 4};
  memory.reference_tokens = 16;
  std::mt19937_64 random(n);
  for (int64_t i = 0; i < memory.shape.values(); ++i) {
    memory.values.push_back(static_cast<float>(random() % 1000) / 500 - 1);
  }
  std::unique_ptr<Codec> codec = MakeF32Codec(4);
  return *EncodeRecord(memory, FingerprintOf(writer), *codec);
}

inline RecordId MakeId(uint64_t n, std::string_view tenant = "default") {
  std::vector<int32_t> tokens = {static_cast<int32_t>(n), static_cast<int32_t>(n >> 31)};
  return ComputeRecordId(tenant, FingerprintOf("writer"), CodecId::kF32, Hash256(), tokens);
}

inline std::vector<float> MakeVector(uint64_t n, uint32_t dimension = 8) {
  std::mt19937_64 random(n * 7919 + 1);
  std::normal_distribution<float> normal;
  std::vector<float> v(dimension);
  for (float& x : v) x = normal(random);
  return v;
}

// An entry with its bytes, kept where NewEntry's views find them.
struct OwnedEntry {
  NewEntry entry;
  std::string record;
  std::vector<float> embedding;
};

inline std::unique_ptr<OwnedEntry> MakeEntry(std::string document, uint32_t ordinal, uint64_t n,
                                             uint32_t dimension = 8) {
  auto e = std::make_unique<OwnedEntry>();
  e->record = MakeRecord(n);
  e->embedding = MakeVector(n, dimension);
  e->entry.source.document_id = std::move(document);
  e->entry.source.ordinal = ordinal;
  e->entry.source.title = "title of " + e->entry.source.document_id;
  e->entry.source.uri = "https://example.org/" + e->entry.source.document_id;
  e->entry.source.char_begin = 100 * ordinal;
  e->entry.source.char_end = 100 * ordinal + 100;
  e->entry.source.text = "text " + std::to_string(n);
  e->entry.source.metadata["parity"] = n % 2 ? "odd" : "even";
  e->entry.source.metadata["number"] = std::to_string(n);
  e->entry.record_id = MakeId(n);
  e->entry.record = e->record;
  e->entry.embedding = e->embedding;
  return e;
}

// One query to the published version of knowledge base "kb", tenant "default".
inline absl::StatusOr<RetrieveResult> Ask(MemoryStore& store, const std::vector<float>& vector,
                                          uint32_t top_k = 5) {
  absl::StatusOr<std::shared_ptr<const VersionPin>> pin = store.Pin("default", "kb", std::nullopt);
  if (!pin.ok()) return pin.status();
  Query query;
  query.embedding = vector;
  query.top_k = top_k;
  return store.Retrieve(**pin, {&query, 1}, {});
}
inline absl::StatusOr<std::vector<Hit>> HitsOf(absl::StatusOr<RetrieveResult> result) {
  if (!result.ok()) return result.status();
  return std::move(result->queries[0]);
}

}  // namespace memory3::store_testing
