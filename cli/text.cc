#include "cli/text.h"

#include <algorithm>
#include <cctype>

#include "absl/strings/str_format.h"
#include "absl/time/time.h"

namespace memory3 {
namespace {

size_t CodePoints(const std::string& text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xC0) != 0x80;  // not a continuation byte
  }));
}

bool LooksLikeNumber(const std::string& cell) {
  return !cell.empty() && std::isdigit(static_cast<unsigned char>(cell[0])) != 0;
}

}  // namespace

std::string HumanBytes(uint64_t bytes) {
  static constexpr const char* kUnits[] = {"KiB", "MiB", "GiB", "TiB", "PiB"};
  if (bytes < 1024) return absl::StrFormat("%d B", bytes);
  double value = static_cast<double>(bytes);
  int unit = -1;
  do {
    value /= 1024;
    ++unit;
  } while (value >= 1024 && unit < 4);
  return absl::StrFormat("%.1f %s", value, kUnits[unit]);
}

std::string HumanCount(uint64_t number) {
  std::string digits;
  const std::string all = std::to_string(number);
  for (size_t at = 0; at < all.size(); ++at) {
    if (at > 0 && (all.size() - at) % 3 == 0) digits += ',';
    digits += all[at];
  }
  return digits;
}

std::string HumanTime(const google::protobuf::Timestamp& time) {
  if (time.seconds() == 0) return "-";
  return absl::FormatTime("%Y-%m-%d %H:%M:%S", absl::FromUnixSeconds(time.seconds()),
                          absl::UTCTimeZone());
}

std::string Table::ToString() const {
  std::vector<size_t> widths(rows_[0].size());
  std::vector<bool> numbers(rows_[0].size(), rows_.size() > 1);
  for (size_t row = 0; row < rows_.size(); ++row) {
    for (size_t column = 0; column < rows_[row].size(); ++column) {
      widths[column] = std::max(widths[column], CodePoints(rows_[row][column]));
      if (row > 0 && !LooksLikeNumber(rows_[row][column])) numbers[column] = false;
    }
  }
  std::string text;
  for (const std::vector<std::string>& row : rows_) {
    std::string line;
    for (size_t column = 0; column < row.size(); ++column) {
      const std::string space(widths[column] - CodePoints(row[column]), ' ');
      if (column > 0) line += "  ";
      line += numbers[column] ? space + row[column] : row[column] + space;
    }
    while (!line.empty() && line.back() == ' ') line.pop_back();
    text += line + "\n";
  }
  return text;
}

}  // namespace memory3
