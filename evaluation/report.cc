#include "evaluation/report.h"

#include <algorithm>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "nlohmann/json.hpp"
#include "transformer/json.h"

namespace memory3 {
namespace {

using nlohmann::json;

std::string Number(double value) {
  if (value >= 100) return absl::StrFormat("%.0f", value);
  if (value >= 10) return absl::StrFormat("%.1f", value);
  return absl::StrFormat("%.2f", value);
}

std::string Layers(const EvaluationRow& row) { return absl::StrJoin(row.memory_layers, " "); }

// What a row is called in its group.
std::string Label(const EvaluationRow& row) {
  if (row.ablation == "references_per_chunk") return absl::StrCat(row.references_per_chunk);
  if (row.ablation == "tokens_kept") return absl::StrCat(row.tokens_kept);
  if (row.ablation == "memory_layers") return Layers(row);
  return row.mode;
}

std::vector<std::string> AblationsOf(const std::vector<EvaluationRow>& rows) {
  std::vector<std::string> ablations;
  for (const EvaluationRow& row : rows)
    if (std::find(ablations.begin(), ablations.end(), row.ablation) == ablations.end())
      ablations.push_back(row.ablation);
  return ablations;
}

}  // namespace

bool SameSettings(const EvaluationRow& a, const EvaluationRow& b) {
  const auto settings = [](const EvaluationRow& r) {
    return std::tie(r.set, r.mode, r.ablation, r.references_per_chunk, r.tokens_kept,
                    r.memory_layers, r.model, r.prompt, r.questions_asked, r.documents, r.seed);
  };
  return settings(a) == settings(b);
}

std::string RowsToJson(const std::vector<EvaluationRow>& rows) {
  json list = json::array();
  for (const EvaluationRow& r : rows) {
    list.push_back({{"set", r.set},
                    {"mode", r.mode},
                    {"ablation", r.ablation},
                    {"references_per_chunk", r.references_per_chunk},
                    {"tokens_kept", r.tokens_kept},
                    {"memory_layers", r.memory_layers},
                    {"model", r.model},
                    {"prompt", r.prompt},
                    {"questions_asked", r.questions_asked},
                    {"documents", r.documents},
                    {"seed", r.seed},
                    {"questions", r.questions},
                    {"em", r.em},
                    {"f1", r.f1},
                    {"nll", r.nll},
                    {"recall_at_5", r.recall ? json(*r.recall) : json()},
                    {"ttft_ms", r.ttft_ms},
                    {"tokens_per_s", r.tokens_per_s},
                    {"bytes_per_reference", r.bytes_per_reference},
                    {"references", r.references}});
  }
  return list.dump(1) + "\n";
}

absl::StatusOr<std::vector<EvaluationRow>> RowsFromJson(const std::string& text,
                                                        const std::string& source) {
  const absl::StatusOr<json> list = ParseJson(text, source);
  if (!list.ok()) return list.status();
  std::vector<EvaluationRow> rows;
  try {
    for (const json& r : *list) {
      EvaluationRow& row = rows.emplace_back();
      r.at("set").get_to(row.set);
      r.at("mode").get_to(row.mode);
      r.at("ablation").get_to(row.ablation);
      r.at("references_per_chunk").get_to(row.references_per_chunk);
      r.at("tokens_kept").get_to(row.tokens_kept);
      r.at("memory_layers").get_to(row.memory_layers);
      r.at("model").get_to(row.model);
      r.at("prompt").get_to(row.prompt);
      r.at("questions_asked").get_to(row.questions_asked);
      r.at("documents").get_to(row.documents);
      r.at("seed").get_to(row.seed);
      r.at("questions").get_to(row.questions);
      r.at("em").get_to(row.em);
      r.at("f1").get_to(row.f1);
      r.at("nll").get_to(row.nll);
      if (!r.at("recall_at_5").is_null()) row.recall = r.at("recall_at_5").get<double>();
      r.at("ttft_ms").get_to(row.ttft_ms);
      r.at("tokens_per_s").get_to(row.tokens_per_s);
      r.at("bytes_per_reference").get_to(row.bytes_per_reference);
      r.at("references").get_to(row.references);
    }
  } catch (const json::exception& error) {
    return absl::InvalidArgumentError(absl::StrCat(source, ": ", error.what()));
  }
  return rows;
}

std::string RowsToMarkdown(const std::vector<EvaluationRow>& rows) {
  std::string text;
  for (const std::string& ablation : AblationsOf(rows)) {
    absl::StrAppend(&text, text.empty() ? "" : "\n",
                    "| set | mode | references a chunk | tokens kept | memory layers | EM % | F1 % "
                    "| NLL | recall % | TTFT ms | tokens/s | bytes/reference |\n"
                    "|---|---|---|---|---|---|---|---|---|---|---|---|\n");
    for (const EvaluationRow& row : rows) {
      if (row.ablation != ablation) continue;
      const bool memory = !row.memory_layers.empty();
      absl::StrAppend(
          &text, "| ", row.set, " | ", row.mode, " | ",
          row.references_per_chunk > 0 ? absl::StrCat(row.references_per_chunk) : "–", " | ",
          memory ? absl::StrCat(row.tokens_kept) : "–", " | ", memory ? Layers(row) : "–", " | ",
          absl::StrFormat("%.1f | %.1f | ", 100 * row.em, 100 * row.f1), Number(row.nll), " | ",
          row.recall ? absl::StrFormat("%.1f", 100 * *row.recall) : "–", " | ", Number(row.ttft_ms),
          " | ", Number(row.tokens_per_s), " | ",
          row.bytes_per_reference > 0 ? absl::StrFormat("%.0f", row.bytes_per_reference) : "–",
          " |\n");
    }
  }
  return text;
}

std::string RowsToSvg(const std::vector<EvaluationRow>& rows, const std::string& ablation) {
  constexpr int kWidth = 820, kPanel = 190, kLeft = 60, kRight = 20, kTop = 34, kBars = 110;
  constexpr const char* kColours[] = {"#3465a4", "#cc7000", "#4e9a06", "#75507b"};
  std::vector<std::string> labels, sets;
  for (const EvaluationRow& row : rows) {
    if (row.ablation != ablation) continue;
    const std::string label = Label(row);
    if (std::find(labels.begin(), labels.end(), label) == labels.end()) labels.push_back(label);
    if (std::find(sets.begin(), sets.end(), row.set) == sets.end()) sets.push_back(row.set);
  }
  if (labels.empty()) return "";
  struct Panel {
    const char* title;
    double (*value)(const EvaluationRow&);
  };
  const Panel panels[] = {
      {"exact match, %", [](const EvaluationRow& r) { return 100 * r.em; }},
      {"F1, %", [](const EvaluationRow& r) { return 100 * r.f1; }},
      {"negative log-likelihood of a gold answer's token, nats (lower is better)",
       [](const EvaluationRow& r) { return r.nll; }}};
  std::string svg = absl::StrFormat(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" font-family=\"sans-serif\" "
      "font-size=\"12\">\n<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n",
      kWidth, 24 + 3 * kPanel);
  for (size_t s = 0; s < sets.size(); ++s) {
    const int x = kLeft + static_cast<int>(s) * 120;
    absl::StrAppend(&svg, "<rect x=\"", x, "\" y=\"8\" width=\"12\" height=\"12\" fill=\"",
                    kColours[s % std::size(kColours)], "\"/><text x=\"", x + 17, "\" y=\"18\">",
                    sets[s], "</text>\n");
  }
  const double group =
      static_cast<double>(kWidth - kLeft - kRight) / static_cast<double>(labels.size());
  const double bar = std::min(40.0, 0.8 * group / static_cast<double>(sets.size()));
  for (size_t p = 0; p < std::size(panels); ++p) {
    const double top = 24 + static_cast<double>(p) * kPanel + kTop, base = top + kBars;
    double most = 0;
    for (const EvaluationRow& row : rows)
      if (row.ablation == ablation) most = std::max(most, panels[p].value(row));
    if (most == 0) most = 1;
    absl::StrAppend(&svg, absl::StrFormat("<text x=\"%d\" y=\"%.0f\" font-weight=\"bold\">%s</text>"
                                          "<line x1=\"%d\" y1=\"%.1f\" x2=\"%d\" y2=\"%.1f\" "
                                          "stroke=\"black\"/>\n",
                                          kLeft, top - 14, panels[p].title, kLeft, base,
                                          kWidth - kRight, base));
    for (size_t l = 0; l < labels.size(); ++l) {
      const double centre = kLeft + (static_cast<double>(l) + 0.5) * group;
      absl::StrAppend(&svg, absl::StrFormat("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\" "
                                            "font-size=\"11\">%s</text>\n",
                                            centre, base + 15, labels[l]));
      for (const EvaluationRow& row : rows) {
        if (row.ablation != ablation || Label(row) != labels[l]) continue;
        const auto s = std::find(sets.begin(), sets.end(), row.set) - sets.begin();
        const double value = panels[p].value(row), height = kBars * value / most;
        const double x =
            centre + (static_cast<double>(s) - static_cast<double>(sets.size()) / 2) * bar;
        absl::StrAppend(
            &svg,
            absl::StrFormat(
                "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"%s\"/>"
                "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\" font-size=\"9\">%s</text>\n",
                x, base - height, bar - 1, height,
                kColours[static_cast<size_t>(s) % std::size(kColours)], x + bar / 2,
                base - height - 2, Number(value)));
      }
    }
  }
  return svg + "</svg>\n";
}

}  // namespace memory3
