#include "cli/text.h"

#include <gtest/gtest.h>

namespace memory3 {
namespace {

TEST(Text, BytesInUnitsAPersonReads) {
  EXPECT_EQ(HumanBytes(0), "0 B");
  EXPECT_EQ(HumanBytes(1023), "1023 B");
  EXPECT_EQ(HumanBytes(39424), "38.5 KiB");
  EXPECT_EQ(HumanBytes(uint64_t{1} << 40), "1.0 TiB");
  EXPECT_EQ(HumanBytes(uint64_t{1} << 63), "8192.0 PiB");
}

TEST(Text, CountsInGroupsOfThree) {
  EXPECT_EQ(HumanCount(0), "0");
  EXPECT_EQ(HumanCount(999), "999");
  EXPECT_EQ(HumanCount(1000), "1,000");
  EXPECT_EQ(HumanCount(123456789), "123,456,789");
}

TEST(Text, TimesAreUtc) {
  google::protobuf::Timestamp time;
  EXPECT_EQ(HumanTime(time), "-");
  time.set_seconds(1'000'000'000);
  EXPECT_EQ(HumanTime(time), "2001-09-09 01:46:40");
}

TEST(Text, ColumnsLineUpAlsoBehindLettersOfTwoBytes) {
  Table table({"NAME", "COUNT", ""});
  table.Add({"Jørn", "7", "x"});
  table.Add({"a", "1,234", ""});
  EXPECT_EQ(table.ToString(),
            "NAME  COUNT\n"
            "Jørn      7  x\n"
            "a     1,234\n");
}

TEST(Text, ATableWithoutRowsIsItsHeader) { EXPECT_EQ(Table({"A", "B"}).ToString(), "A  B\n"); }

}  // namespace
}  // namespace memory3
