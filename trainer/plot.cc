#include "trainer/plot.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "nlohmann/json.hpp"

namespace memory3 {
namespace {

using nlohmann::json;

constexpr std::string_view kPage =
#include "trainer/plot_page.inc"
    ;

// Six digits are more than a screen shows.
double Rounded(double x) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%.6g", x);
  return std::strtod(digits, nullptr);
}

std::string EscapeHtml(std::string_view text) {
  return absl::StrReplaceAll({text.data(), text.size()},
                             {{"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}, {"\"", "&quot;"}});
}

}  // namespace

absl::StatusOr<RunCurves> ReadRunCurves(const std::string& path, const std::string& name) {
  std::error_code error;
  const std::string file =
      std::filesystem::is_directory(path, error) ? path + "/metrics.jsonl" : path;
  std::ifstream in(file);
  if (!in) return absl::NotFoundError(absl::StrCat(file, ": cannot be read"));
  RunCurves run;
  run.name = name;
  std::map<std::string, std::map<double, double>> points;
  double number = 0;
  for (std::string line; std::getline(in, line);) {
    if (line.empty()) continue;
    const json fields = json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!fields.is_object()) {
      ++run.bad_lines;
      continue;
    }
    number += 1;
    std::string x_name = "line";
    for (const char* candidate : {"seconds", "step"}) {
      if (fields.contains(candidate) && fields[candidate].is_number()) x_name = candidate;
    }
    const double x = x_name == "line" ? number : fields[x_name].get<double>();
    if (!std::isfinite(x)) {
      ++run.bad_lines;
      continue;
    }
    run.x_name = x_name;
    for (const auto& [field, value] : fields.items()) {
      if (field == x_name || !value.is_number()) continue;
      const double y = value.get<double>();
      if (std::isfinite(y)) points[field][x] = y;
    }
  }
  if (points.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, ": holds no metrics", run.bad_lines > 0 ? ", no line is JSON" : ""));
  }
  for (auto& [field, curve] : points) run.curves[field] = {curve.begin(), curve.end()};
  return run;
}

void Thin(RunCurves* run, size_t most) {
  for (auto& [field, curve] : run->curves) {
    if (curve.size() <= most) continue;
    const size_t n = curve.size();
    std::vector<std::pair<double, double>> thin(most);
    for (size_t i = 0; i < most; ++i) {
      const size_t begin = i * n / most, end = (i + 1) * n / most;
      double sum = 0;
      for (size_t j = begin; j < end; ++j) sum += curve[j].second;
      thin[i] = {curve[(begin + end - 1) / 2].first, sum / static_cast<double>(end - begin)};
    }
    curve = std::move(thin);
  }
}

std::string CurvesPage(const std::vector<RunCurves>& runs, const std::string& title) {
  json data = json::array();
  for (const RunCurves& run : runs) {
    json curves = json::object();
    for (const auto& [field, points] : run.curves) {
      json x = json::array(), y = json::array();
      for (const auto& point : points) {
        x.push_back(point.first);
        y.push_back(Rounded(point.second));
      }
      curves[field] = {std::move(x), std::move(y)};
    }
    data.push_back({{"name", run.name}, {"x", run.x_name}, {"curves", std::move(curves)}});
  }
  // "<" only as an escape, so that no name ends the script element. Names that are no UTF-8 are
  // mended.
  const std::string text =
      absl::StrReplaceAll(data.dump(-1, ' ', /*ensure_ascii=*/true, json::error_handler_t::replace),
                          {{"<", "\\u003c"}});
  return absl::StrReplaceAll(std::string(kPage),
                             {{"@DATA@", text}, {"@TITLE@", EscapeHtml(title)}});
}

}  // namespace memory3
