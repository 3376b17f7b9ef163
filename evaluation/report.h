// The evaluation's rows: what was measured, under which settings; as JSON, as a table, as plots.
//
// Thread-safety: functions and plain values.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace memory3 {

struct EvaluationRow {
  // Settings. Rows that agree in all of them are the same measurement.
  std::string set;       // of questions
  std::string mode;      // how they were read: "none", "memory_vq", "text_gold", …
  std::string ablation;  // what it varies: "", "references_per_chunk", "tokens_kept", …
  int references_per_chunk = 0;
  int tokens_kept = 0;
  std::vector<int> memory_layers;
  std::string model;  // the unchanged model's fingerprint
  std::string prompt;
  int questions_asked = 0, documents = 0;
  uint64_t seed = 0;

  // Measured: means over the questions.
  int64_t questions = 0;
  double em = 0, f1 = 0;
  double nll = 0;  // of a gold answer's token, nats: all answers' sum over all their tokens
  std::optional<double> recall;  // nothing was retrieved: none
  double ttft_ms = 0;            // median
  double tokens_per_s = 0;       // of decoding, one sequence at a time
  double bytes_per_reference = 0;
  int64_t references = 0;  // in the knowledge base
};

// Whether both are the same measurement, done or not.
bool SameSettings(const EvaluationRow& a, const EvaluationRow& b);

// A JSON list of objects with the fields' names, `recall` as "recall_at_5".
std::string RowsToJson(const std::vector<EvaluationRow>& rows);
// INVALID_ARGUMENT names `source` and what is wrong.
absl::StatusOr<std::vector<EvaluationRow>> RowsFromJson(const std::string& json,
                                                        const std::string& source);

// Markdown: the modes first, then a table for each ablation.
std::string RowsToMarkdown(const std::vector<EvaluationRow>& rows);

// Exact match, F1 and negative log-likelihood as bars, a group for each row's setting and a colour
// for each set of questions. `ablation` "": the modes. A self-contained SVG; "" without such rows.
std::string RowsToSvg(const std::vector<EvaluationRow>& rows, const std::string& ablation);

}  // namespace memory3
