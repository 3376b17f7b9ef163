#include "memory_server/base_index.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "memory_server/dot.h"

namespace memory3 {
namespace {

constexpr int kDimension = 32;

SlotKey KeyOf(uint64_t n) {
  SlotKey key;
  key.record_id = Sha256Of(std::to_string(n));
  return key;
}

// Vectors around a few hundred centres, as texts on a few hundred subjects; by their keys' order.
struct Corpus {
  std::vector<SlotKey> keys;
  std::vector<std::vector<float>> vectors;

  explicit Corpus(uint64_t n, bool clustered = true) {
    std::vector<std::pair<SlotKey, std::vector<float>>> all;
    for (uint64_t i = 0; i < n; ++i) {
      std::mt19937_64 centre(clustered ? i % 200 : i), random(i + 1000);
      std::normal_distribution<float> normal;
      std::vector<float> v(kDimension);
      float squares = 0;
      for (float& x : v) {
        normal.reset();
        x = normal(centre);
      }
      for (float& x : v) {
        x += 0.3f * normal(random);
        squares += x * x;
      }
      for (float& x : v) x /= std::sqrt(squares);
      all.emplace_back(KeyOf(i), std::move(v));
    }
    std::sort(all.begin(), all.end(),
              [](const auto& a, const auto& b) { return a.first < b.first; });
    for (auto& [key, v] : all) {
      keys.push_back(key);
      vectors.push_back(std::move(v));
    }
  }
  BaseIndex::BuildInput Input(uint64_t flat_max) const {
    BaseIndex::BuildInput input;
    input.dimension = kDimension;
    input.keys = keys;
    input.normalised = true;
    input.options.flat_max = flat_max;
    input.options.build_threads = 1;
    input.scan = [this](std::span<const SlotKey> wanted,
                        const std::function<bool(size_t, const float*)>& each) {
      for (size_t i = 0; i < wanted.size(); ++i) {
        size_t at = std::lower_bound(keys.begin(), keys.end(), wanted[i]) - keys.begin();
        if (!each(i, vectors[at].data())) break;
      }
      return absl::OkStatus();
    };
    return input;
  }
  std::vector<uint32_t> Exact(const float* query, size_t k) const {
    std::vector<std::pair<float, uint32_t>> scored;
    for (uint32_t i = 0; i < vectors.size(); ++i) {
      scored.emplace_back(-Dot(query, vectors[i].data(), kDimension), i);
    }
    std::sort(scored.begin(), scored.end());
    std::vector<uint32_t> best;
    for (size_t i = 0; i < k && i < scored.size(); ++i) best.push_back(scored[i].second);
    return best;
  }
};

double Recall(const BaseIndex& index, const Corpus& corpus) {
  size_t found = 0, wanted = 0;
  for (size_t q = 0; q < corpus.vectors.size(); q += corpus.vectors.size() / 60) {
    const float* query = corpus.vectors[q].data();
    std::vector<uint32_t> exact = corpus.Exact(query, 5);
    std::vector<ScoredSlot> got;
    index.Search(query, 84, nullptr, &got);
    for (uint32_t slot : exact) {
      ++wanted;
      found += std::any_of(got.begin(), got.end(), [&](const auto& s) { return s.slot == slot; });
    }
  }
  return static_cast<double>(found) / static_cast<double>(wanted);
}

TEST(DotTest, EveryWayOfComputingAScoreGivesTheSameNumber) {
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  for (int n : {1, 8, 15, 16, 17, 48, 384, 1000}) {
    constexpr int kRows = 11;
    std::vector<float> query(n), rows(kRows * n), a(kRows), b(kRows);
    std::vector<int8_t> codes(kRows * n);
    for (float& x : query) x = normal(random);
    for (float& x : rows) x = normal(random);
    for (int8_t& c : codes) c = static_cast<int8_t>(random());
    DotRows(query.data(), rows.data(), kRows, n, a.data());
    DotRowsInt8(query.data(), codes.data(), kRows, n, b.data());
    for (int r = 0; r < kRows; ++r) {
      EXPECT_EQ(a[r], Dot(query.data(), &rows[r * n], n));
      EXPECT_EQ(b[r], DotInt8(query.data(), &codes[r * n], n));
      double exact = 0, size = 0;
      for (int i = 0; i < n; ++i) {
        exact += static_cast<double>(query[i]) * codes[r * n + i];
        size += std::abs(static_cast<double>(query[i]) * codes[r * n + i]);
      }
      EXPECT_NEAR(b[r], exact, 1e-6 * size);
    }
  }
}

TEST(BaseIndexTest, FlatIsExactWithTiesByKey) {
  Corpus corpus(500);
  for (size_t i = 100; i < 110; ++i) corpus.vectors[i] = corpus.vectors[100];
  auto index = *BaseIndex::Build(corpus.Input(1000));
  EXPECT_EQ(index->description(), "flat");
  for (size_t q : {0, 100, 250}) {
    std::vector<ScoredSlot> got;
    bool all = index->Search(corpus.vectors[q].data(), 7, nullptr, &got);
    EXPECT_FALSE(all);
    std::vector<uint32_t> slots;
    for (const ScoredSlot& s : got) slots.push_back(s.slot);
    EXPECT_EQ(slots, corpus.Exact(corpus.vectors[q].data(), 7));
  }
  std::vector<ScoredSlot> got;
  EXPECT_TRUE(index->Search(corpus.vectors[0].data(), 500, nullptr, &got));
  EXPECT_EQ(got.size(), 500);
}

TEST(BaseIndexTest, LookupsTogetherFindWhatEachFindsAlone) {
  const Corpus corpus(3000);
  for (uint64_t flat_max : {10000, 100}) {
    auto index = *BaseIndex::Build(corpus.Input(flat_max));
    std::vector<std::atomic<uint64_t>> dead(3000 / 64 + 1);
    for (uint32_t s = 0; s < 3000; s += 3) dead[s / 64] |= uint64_t{1} << (s % 64);
    std::vector<BaseIndex::Lookup> together;
    for (size_t q = 0; q < 9; ++q)
      together.push_back({corpus.vectors[37 * q].data(), q == 4 ? 3000 : 10 * q, {}, false});
    index->Search(together, dead.data());
    for (const BaseIndex::Lookup& lookup : together) {
      std::vector<ScoredSlot> alone;
      EXPECT_EQ(lookup.all, index->Search(lookup.query, lookup.k, dead.data(), &alone));
      ASSERT_EQ(lookup.best.size(), alone.size());
      for (size_t i = 0; i < alone.size(); ++i) {
        EXPECT_EQ(lookup.best[i].slot, alone[i].slot);
        EXPECT_EQ(lookup.best[i].score, alone[i].score);
      }
    }
    EXPECT_TRUE(together[4].all);
    EXPECT_EQ(together[4].best.size(), 2000);
    EXPECT_TRUE(together[0].best.empty());  // k is 0
  }
}

TEST(BaseIndexTest, DeadSlotsAreNeverAnswered) {
  const Corpus corpus(3000);
  for (uint64_t flat_max : {10000, 100}) {
    auto index = *BaseIndex::Build(corpus.Input(flat_max));
    std::vector<std::atomic<uint64_t>> dead(3000 / 64 + 1);
    for (uint32_t s = 0; s < 3000; s += 2) dead[s / 64] |= uint64_t{1} << (s % 64);
    std::vector<ScoredSlot> got;
    EXPECT_TRUE(index->Search(corpus.vectors[9].data(), 3000, dead.data(), &got));
    EXPECT_EQ(got.size(), 1500);
    for (const ScoredSlot& s : got) EXPECT_EQ(s.slot % 2, 1);
  }
}

TEST(BaseIndexTest, ListsReachTheRecallOnClusteredVectors) {
  const Corpus corpus(6000);
  auto index = *BaseIndex::Build(corpus.Input(100));
  EXPECT_EQ(index->description().substr(0, 3), "ivf") << index->description();
  EXPECT_GE(Recall(*index, corpus), 0.99) << index->description();
}

// Nothing to gain from lists: it must notice and read everything.
TEST(BaseIndexTest, VectorsWithoutStructureAreScannedWhole) {
  const Corpus corpus(4000, /*clustered=*/false);
  auto index = *BaseIndex::Build(corpus.Input(100));
  EXPECT_EQ(index->description(), "flat,int8");
  EXPECT_GE(Recall(*index, corpus), 0.99);
}

TEST(BaseIndexTest, GrowsFromAPreviousOne) {
  const Corpus corpus(6000);
  BaseIndex::BuildInput half = corpus.Input(100);
  std::erase_if(half.keys, [](const SlotKey& k) { return k.record_id.bytes[5] % 3 == 0; });
  auto before = *BaseIndex::Build(std::move(half));
  BaseIndex::BuildInput input = corpus.Input(100);
  input.previous = before.get();
  auto index = *BaseIndex::Build(std::move(input));
  EXPECT_EQ(index->description(), before->description());
  EXPECT_EQ(index->size(), 6000);
  EXPECT_GE(Recall(*index, corpus), 0.99);
}

TEST(BaseIndexTest, ComesBackFromItsBytesAndRefusesOthers) {
  const Corpus corpus(600);
  for (uint64_t flat_max : {1000, 10}) {
    auto index = *BaseIndex::Build(corpus.Input(flat_max));
    const std::string bytes = index->Serialize();
    auto back = BaseIndex::Deserialize(bytes);
    ASSERT_TRUE(back.ok()) << back.status();
    EXPECT_EQ((*back)->description(), index->description());
    std::vector<ScoredSlot> a, b;
    index->Search(corpus.vectors[3].data(), 20, nullptr, &a);
    (*back)->Search(corpus.vectors[3].data(), 20, nullptr, &b);
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i) EXPECT_EQ(a[i].slot, b[i].slot);
    // Cut anywhere it is refused; with any byte changed it is refused or still searches in bounds.
    for (size_t cut = 0; cut < bytes.size(); cut += 97) {
      EXPECT_EQ(BaseIndex::Deserialize(bytes.substr(0, cut)).status().code(),
                absl::StatusCode::kDataLoss);
    }
    std::mt19937 random(1);
    for (int i = 0; i < 300; ++i) {
      std::string damaged = bytes;
      damaged[i < 100 ? i : random() % damaged.size()] ^= static_cast<char>(1 + random() % 255);
      auto other = BaseIndex::Deserialize(damaged);
      if (!other.ok()) {
        EXPECT_EQ(other.status().code(), absl::StatusCode::kDataLoss);
      } else if ((*other)->dimension() == kDimension) {
        (*other)->Search(corpus.vectors[3].data(), 20, nullptr, &b);
      }
    }
  }
}

}  // namespace
}  // namespace memory3
