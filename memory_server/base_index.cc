#include "memory_server/base_index.h"

#include <faiss/Clustering.h>
#include <faiss/IndexFlat.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <exception>
#include <random>
#include <type_traits>

#include "memory_server/dot.h"
#include "memory_server/message.h"
#include "memory_server/parallel.h"

namespace memory3 {
namespace {

static_assert(std::endian::native == std::endian::little, "index files hold little-endian arrays");

constexpr size_t kBlock = 4096;                             // vectors encoded at a time
constexpr size_t kScanRows = 1024;                          // scores computed at a time in a search
constexpr uint64_t kSharedScanBytes = uint64_t{256} << 10;  // of vectors, scanned by all lookups
constexpr size_t kCalibrationQueries = 128;
constexpr size_t kCalibrationDepth = 5;  // recall@5
constexpr size_t kTrainPerList = 48;     // FAISS asks for at least 39
constexpr int kTrainIterations = 6;

bool Better(const ScoredSlot& a, const ScoredSlot& b) {
  return a.score != b.score ? a.score > b.score : a.slot < b.slot;
}

bool IsDead(const std::atomic<uint64_t>* dead, uint32_t slot) {
  return dead != nullptr && (dead[slot / 64].load(std::memory_order_relaxed) >> (slot % 64) & 1);
}

void Quantise(const float* v, int n, int8_t* code, float* scale) {
  float largest = 0;
  for (int i = 0; i < n; ++i) largest = std::max(largest, std::abs(v[i]));
  *scale = largest / 127;
  float inverse = largest > 0 ? 127 / largest : 0;
  for (int i = 0; i < n; ++i) code[i] = static_cast<int8_t>(std::lrint(v[i] * inverse));
}

template <typename T>
void PutArray(std::string* out, const std::vector<T>& v) {
  static_assert(std::is_trivially_copyable_v<T>);
  uint64_t n = v.size();
  out->append(reinterpret_cast<const char*>(&n), 8);
  out->append(reinterpret_cast<const char*>(v.data()), n * sizeof(T));
}

template <typename T>
bool TakeArray(std::string_view* in, std::vector<T>* v) {
  uint64_t n;
  if (in->size() < 8) return false;
  std::memcpy(&n, in->data(), 8);
  in->remove_prefix(8);
  if (n > in->size() / sizeof(T)) return false;
  v->resize(n);
  if (n > 0) std::memcpy(static_cast<void*>(v->data()), in->data(), n * sizeof(T));
  in->remove_prefix(n * sizeof(T));
  return true;
}

// What an approximate index is held against: queries and their exact nearest slots, found while the
// vectors pass by.
struct Calibration {
  size_t count = 0;  // of them the first half as stored, the second with half their numbers
  std::vector<float> queries;  // [count, dimension]
  std::vector<uint32_t> own;   // the slot a query came from
  std::vector<std::vector<ScoredSlot>> nearest;

  void Make(const std::vector<float>& stored, const std::vector<uint32_t>& slots, int dimension) {
    // A user's query shares a part of what it looks for with it: drop half of a vector's numbers.
    std::mt19937 random(7);
    for (int dropped = 0; dropped < 2; ++dropped) {
      for (size_t i = 0; i < slots.size(); ++i) {
        own.push_back(slots[i]);
        for (int d = 0; d < dimension; ++d) {
          bool keep = dropped == 0 || (random() & 1) != 0;
          queries.push_back(keep ? stored[i * dimension + d] : 0);
        }
      }
    }
    count = own.size();
    nearest.resize(count);
  }
};

}  // namespace

// Keeps the best k of what is offered.
class BaseIndex::TopK {
 public:
  explicit TopK(size_t k) : k_(k) { kept_.reserve(std::min<size_t>(2 * k, size_t{1} << 16)); }
  bool Wants(float score) const { return !full_ || score >= threshold_; }
  void Offer(ScoredSlot s) {
    kept_.push_back(s);
    if (kept_.size() >= 2 * k_ + 64) Cut();
  }
  // Answers whether anything offered (or refused by Wants) was left out.
  bool Finish(std::vector<ScoredSlot>* out) {
    if (kept_.size() > k_) Cut();
    std::sort(kept_.begin(), kept_.end(), Better);
    *out = std::move(kept_);
    return full_;
  }

