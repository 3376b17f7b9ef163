// How numbers and tables look to a person at a terminal.
//
// Thread-safety: pure functions; a Table by one thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "google/protobuf/timestamp.pb.h"

namespace memory3 {

std::string HumanBytes(uint64_t bytes);                          // "38.5 KiB"
std::string HumanCount(uint64_t number);                         // "1,234,567"
std::string HumanTime(const google::protobuf::Timestamp& time);  // "2026-11-20 15:04:05", UTC; "-"

// Columns as wide as their widest cell (in code points); those with a number's look go to the
// right.
class Table {
 public:
  explicit Table(std::vector<std::string> header) : rows_({std::move(header)}) {}
  void Add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }
  std::string ToString() const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace memory3
