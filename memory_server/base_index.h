// The immutable part of an index: all vectors of one version of a knowledge base at one moment, in
// the order of their keys. Three kinds, by the rule in docs/store.md:
//   flat          f32, exact
//   flat,int8     every vector with one scale, scanned whole; callers re-rank with stored vectors
//   ivfN,int8,nprobe=P   the same codes in N inverted lists (FAISS trains the centroids), P of them
//   read
// P is not guessed: the smallest power of two that reaches the recall target on held-out queries of
// the same data; where that would read more than a quarter of the lists the index is flat,int8.
//
// Thread-safety: immutable once built; all const methods from any thread. A search runs in its
// caller.
#pragma once

#include <atomic>
#include <compare>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "memory/record.h"
#include "memory_server/rocksdb_store.h"

namespace memory3 {

// What a vector of the index stands for: an embedding of a record. Usually one a record; more where
// two documents put one record with different embeddings.
struct SlotKey {
  RecordId record_id;
  uint64_t embedding_hash = 0;

  bool operator==(const SlotKey&) const = default;
  // The check takes the comparison with 0 that the compiler writes for a pointer.
  auto operator<=>(const SlotKey&) const = default;  // NOLINT(modernize-use-nullptr)
};

struct ScoredSlot {
  uint32_t slot = 0;
  float score = 0;
};

// Streams the vectors of `keys`, in order, as often as it is called. The callback gets the position
// in `keys` and `dimension` floats; when it answers false the scan ends with OK.
using VectorScan = std::function<absl::Status(
    std::span<const SlotKey> keys, const std::function<bool(size_t, const float*)>& each)>;

class BaseIndex {
 public:
  struct BuildInput {
    int dimension = 0;
    std::vector<SlotKey> keys;  // ascending, distinct
    VectorScan scan;
    bool normalised = false;  // all vectors have length 1
    // Its codes and centroids are used again where the kind stays the same. May be null.
    const BaseIndex* previous = nullptr;
    IndexOptions options;
    std::function<void(double)> progress;          // 0 to 1, rising
    const std::atomic<bool>* cancelled = nullptr;  // CANCELLED soon after it turns true
  };
  static absl::StatusOr<std::shared_ptr<const BaseIndex>> Build(BuildInput input);

  size_t size() const { return keys_.size(); }
  int dimension() const { return dimension_; }
  const SlotKey& key(uint32_t slot) const { return keys_[slot]; }
  std::span<const SlotKey> keys() const { return keys_; }
  std::optional<uint32_t> Find(const SlotKey& key) const;
  // The slots of one record: [first, last).
  std::pair<uint32_t, uint32_t> SlotsOf(const RecordId& id) const;
  // True: the scores of a search are exact, and so is the set it answers.
  bool exact() const { return kind_ == Kind::kFlat; }
  // The stored vector, for flat only.
  const float* vector(uint32_t slot) const { return &vectors_[size_t{slot} * dimension_]; }
  std::string description() const;
  uint64_t memory_bytes() const;

  // A search, and what it found.
  struct Lookup {
    const float* query = nullptr;  // `dimension` numbers
    size_t k = 0;
    // The best `k` slots that are not dead by falling score, ties by rising slot, which is rising
    // record id.
    std::vector<ScoredSlot> best;
    // It saw every live slot, so that a larger k gives nothing more than what was cut off here.
    bool all = false;
  };
  // `dead`: a bitmap over slots. Without lists the vectors are read once for all lookups: a scan
  // waits for memory more than for the processor.
  void Search(std::span<Lookup> lookups, const std::atomic<uint64_t>* dead) const;
  // One of them; answers its `all`.
  bool Search(const float* query, size_t k, const std::atomic<uint64_t>* dead,
              std::vector<ScoredSlot>* out) const;

  // The file's bytes without header and checksum (index_file.h adds them), and back. DATA_LOSS says
  // what does not fit.
  std::string Serialize() const;
  static absl::StatusOr<std::shared_ptr<const BaseIndex>> Deserialize(std::string_view bytes);

 private:
  enum class Kind : uint8_t { kFlat = 1, kInt8 = 2, kIvfInt8 = 3 };

  // Codes while they are built, by slot.
  struct Building;
  class TopK;

  BaseIndex() = default;
  absl::Status BuildFlat(const BuildInput& input);
  absl::Status BuildFresh(const BuildInput& input);
  absl::Status BuildFromPrevious(const BuildInput& input);
  absl::Status Encode(const BuildInput& input, std::span<const SlotKey> keys,
                      std::span<const uint32_t> slots, double from, double to, Building* building);
  void ChooseProbes(const Building& building, double target);
  void Store(Building* building);
  // Offers the live slots at the storage positions [begin, end).
  void Scan(const float* query, uint64_t begin, uint64_t end, const std::atomic<uint64_t>* dead,
            TopK* top) const;
  // Reads lists, of kIvfInt8. Answers whether it read all.
  bool ScanLists(const float* query, size_t k, const std::atomic<uint64_t>* dead, TopK* top) const;
  // The lists by falling inner product of their centroid with `query`; the first `n` in order.
  std::vector<uint32_t> RankLists(const float* query, size_t n) const;
  uint32_t lists() const { return static_cast<uint32_t>(list_begin_.size()) - 1; }

  Kind kind_ = Kind::kFlat;
  int dimension_ = 0;
  std::vector<SlotKey> keys_;
  std::vector<float> vectors_;  // kFlat: [slots, dimension]
  // kInt8 and kIvfInt8: codes in storage order (by list, then slot; kInt8: by slot).
  std::vector<int8_t> codes_;
  std::vector<float> scales_;
  // kIvfInt8.
  std::vector<float> centroids_;      // [lists, dimension]
  std::vector<uint64_t> list_begin_;  // lists + 1 positions in storage order
  std::vector<uint32_t> slot_at_;     // storage position → slot
  uint32_t nprobe_ = 0;
  uint64_t trained_size_ = 0;  // slots when the kind was chosen and the centroids trained
};

}  // namespace memory3