 private:
  void Cut() {
    std::nth_element(kept_.begin(), kept_.begin() + (k_ - 1), kept_.end(), Better);
    threshold_ = kept_[k_ - 1].score;
    kept_.resize(k_);
    full_ = true;
  }
  size_t k_;
  std::vector<ScoredSlot> kept_;
  bool full_ = false;
  float threshold_ = 0;
};

struct BaseIndex::Building {
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<uint32_t> list;  // of each slot, with centroids only
  Calibration calibration;
};

std::optional<uint32_t> BaseIndex::Find(const SlotKey& key) const {
  auto it = std::lower_bound(keys_.begin(), keys_.end(), key);
  if (it == keys_.end() || *it != key) return std::nullopt;
  return static_cast<uint32_t>(it - keys_.begin());
}

std::pair<uint32_t, uint32_t> BaseIndex::SlotsOf(const RecordId& id) const {
  auto first = std::lower_bound(keys_.begin(), keys_.end(), SlotKey{id, 0});
  auto last = first;
  while (last != keys_.end() && last->record_id == id) ++last;
  return {static_cast<uint32_t>(first - keys_.begin()),
          static_cast<uint32_t>(last - keys_.begin())};
}

std::string BaseIndex::description() const {
  switch (kind_) {
    case Kind::kFlat:
      return "flat";
    case Kind::kInt8:
      return "flat,int8";
    case Kind::kIvfInt8:
      return Message("ivf", lists(), ",int8,nprobe=", nprobe_);
  }
  return "";
}

uint64_t BaseIndex::memory_bytes() const {
  return keys_.size() * sizeof(SlotKey) + vectors_.size() * 4 + codes_.size() + scales_.size() * 4 +
         centroids_.size() * 4 + list_begin_.size() * 8 + slot_at_.size() * 4;
}

absl::StatusOr<std::shared_ptr<const BaseIndex>> BaseIndex::Build(BuildInput input) {
  if (input.keys.size() > UINT32_MAX) {
    return absl::ResourceExhaustedError(
        Message("an index of ", input.keys.size(), " vectors: at most 2^32 - 1"));
  }
  std::shared_ptr<BaseIndex> index(new BaseIndex);
  index->dimension_ = input.dimension;
  index->keys_ = std::move(input.keys);
  absl::Status status;
  uint64_t n = index->keys_.size();
  const BaseIndex* previous = input.previous;
  if (n <= input.options.flat_max) {
    status = index->BuildFlat(input);
  } else if (previous != nullptr && previous->kind_ != Kind::kFlat &&
             n < 2 * previous->trained_size_ && n > previous->trained_size_ / 2) {
    status = index->BuildFromPrevious(input);
  } else {
    status = index->BuildFresh(input);
  }
  if (!status.ok()) return status;
  if (input.progress) input.progress(1);
  return index;
}

absl::Status BaseIndex::BuildFlat(const BuildInput& input) {
  kind_ = Kind::kFlat;
  vectors_.resize(keys_.size() * dimension_);
  trained_size_ = keys_.size();
  return input.scan(keys_, [&](size_t i, const float* v) {
    std::copy_n(v, dimension_, &vectors_[i * dimension_]);
    return true;
  });
}

absl::Status BaseIndex::BuildFresh(const BuildInput& input) {
  const uint64_t n = keys_.size();
  trained_size_ = n;
  kind_ = Kind::kIvfInt8;
  // Twice the square root: at the quarter of the lists that is the most ever read, the coarse
  // search costs little beside the lists.
  const size_t lists =
      std::bit_ceil(static_cast<size_t>(2 * std::sqrt(static_cast<double>(n)))) / 2 + 1;
  const size_t train = std::min<uint64_t>(n, lists * kTrainPerList);
  // First pass: every so-manyth vector trains, some of the others ask.
  std::vector<float> sample;
  sample.reserve(train * dimension_);
  std::vector<float> asking;
  std::vector<uint32_t> asking_slots;
  const uint64_t ask_step = std::max<uint64_t>(1, n / kCalibrationQueries);
  uint64_t taken = 0;
  bool cancelled = false;
  absl::Status status = input.scan(keys_, [&](size_t i, const float* v) {
    if (i % kBlock == 0 && input.cancelled != nullptr && *input.cancelled) {
      cancelled = true;
      return false;
    }
    if (i * train / n >= taken && taken < train) {
      sample.insert(sample.end(), v, v + dimension_);
      ++taken;
    }
    if (i % ask_step == ask_step / 2 && asking_slots.size() < kCalibrationQueries) {
      asking.insert(asking.end(), v, v + dimension_);
      asking_slots.push_back(static_cast<uint32_t>(i));
    }
    return true;
  });
  if (!status.ok()) return status;
  if (cancelled) return absl::CancelledError("the index build was cancelled");
  if (input.progress) input.progress(0.1);
  try {
    faiss::ClusteringParameters parameters;
    parameters.niter = kTrainIterations;
    parameters.spherical = input.normalised;
    parameters.seed = 1234;
    parameters.min_points_per_centroid = 1;
    faiss::Clustering clustering(dimension_, static_cast<int>(lists), parameters);
    faiss::IndexFlatL2 assign_l2(dimension_);
    faiss::IndexFlatIP assign_ip(dimension_);
    faiss::Index& assign = input.normalised ? static_cast<faiss::Index&>(assign_ip) : assign_l2;
    clustering.train(static_cast<int64_t>(taken), sample.data(), assign);
    centroids_ = clustering.centroids;
  } catch (const std::exception& e) {
    return absl::InternalError(Message("FAISS could not train ", lists, " centroids: ", e.what()));
  }
  sample = {};
  if (input.progress) input.progress(0.4);
  list_begin_.assign(lists + 1, 0);

  Building building;
  building.calibration.Make(asking, asking_slots, dimension_);
  building.codes.resize(n * dimension_);
  building.scales.resize(n);
  building.list.resize(n);
  status = Encode(input, keys_, {}, 0.4, 1.0, &building);
  if (!status.ok()) return status;
  ChooseProbes(building, input.options.recall_target);
  Store(&building);
  return absl::OkStatus();
}

absl::Status BaseIndex::BuildFromPrevious(const BuildInput& input) {
  const BaseIndex& old = *input.previous;
  const uint64_t n = keys_.size();
  kind_ = old.kind_;
  trained_size_ = old.trained_size_;
  centroids_ = old.centroids_;
  nprobe_ = old.nprobe_;
  list_begin_.assign(old.list_begin_.size(), 0);

  std::vector<uint32_t> position(old.size());
  std::vector<uint32_t> list(kind_ == Kind::kIvfInt8 ? old.size() : 0);
  for (uint32_t p = 0; p < old.size(); ++p) {
    position[kind_ == Kind::kIvfInt8 ? old.slot_at_[p] : p] = p;
  }
  if (kind_ == Kind::kIvfInt8) {
    for (uint32_t l = 0; l < old.lists(); ++l) {
      for (uint64_t p = old.list_begin_[l]; p < old.list_begin_[l + 1]; ++p)
        list[old.slot_at_[p]] = l;
    }
  }
  Building building;
  building.codes.resize(n * dimension_);
  building.scales.resize(n);
  if (kind_ == Kind::kIvfInt8) building.list.resize(n);
  std::vector<SlotKey> new_keys;
  std::vector<uint32_t> new_slots;
  uint32_t j = 0;
  for (uint32_t i = 0; i < n; ++i) {
    while (j < old.size() && old.keys_[j] < keys_[i]) ++j;
    if (j == old.size() || old.keys_[j] != keys_[i]) {
      new_keys.push_back(keys_[i]);
      new_slots.push_back(i);
      continue;
    }
    uint64_t p = position[j];
    std::copy_n(&old.codes_[p * dimension_], dimension_, &building.codes[uint64_t{i} * dimension_]);
    building.scales[i] = old.scales_[p];
    if (!building.list.empty()) building.list[i] = list[j];
  }
  absl::Status status = Encode(input, new_keys, new_slots, 0.2, 1.0, &building);
  if (!status.ok()) return status;
  Store(&building);
  return absl::OkStatus();
}

// `slots`: where each key stands; empty: its position. Progress goes from `from` to `to`.
absl::Status BaseIndex::Encode(const BuildInput& input, std::span<const SlotKey> keys,
                               std::span<const uint32_t> slots, double from, double to,
                               Building* building) {
  std::vector<float> block;
  size_t first = 0;
  bool cancelled = false;
  std::unique_ptr<faiss::IndexFlat> assign;
  if (!building->list.empty()) {
    assign = std::make_unique<faiss::IndexFlat>(
        dimension_, input.normalised ? faiss::METRIC_INNER_PRODUCT : faiss::METRIC_L2);
    assign->add(static_cast<int64_t>(centroids_.size() / dimension_), centroids_.data());
  }
  std::vector<float> distances;
  std::vector<faiss::Index::idx_t> labels;
  auto flush = [&] {
    size_t rows = block.size() / dimension_;
    if (rows == 0) return;
    if (assign) {
      distances.resize(rows);
      labels.resize(rows);
      assign->search(static_cast<int64_t>(rows), block.data(), 1, distances.data(), labels.data());
    }
    for (size_t r = 0; r < rows; ++r) {
      uint64_t slot = slots.empty() ? first + r : slots[first + r];
      Quantise(&block[r * dimension_], dimension_, &building->codes[slot * dimension_],
               &building->scales[slot]);
      if (assign) building->list[slot] = static_cast<uint32_t>(std::max<int64_t>(0, labels[r]));
    }
    Calibration& c = building->calibration;
    ParallelFor(input.options.build_threads, c.count, [&](size_t q) {
      std::vector<float> scores(rows);
      DotRows(&c.queries[q * dimension_], block.data(), static_cast<int64_t>(rows), dimension_,
              scores.data());
      std::vector<ScoredSlot>& best = c.nearest[q];
      for (size_t r = 0; r < rows; ++r) {
        ScoredSlot s{static_cast<uint32_t>(first + r), scores[r]};
        bool itself = q < c.count / 2 && s.slot == c.own[q];
        if (itself || (best.size() == kCalibrationDepth && !Better(s, best.back()))) continue;
        best.insert(std::upper_bound(best.begin(), best.end(), s, Better), s);
        if (best.size() > kCalibrationDepth) best.pop_back();
      }
    });
    first += rows;
    block.clear();
    if (input.progress) {
      input.progress(from +
                     (to - from) * static_cast<double>(first) / static_cast<double>(keys.size()));
    }
    cancelled = input.cancelled != nullptr && *input.cancelled;
  };
  absl::Status status = input.scan(keys, [&](size_t, const float* v) {
    block.insert(block.end(), v, v + dimension_);
    if (block.size() == kBlock * dimension_) flush();
    return !cancelled;
  });
  if (!status.ok()) return status;
  flush();
  if (cancelled) return absl::CancelledError("the index build was cancelled");
  return absl::OkStatus();
}

// A true neighbour is found when its list is among the first P: so each neighbour gives one rank,
// and the recall of every P at once.
void BaseIndex::ChooseProbes(const Building& building, double target) {
  const Calibration& c = building.calibration;
  const uint32_t n = lists();
  std::vector<uint32_t> needed[2];
  for (size_t q = 0; q < c.count; ++q) {
    std::vector<uint32_t> order = RankLists(&c.queries[q * dimension_], n);
    std::vector<uint32_t> rank(n);
    for (uint32_t i = 0; i < n; ++i) rank[order[i]] = i;
    for (const ScoredSlot& s : c.nearest[q]) {
      needed[q < c.count / 2 ? 0 : 1].push_back(rank[building.list[s.slot]] + 1);
    }
  }
  uint32_t probes = 1;
  for (std::vector<uint32_t>& ranks : needed) {
    if (ranks.empty()) continue;
    std::sort(ranks.begin(), ranks.end());
    auto at = static_cast<size_t>(std::ceil(target * static_cast<double>(ranks.size()))) - 1;
    probes = std::max(probes, ranks[std::min(at, ranks.size() - 1)]);
  }
  nprobe_ = std::bit_ceil(probes);
  if (nprobe_ > n / 4) {
    kind_ = Kind::kInt8;
    nprobe_ = 0;
    centroids_ = {};
    list_begin_ = {};
  }
}

void BaseIndex::Store(Building* building) {
  if (kind_ == Kind::kInt8) {
    codes_ = std::move(building->codes);
    scales_ = std::move(building->scales);
    return;
  }
  const size_t n = keys_.size();
  for (uint32_t l : building->list) ++list_begin_[l + 1];
  for (size_t l = 1; l < list_begin_.size(); ++l) list_begin_[l] += list_begin_[l - 1];
  std::vector<uint64_t> next(list_begin_.begin(), list_begin_.end() - 1);
  slot_at_.resize(n);
  codes_.resize(n * dimension_);
  scales_.resize(n);
  for (uint32_t slot = 0; slot < n; ++slot) {
    uint64_t p = next[building->list[slot]]++;
    slot_at_[p] = slot;
    scales_[p] = building->scales[slot];
    std::copy_n(&building->codes[uint64_t{slot} * dimension_], dimension_, &codes_[p * dimension_]);
  }
}

std::vector<uint32_t> BaseIndex::RankLists(const float* query, size_t n) const {
  std::vector<float> scores(lists());
  DotRows(query, centroids_.data(), lists(), dimension_, scores.data());
  std::vector<uint32_t> order(lists());
  for (uint32_t l = 0; l < order.size(); ++l) order[l] = l;
  n = std::min<size_t>(n, order.size());
  std::partial_sort(order.begin(), order.begin() + n, order.end(), [&](uint32_t a, uint32_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  });
  order.resize(n);
  return order;
}

void BaseIndex::Scan(const float* query, uint64_t begin, uint64_t end,
                     const std::atomic<uint64_t>* dead, TopK* top) const {
  float scores[kScanRows];
  for (uint64_t p = begin; p < end; p += kScanRows) {
    auto rows = static_cast<int64_t>(std::min<uint64_t>(kScanRows, end - p));
    if (kind_ == Kind::kFlat) {
      DotRows(query, &vectors_[p * dimension_], rows, dimension_, scores);
    } else {
      DotRowsInt8(query, &codes_[p * dimension_], rows, dimension_, scores);
      for (int64_t r = 0; r < rows; ++r) scores[r] *= scales_[p + r];
    }
    for (int64_t r = 0; r < rows; ++r) {
      if (!top->Wants(scores[r])) continue;
      uint32_t slot = kind_ == Kind::kIvfInt8 ? slot_at_[p + r] : static_cast<uint32_t>(p + r);
      if (!IsDead(dead, slot)) top->Offer({slot, scores[r]});
    }
  }
}

bool BaseIndex::ScanLists(const float* query, size_t k, const std::atomic<uint64_t>* dead,
                          TopK* top) const {
  // Past the calibrated lists go on until there is enough to choose k from.
  const uint64_t enough = std::min<uint64_t>(keys_.size(), 4 * static_cast<uint64_t>(k));
  uint64_t seen = 0;
  std::vector<uint32_t> order = RankLists(query, nprobe_);
  size_t read = 0;
  auto read_list = [&] {
    uint32_t l = order[read++];
    Scan(query, list_begin_[l], list_begin_[l + 1], dead, top);
    seen += list_begin_[l + 1] - list_begin_[l];
  };
  while (read < order.size()) read_list();
  if (seen < enough) order = RankLists(query, lists());
  while (seen < enough && read < order.size()) read_list();
  return read == lists();
}

void BaseIndex::Search(std::span<Lookup> lookups, const std::atomic<uint64_t>* dead) const {
  std::vector<TopK> tops;
  tops.reserve(lookups.size());
  for (Lookup& lookup : lookups) {
    lookup.best.clear();
    lookup.all = keys_.empty() || lookup.k > 0;
    tops.emplace_back(std::min(lookup.k, keys_.size()));
  }
  if (kind_ == Kind::kIvfInt8) {
    for (size_t i = 0; i < lookups.size(); ++i) {
      if (lookups[i].k > 0)
        lookups[i].all = ScanLists(lookups[i].query, lookups[i].k, dead, &tops[i]);
    }
  } else {
    // Blocks that stay in the processor's cache while all lookups scan them.
    const uint64_t vector_bytes = dimension_ * (kind_ == Kind::kFlat ? sizeof(float) : 1);
    const uint64_t block = std::max<uint64_t>(16, kSharedScanBytes / vector_bytes);
    for (uint64_t p = 0; p < keys_.size(); p += block) {
      const uint64_t end = std::min<uint64_t>(keys_.size(), p + block);
      for (size_t i = 0; i < lookups.size(); ++i) {
        if (lookups[i].k > 0) Scan(lookups[i].query, p, end, dead, &tops[i]);
      }
    }
  }
  for (size_t i = 0; i < lookups.size(); ++i) {
    if (lookups[i].k > 0 && tops[i].Finish(&lookups[i].best)) lookups[i].all = false;
  }
}

bool BaseIndex::Search(const float* query, size_t k, const std::atomic<uint64_t>* dead,
                       std::vector<ScoredSlot>* out) const {
  Lookup lookup = {query, k, {}, false};
  Search({&lookup, 1}, dead);
  *out = std::move(lookup.best);
  return lookup.all;
}

std::string BaseIndex::Serialize() const {
  std::string out;
  out.reserve(memory_bytes() + 128);
  auto number = [&out](uint64_t v) { out.append(reinterpret_cast<const char*>(&v), 8); };
  number(static_cast<uint64_t>(kind_));
  number(static_cast<uint64_t>(dimension_));
  number(nprobe_);
  number(trained_size_);
  number(keys_.size());
  for (const SlotKey& key : keys_) {
    out.append(key.record_id.view());
    number(key.embedding_hash);
  }
  PutArray(&out, vectors_);
  PutArray(&out, codes_);
  PutArray(&out, scales_);
  PutArray(&out, centroids_);
  PutArray(&out, list_begin_);
  PutArray(&out, slot_at_);
  return out;
}

absl::StatusOr<std::shared_ptr<const BaseIndex>> BaseIndex::Deserialize(std::string_view bytes) {
  auto bad = [](const char* what) { return absl::DataLossError(Message("index file: ", what)); };
  if (bytes.size() < 40) return bad("shorter than its header");
  uint64_t header[5];
  std::memcpy(header, bytes.data(), 40);
  bytes.remove_prefix(40);
  const auto& [kind, dimension, nprobe, trained, slots] = header;
  if (kind < 1 || kind > 3) return bad("unknown kind");
  if (dimension < 1 || dimension > kMaxEmbeddingDimension) return bad("dimension out of range");
  if (slots > bytes.size() / 40 || slots > UINT32_MAX) return bad("fewer keys than it says");
  std::shared_ptr<BaseIndex> index(new BaseIndex);
  index->kind_ = static_cast<Kind>(kind);
  index->dimension_ = static_cast<int>(dimension);
  index->nprobe_ = static_cast<uint32_t>(nprobe);
  index->trained_size_ = trained;
  index->keys_.resize(slots);
  for (SlotKey& key : index->keys_) {
    std::memcpy(key.record_id.bytes.data(), bytes.data(), 32);
    std::memcpy(&key.embedding_hash, bytes.data() + 32, 8);
    bytes.remove_prefix(40);
  }
  if (!TakeArray(&bytes, &index->vectors_) || !TakeArray(&bytes, &index->codes_) ||
      !TakeArray(&bytes, &index->scales_) || !TakeArray(&bytes, &index->centroids_) ||
      !TakeArray(&bytes, &index->list_begin_) || !TakeArray(&bytes, &index->slot_at_) ||
      !bytes.empty()) {
    return bad("arrays do not fill it");
  }
  const bool flat = index->kind_ == Kind::kFlat, ivf = index->kind_ == Kind::kIvfInt8;
  if (index->vectors_.size() != (flat ? slots * dimension : 0) ||
      index->codes_.size() != (flat ? 0 : slots * dimension) ||
      index->scales_.size() != (flat ? 0 : slots) || index->slot_at_.size() != (ivf ? slots : 0)) {
    return bad("array sizes do not agree");
  }
  if (ivf) {
    const std::vector<uint64_t>& begin = index->list_begin_;
    if (begin.size() < 2 || index->centroids_.size() != (begin.size() - 1) * dimension ||
        begin.front() != 0 || begin.back() != slots ||
        !std::is_sorted(begin.begin(), begin.end()) || nprobe < 1 || nprobe > index->lists()) {
      return bad("lists do not agree");
    }
    for (uint32_t slot : index->slot_at_) {
      if (slot >= slots) return bad("a list names a slot that is not there");
    }
  }
  return index;
}

}  // namespace memory3
