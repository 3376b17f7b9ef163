#include "embedder/lexical.h"

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <thread>

#include "embedder/bm25.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace memory3 {
namespace {

using ::testing::HasSubstr;

constexpr std::string_view kTraining =
    "The river runs through the old town and the people of the town live by the river.\n"
    "The people of the valley say that the river was once a sea and the town an island.\n"
    "In the summer the market of the old town is full of people who came by the river.\n";

std::string TableBytes(uint32_t min_count = 1) {
  IdfBuilder builder;
  builder.AddDocument(kTraining);
  return builder.Finish(10, min_count);
}

LexicalEmbedder MakeSmall() {
  absl::StatusOr<IdfTable> table = IdfTable::Parse(TableBytes(), "small");
  EXPECT_TRUE(table.ok()) << table.status();
  return LexicalEmbedder(*std::move(table));
}

double Dot(const std::vector<float>& a, const std::vector<float>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

TEST(IdfTable, WeightsAreBm25s) {
  IdfBuilder builder;
  builder.AddDocument(kTraining);
  builder.AddDocument("A heading");  // too short to count
  EXPECT_EQ(builder.paragraphs(), 3u);
  absl::StatusOr<IdfTable> table = IdfTable::Parse(builder.Finish(18, 1), "t");
  ASSERT_TRUE(table.ok());
  EXPECT_EQ(table->paragraphs(), 3u);
  const auto idf = [](double df) { return std::log(1 + (3 - df + 0.5) / (df + 0.5)); };
  EXPECT_NEAR(table->Weight(HashWord("river")), idf(3), 1e-3);
  EXPECT_NEAR(table->Weight(HashWord("valley")), idf(1), 1e-3);
  EXPECT_NEAR(table->Weight(HashWord("zebra")), idf(0), 1e-3);
  EXPECT_FLOAT_EQ(table->Weight(HashWord("zebra")), table->unknown_weight());
  // Rare words count as unknown.
  table = IdfTable::Parse(builder.Finish(18, 2), "t");
  ASSERT_TRUE(table.ok());
  EXPECT_FLOAT_EQ(table->Weight(HashWord("valley")), table->unknown_weight());
  EXPECT_NEAR(table->Weight(HashWord("river")), idf(3), 1e-3);
}

TEST(IdfTable, DamageIsRefused) {
  const std::string good = TableBytes();
  EXPECT_TRUE(IdfTable::Parse(good, "idf.bin").ok());
  for (size_t length : {size_t{0}, size_t{7}, size_t{31}, good.size() - 1}) {
    const auto cut = IdfTable::Parse(std::string_view(good).substr(0, length), "idf.bin");
    EXPECT_EQ(cut.status().code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(std::string(cut.status().message()), HasSubstr("idf.bin"));
  }
  for (size_t i = 0; i < good.size(); i += i < 32 ? 1 : 97) {
    std::string bad = good;
    bad[i] ^= 0x10;
    EXPECT_FALSE(IdfTable::Parse(bad, "idf.bin").ok()) << "byte " << i;
  }
  std::string version = good;
  version[8] = 2;
  EXPECT_THAT(std::string(IdfTable::Parse(version, "idf.bin").status().message()),
              HasSubstr("version is 2"));
  EXPECT_EQ(IdfTable::Load("/nonexistent/idf.bin").status().code(), absl::StatusCode::kNotFound);
}

TEST(Lexical, VectorsHaveNormOne) {
  const LexicalEmbedder embedder = MakeSmall();
  for (std::string_view text :
       {"river", "The old town of the river", "zebra ZEBRA zebra", "東京"}) {
    const auto v = embedder.EmbedOne(text);
    ASSERT_TRUE(v.ok());
    EXPECT_EQ(v->size(), 1024u);
    EXPECT_NEAR(Dot(*v, *v), 1, 1e-5) << text;
  }
  for (std::string_view text : {"", " ... ", "\xff\xfe"}) {
    const auto v = embedder.EmbedOne(text);
    ASSERT_TRUE(v.ok());
    EXPECT_EQ(Dot(*v, *v), 0) << text;
  }
}

TEST(Lexical, BatchAndThreadsGiveTheSameVectors) {
  const LexicalEmbedder embedder = MakeSmall();
  const std::vector<std::string_view> texts = {"the river", "", "a sea and an island", "the river"};
  std::vector<float> batch(texts.size() * 1024);
  ASSERT_TRUE(embedder.Embed(texts, batch).ok());
  std::vector<std::vector<float>> results(4);
  std::vector<std::thread> threads;
  threads.reserve(4);
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] { results[t] = *embedder.EmbedOne(texts[t]); });
  }
  for (std::thread& t : threads) t.join();
  for (int t = 0; t < 4; ++t) {
    EXPECT_TRUE(std::equal(results[t].begin(), results[t].end(), batch.begin() + t * 1024));
  }
  EXPECT_EQ(embedder.Embed(texts, std::span(batch).first(10)).code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(Lexical, RareWordsAndPairsDecide) {
  const LexicalEmbedder embedder = MakeSmall();
  const auto similarity = [&](std::string_view a, std::string_view b) {
    return Dot(*embedder.EmbedOne(a), *embedder.EmbedOne(b));
  };
  // A word never seen weighs more than the commonest.
  EXPECT_GT(similarity("the zebra", "zebra"), similarity("the zebra", "the"));
  // The same words in the same order are nearer than out of it.
  EXPECT_GT(similarity("valley island sea", "valley island sea"),
            similarity("valley island sea", "sea valley island") + 0.01);
  EXPECT_NEAR(similarity("summer market", "zebra crossing"), 0, 0.3);
}

TEST(Lexical, FingerprintFollowsTheTable) {
  const LexicalEmbedder a = MakeSmall(), b = MakeSmall();
  EXPECT_EQ(a.fingerprint(), b.fingerprint());
  absl::StatusOr<IdfTable> other = IdfTable::Parse(TableBytes(2), "other");
  ASSERT_TRUE(other.ok());
  EXPECT_NE(LexicalEmbedder(*std::move(other)).fingerprint(), a.fingerprint());
}

TEST(MakeEmbedder, Specs) {
  const std::filesystem::path directory =
      std::filesystem::path(testing::TempDir()) / "lexical_specs";
  std::filesystem::create_directories(directory);
  std::ofstream(directory / "idf.bin", std::ios::binary) << TableBytes();
  auto embedder = MakeEmbedder("lexical:" + directory.string());
  ASSERT_TRUE(embedder.ok()) << embedder.status();
  EXPECT_EQ((*embedder)->dimension(), 1024);
  EXPECT_EQ(MakeEmbedder("lexical:/nonexistent").status().code(), absl::StatusCode::kNotFound);
  for (const char* spec : {"", "lexical:", "word2vec:x", "bert"}) {
    EXPECT_EQ(MakeEmbedder(spec).status().code(), absl::StatusCode::kInvalidArgument) << spec;
  }
}

TEST(MakeEmbedder, TheShippedTable) {
  auto embedder = MakeEmbedder("lexical");
  ASSERT_TRUE(embedder.ok()) << embedder.status();
  const auto* lexical = dynamic_cast<const LexicalEmbedder*>(embedder->get());
  ASSERT_NE(lexical, nullptr);
  EXPECT_GT(lexical->idf().paragraphs(), 500'000u);
  EXPECT_LT(lexical->idf().Weight(HashWord("the")), 0.5);
  EXPECT_GT(lexical->idf().Weight(HashWord("basildon")), 8);
  EXPECT_FLOAT_EQ(lexical->idf().Weight(HashWord("qqzzxyvbkw")), lexical->idf().unknown_weight());
}

// Against tests/goldens/lexical_vectors.py. A change here is another embedder: it needs another
// fingerprint ("m3lexical1" in lexical.cc).
TEST(Lexical, VectorsAreWhatTheCommentsSay) {
  std::ifstream in("embedder/testdata/lexical_expected.json");
  ASSERT_TRUE(in);
  const nlohmann::json expected = nlohmann::json::parse(in);
  auto embedder = MakeEmbedder("lexical");
  ASSERT_TRUE(embedder.ok()) << embedder.status();
  for (size_t i = 0; i < expected["texts"].size(); ++i) {
    const std::string text = expected["texts"][i];
    std::vector<float> want(1024);
    for (const nlohmann::json& entry : expected["vectors"][i]) want[entry[0]] = entry[1];
    const auto got = (*embedder)->EmbedOne(text);
    ASSERT_TRUE(got.ok());
    for (int d = 0; d < 1024; ++d) ASSERT_NEAR((*got)[d], want[d], 2e-6) << text << " at " << d;
  }
  EXPECT_EQ((*embedder)->fingerprint().ToHex(),
            "e5c47162272038ffdeab90cfea2c7f9bd8a1cda42a126cd3b42d19686ae728bd");
}

TEST(Bm25, MatchesTheFormula) {
  Bm25Index index(1.2, 0.75);
  index.Add("red apple red");
  index.Add("green apple");
  index.Add("blue sky over the sea");
  const std::vector<float> scores = index.Scores("red apple");
  const double mean = 10.0 / 3;
  const auto term = [&](double df, double tf, double length) {
    return std::log(1 + (3 - df + 0.5) / (df + 0.5)) * tf * 2.2 /
           (tf + 1.2 * (0.25 + 0.75 * length / mean));
  };
  EXPECT_NEAR(scores[0], term(1, 2, 3) + term(2, 1, 3), 1e-5);
  EXPECT_NEAR(scores[1], term(2, 1, 2), 1e-5);
  EXPECT_EQ(scores[2], 0);
}

}  // namespace
}  // namespace memory3
