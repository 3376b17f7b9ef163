#include "transformer/chunk_grid.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace memory3 {

void PrintTo(const ChunkGrid::Range& r, std::ostream* os) {
  *os << "[" << r.first << ", +" << r.tokens << ")";
}

namespace {

using Range = ChunkGrid::Range;

struct Retrieval {
  Range query;
  Range readers;
};

struct Case {
  int prompt;
  int generated;
  std::vector<Retrieval> retrievals;
};

// Written by hand from explicit-memory.md, "Chunks and retrieval".
const Case kCases[] = {
    {0, 64, {}},
    {0, 65, {{{0, 64}, {64, 1}}}},
    {1, 0, {{{0, 1}, {0, 1}}}},
    {1, 64, {{{0, 1}, {0, 65}}}},
    {1, 65, {{{0, 1}, {0, 65}}, {{1, 64}, {65, 1}}}},
    {63, 64, {{{0, 63}, {0, 127}}}},
    {63, 65, {{{0, 63}, {0, 127}}, {{63, 64}, {127, 1}}}},
    {64, 0, {{{0, 64}, {0, 64}}}},
    {64, 1, {{{0, 64}, {0, 65}}}},
    {64, 64, {{{0, 64}, {0, 128}}}},
    {64, 65, {{{0, 64}, {0, 128}}, {{64, 64}, {128, 1}}}},
    // A partial last chunk asks with the last 64 tokens of the prompt.
    {65, 64, {{{0, 64}, {0, 64}}, {{1, 64}, {64, 65}}}},
    {65, 65, {{{0, 64}, {0, 64}}, {{1, 64}, {64, 65}}, {{65, 64}, {129, 1}}}},
    {127, 1, {{{0, 64}, {0, 64}}, {{63, 64}, {64, 64}}}},
    {128, 0, {{{0, 64}, {0, 64}}, {{64, 64}, {64, 64}}}},
    {128, 64, {{{0, 64}, {0, 64}}, {{64, 64}, {64, 128}}}},
    // The paper's count: 128 in and 128 out are three retrievals.
    {128, 128, {{{0, 64}, {0, 64}}, {{64, 64}, {64, 128}}, {{128, 64}, {192, 64}}}},
    {128,
     129,
     {{{0, 64}, {0, 64}}, {{64, 64}, {64, 128}}, {{128, 64}, {192, 64}}, {{192, 64}, {256, 1}}}},
};

TEST(ChunkGridTest, EveryBoundary) {
  for (const Case& c : kCases) {
    SCOPED_TRACE("prompt " + std::to_string(c.prompt) + ", generated " +
                 std::to_string(c.generated));
    const ChunkGrid grid(c.prompt, 64);
    ASSERT_EQ(grid.Retrievals(c.generated), static_cast<int>(c.retrievals.size()));
    for (int r = 0; r < static_cast<int>(c.retrievals.size()); ++r) {
      EXPECT_EQ(grid.QueryOf(r), c.retrievals[r].query) << r;
      EXPECT_EQ(grid.ReadersOf(r, c.generated), c.retrievals[r].readers) << r;
      EXPECT_EQ(grid.KnownTokensFor(r), c.retrievals[r].query.end()) << r;
    }
  }
}

TEST(ChunkGridTest, ReadersPartitionTheTokens) {
  for (int prompt : {1, 63, 64, 65, 127, 128, 129, 200}) {
    for (int generated : {0, 1, 63, 64, 65, 128, 129}) {
      const ChunkGrid grid(prompt, 64);
      int next = 0;
      for (int r = 0; r < grid.Retrievals(generated); ++r) {
        const Range readers = grid.ReadersOf(r, generated);
        EXPECT_EQ(readers.first, next);
        EXPECT_GT(readers.tokens, 0);
        for (int t = readers.first; t < readers.end(); ++t) EXPECT_EQ(grid.RetrievalOf(t), r) << t;
        // What a generated chunk reads was asked for by tokens before it; a prompt chunk asks
        // itself.
        if (r >= grid.prompt_retrievals()) {
          EXPECT_EQ(grid.KnownTokensFor(r), readers.first);
        }
        next = readers.end();
      }
      EXPECT_EQ(next, prompt + generated);
    }
  }
}

TEST(ChunkGridTest, BosReadsTheFirstChunksMemories) {
  EXPECT_EQ(ChunkGrid(1, 64).RetrievalOf(ChunkGrid::kBos), 0);
  EXPECT_EQ(ChunkGrid(200, 64).RetrievalOf(ChunkGrid::kBos), 0);
  EXPECT_EQ(ChunkGrid(0, 64).RetrievalOf(ChunkGrid::kBos), ChunkGrid::kNoRetrieval);
  EXPECT_EQ(ChunkGrid(0, 64).RetrievalOf(0), ChunkGrid::kNoRetrieval);
}

TEST(ChunkGridTest, OtherChunkLength) {
  const ChunkGrid grid(5, 4);
  EXPECT_EQ(grid.Retrievals(4), 2);
  EXPECT_EQ(grid.QueryOf(1), (Range{1, 4}));
  EXPECT_EQ(grid.ReadersOf(1, 4), (Range{4, 5}));
  EXPECT_EQ(grid.QueryOf(2), (Range{5, 4}));
}

TEST(ChunkGridTest, BosIsFedOnce) {
  const std::vector<int32_t> with = {1, 5, 6}, without = {5, 1, 6};
  EXPECT_EQ(WithoutBos(with, 1).size(), 2u);
  EXPECT_EQ(WithoutBos(with, 1).front(), 5);
  EXPECT_EQ(WithoutBos(without, 1).size(), 3u);
  EXPECT_TRUE(WithoutBos({}, 1).empty());
}

}  // namespace
}  // namespace memory3
