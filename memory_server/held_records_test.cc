#include "memory_server/held_records.h"

#include <gtest/gtest.h>

namespace memory3 {
namespace {

RecordId Id(int n) {
  RecordId id;
  id.bytes[0] = static_cast<uint8_t>(n);
  id.bytes[1] = static_cast<uint8_t>(n >> 8);
  return id;
}

TEST(HeldRecordsTest, ForgetsTheOldestOverTheLimit) {
  HeldRecords held(3);
  for (int i = 0; i < 4; ++i) held.Insert(Id(i));
  EXPECT_EQ(held.size(), 3);
  EXPECT_FALSE(held.Contains(Id(0)));
  EXPECT_TRUE(held.Contains(Id(3)));
}

TEST(HeldRecordsTest, AnErasedRecordThatComesBackIsTheYoungest) {
  HeldRecords held(2);
  held.Insert(Id(0));
  held.Insert(Id(1));
  held.Erase(Id(0));
  EXPECT_FALSE(held.Contains(Id(0)));
  held.Insert(Id(0));
  held.Insert(Id(2));  // over the limit: 1 is the oldest now
  EXPECT_TRUE(held.Contains(Id(0)));
  EXPECT_FALSE(held.Contains(Id(1)));
}

TEST(HeldRecordsTest, StaysBoundedUnderChurn) {
  HeldRecords held(10);
  for (int i = 0; i < 5000; ++i) {
    held.Insert(Id(i));
    if (i % 3 == 0) held.Erase(Id(i));
    ASSERT_LE(held.size(), 10);
  }
  EXPECT_TRUE(held.Contains(Id(4999)));
}

}  // namespace
}  // namespace memory3
