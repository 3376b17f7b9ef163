#include "inference_server/prompt_cache.h"

#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "transformer/testing/decoder_fixture.h"

namespace memory3 {
namespace {

class PromptCacheTest : public ::testing::Test {
 protected:
  PromptCacheTest() : device_(TestDevice()) {
    auto cache = KvCache::Create(device_.get(), SmallConfig(), DType::kF32, 64);
    EXPECT_TRUE(cache.ok()) << cache.status();
    kv_ = *std::move(cache);
  }
  std::vector<KvPage> Pages(int count) {
    std::vector<KvPage> pages;
    for (int i = 0; i < count; ++i) pages.push_back(*kv_->Allocate());
    return pages;
  }
  static std::vector<Hash256> Chain(int first, int count) {
    std::vector<Hash256> keys;
    Hash256 key = PromptCache::Root("t", Layout::kMemory);
    for (int c = 0; c < count; ++c) {
      const std::vector<int32_t> ids = {first, c};
      keys.push_back(key = PromptCache::KeyOf(key, ids, {}));
    }
    return keys;
  }

  std::unique_ptr<Device> device_;
  std::unique_ptr<KvCache> kv_;
};

TEST_F(PromptCacheTest, AKeyIsOfAllItWasComputedFrom) {
  const Hash256 root = PromptCache::Root("t", Layout::kMemory);
  EXPECT_NE(root, PromptCache::Root("u", Layout::kMemory));
  EXPECT_NE(root, PromptCache::Root("t", Layout::kPlain));
  const std::vector<int32_t> ids = {1, 2, 3}, others = {1, 2, 4};
  const RecordId a = Sha256Of("a"), b = Sha256Of("b");
  const Hash256 key = PromptCache::KeyOf(root, ids, {a, b});
  EXPECT_EQ(key, PromptCache::KeyOf(root, ids, {b, a}));
  EXPECT_NE(key, PromptCache::KeyOf(root, ids, {a}));
  EXPECT_NE(key, PromptCache::KeyOf(root, ids, {}));
  EXPECT_NE(key, PromptCache::KeyOf(root, others, {a, b}));
  EXPECT_NE(key, PromptCache::KeyOf(key, ids, {a, b}));
}

TEST_F(PromptCacheTest, KeepsWhatWasUsedLastAndAChunkNoShorterThanWhatFollowsIt) {
  PromptCache cache(/*max_pages=*/16, /*chunk_tokens=*/64);  // four chunks
  const std::vector<Hash256> a = Chain(1, 2), b = Chain(2, 2), c = Chain(3, 1);
  for (const auto* keys : {&a, &b}) {
    for (size_t i = 0; i < keys->size(); ++i) cache.Insert(std::span(*keys).first(i + 1), Pages(4));
  }
  EXPECT_EQ(kv_->free_pages(), 48);
  EXPECT_EQ(cache.Find(a).size(), 8u);
  cache.Insert(c, Pages(4));  // the end of b goes, not its beginning
  EXPECT_EQ(kv_->free_pages(), 48);
  EXPECT_EQ(cache.Find(b).size(), 4u);
  EXPECT_EQ(cache.Find(a).size(), 8u);
  EXPECT_EQ(cache.Find(c).size(), 4u);
  EXPECT_EQ(cache.idle_pages(), 16);
}

TEST_F(PromptCacheTest, GivesBackWhatNobodyElseHolds) {
  PromptCache cache(16, 64);
  const std::vector<Hash256> a = Chain(1, 1), b = Chain(2, 1);
  cache.Insert(a, Pages(4));
  cache.Insert(b, Pages(4));
  {
    const std::vector<KvPage> held = cache.Find(a);
    EXPECT_EQ(cache.idle_pages(), 4);
    EXPECT_TRUE(cache.Evict());
    EXPECT_FALSE(cache.Evict());
    EXPECT_EQ(cache.Find(b).size(), 0u);
  }
  EXPECT_TRUE(cache.Evict());
  EXPECT_EQ(kv_->free_pages(), 64);
  PromptCache none(0, 64), odd(16, 40);
  none.Insert(a, Pages(4));
  odd.Insert(a, Pages(2));
  EXPECT_EQ(none.Find(a).size() + odd.Find(a).size(), 0u);
  EXPECT_EQ(kv_->free_pages(), 64);
}

}  // namespace
}  // namespace memory3
