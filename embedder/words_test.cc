#include "embedder/words.h"

#include <random>
#include <string>
#include <vector>

#include "embedder/unicode.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace memory3 {
namespace {

using ::testing::ElementsAre;

std::vector<std::string> Words(std::string_view text) {
  WordSplitter splitter;
  splitter.Split(text);
  std::vector<std::string> words;
  for (size_t i = 0; i < splitter.size(); ++i) words.emplace_back(splitter.word(i));
  return words;
}

TEST(Words, LowerCaseAndPunctuation) {
  EXPECT_THAT(Words("The Day -- of the (DEAD)?"), ElementsAre("the", "day", "of", "the", "dead"));
  EXPECT_THAT(Words("U.S. 3,14 A1"), ElementsAre("u", "s", "3", "14", "a1"));
  EXPECT_THAT(Words(" \t\n…—“” "), ElementsAre());
  EXPECT_THAT(Words(""), ElementsAre());
}

TEST(Words, Apostrophes) {
  EXPECT_THAT(Words("Gulliver's don’t 'quoted' O'Brien"),
              ElementsAre("gulliver", "dont", "quoted", "obrien"));
  EXPECT_THAT(Words("it's, Rome’s"), ElementsAre("it", "rome"));
  EXPECT_THAT(Words("'"), ElementsAre());
  EXPECT_THAT(Words("dogs'"), ElementsAre("dog"));
}

TEST(Words, PluralStemming) {
  EXPECT_THAT(Words("cities travels bus glass axis was ties"),
              ElementsAre("city", "travel", "bus", "glass", "axis", "was", "tie"));
}

TEST(Words, OtherScripts) {
  EXPECT_THAT(Words("Dvořák ÉCOLE Ωμέγας МОСКВА Ёлка Straße"),
              ElementsAre("dvorak", "ecole", "ωμεγασ", "москва", "елка", "strasse"));
  // Composed and decomposed accents are one word.
  EXPECT_EQ(Words("Cafe\u0301"), Words("Café"));
  EXPECT_THAT(Words("東京 カナ"), ElementsAre("東", "京", "カ", "ナ"));
  EXPECT_THAT(Words("soft\u00ADhyphen"), ElementsAre("softhyphen"));
}

TEST(Words, AnyBytesAreAccepted) {
  EXPECT_THAT(Words("a\xff\xfe"
                    "b\xc3"),
              ElementsAre("a", "b"));
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    std::string bytes(random() % 300, '\0');
    for (char& b : bytes) b = static_cast<char>(random());
    WordSplitter splitter;
    splitter.Split(bytes);
    for (size_t i = 0; i < splitter.size(); ++i) EXPECT_FALSE(splitter.word(i).empty());
  }
}

TEST(Unicode, DecodeRejectsWhatUtf8Forbids) {
  for (const std::string bad :
       {"\xc0\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xe2\x82", "\x80"}) {
    size_t pos = 0;
    EXPECT_EQ(DecodeUtf8(bad, &pos), kReplacementChar) << bad;
    EXPECT_EQ(pos, 1u);
  }
  for (char32_t c : {0x24u, 0xA3u, 0x20ACu, 0x10348u, 0x10FFFFu}) {
    std::string s;
    AppendUtf8(c, &s);
    size_t pos = 0;
    EXPECT_EQ(DecodeUtf8(s, &pos), c);
    EXPECT_EQ(pos, s.size());
  }
}

TEST(Unicode, FoldAccents) {
  char32_t out[3];
  ASSERT_EQ(FoldAccents(U'Å', out), 1);
  EXPECT_EQ(out[0], U'a');
  ASSERT_EQ(FoldAccents(U'각', out), 3);
  EXPECT_EQ(out[0], char32_t{0x1100});
  EXPECT_EQ(out[2], char32_t{0x11A8});
  EXPECT_EQ(FoldAccents(0x301, out), 0);
  EXPECT_EQ(ToLower(U'Ж'), U'ж');
}

}  // namespace
}  // namespace memory3
