#include "trainer/retrieval_recall.h"

#include <dnnl.h>

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "embedder/bm25.h"
#include "embedder/idf_table.h"
#include "trainer/documents.h"

namespace memory3 {
namespace {

constexpr size_t kLeastBytes = 80;  // shorter paragraphs are headings
constexpr int kQueryBatch = 256;

// Calls `use(document)` for every document with `field` as its text.
template <typename Use>
absl::Status ForEachDocument(const std::vector<std::string>& paths, std::string field,
                             std::string title_field, Use use) {
  DocumentOptions options;
  options.text_field = std::move(field);
  options.title_field = std::move(title_field);
  options.strict = true;
  absl::StatusOr<std::unique_ptr<DocumentReader>> reader = DocumentReader::Open(paths, options);
  if (!reader.ok()) return reader.status();
  Document document;
  while (true) {
    absl::StatusOr<bool> found = (*reader)->Next(&document);
    if (!found.ok()) return found.status();
    if (!*found) return absl::OkStatus();
    use(document);
  }
}

int RankOf(const float* scores, size_t n, int gold) {
  return static_cast<int>(
      std::count_if(scores, scores + n, [&](float s) { return s > scores[gold]; }));
}

}  // namespace

std::vector<std::string_view> CutAtSentences(std::string_view paragraph, int max_bytes) {
  std::vector<std::string_view> pieces;
  size_t begin = 0, end = 0;  // the piece so far; end: after a sentence
  for (size_t i = 0; i < paragraph.size(); ++i) {
    const char c = paragraph[i];
    const bool last = i + 1 == paragraph.size();
    if (!last && !((c == '.' || c == '!' || c == '?') && paragraph[i + 1] == ' ')) continue;
    if (end > begin && i + 1 - begin > static_cast<size_t>(max_bytes)) {
      pieces.push_back(paragraph.substr(begin, end - begin));
      begin = end;
      while (begin < i && paragraph[begin] == ' ') ++begin;
    }
    end = i + 1;
  }
  if (end > begin) pieces.push_back(paragraph.substr(begin, end - begin));
  return pieces;
}

absl::StatusOr<RetrievalSet> LoadRetrievalSet(const std::string& questions,
                                              const std::vector<std::string>& articles,
                                              const RetrievalSetOptions& options) {
  RetrievalSet set;
  absl::flat_hash_map<std::string, int> passages;
  // The passage is read as the text, the question as the title.
  absl::Status status =
      ForEachDocument({questions}, "passage", "question", [&](const Document& document) {
        if (static_cast<int64_t>(set.questions.size()) >= options.max_questions) return;
        const auto [it, inserted] =
            passages.try_emplace(document.text, static_cast<int>(set.references.size()));
        if (inserted) set.references.push_back(document.text);
        set.questions.push_back(document.title);
        set.gold.push_back(it->second);
      });
  if (!status.ok()) return status;

  absl::flat_hash_set<std::string> passage_pieces;
  for (const std::string& passage : set.references) {
    for (std::string_view piece : CutAtSentences(passage, options.reference_bytes)) {
      passage_pieces.emplace(piece);
    }
  }
  const HoldOut chosen(options.modulus, options.remainder);
  std::vector<std::pair<uint64_t, std::string>> others;
  status = ForEachDocument(articles, "text", "title", [&](const Document& document) {
    if (options.modulus > 0 && !chosen.Contains(document)) return;
    for (const std::string& paragraph :
         std::vector<std::string>(absl::StrSplit(document.text, '\n'))) {
      if (paragraph.size() < kLeastBytes || passages.contains(paragraph)) continue;
      for (std::string_view piece : CutAtSentences(paragraph, options.reference_bytes)) {
        if (piece.size() < kLeastBytes || passage_pieces.contains(std::string(piece))) continue;
        others.emplace_back(HashWord(piece), piece);
      }
    }
  });
  if (!status.ok()) return status;
  std::sort(others.begin(), others.end());
  others.erase(std::unique(others.begin(), others.end()), others.end());
  if (static_cast<int64_t>(others.size()) < options.other_references) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the articles give ", others.size(), " other references, not ", options.other_references));
  }
  for (int64_t i = 0; i < options.other_references; ++i) {
    set.references.push_back(std::move(others[i].second));
  }
  return set;
}

double Bm25Recall(const RetrievalSet& set, int k, double k1, double b) {
  Bm25Index index(k1, b);
  for (const std::string& reference : set.references) index.Add(reference);
  int64_t found = 0;
  for (size_t i = 0; i < set.questions.size(); ++i) {
    const std::vector<float> scores = index.Scores(set.questions[i]);
    if (RankOf(scores.data(), scores.size(), set.gold[i]) < k) ++found;
  }
  return static_cast<double>(found) / static_cast<double>(set.questions.size());
}

absl::StatusOr<double> EmbedderRecall(const RetrievalSet& set, int k, const Embedder& embedder) {
  const int64_t dimension = embedder.dimension();
  const auto embed =
      [&](const std::vector<std::string>& texts) -> absl::StatusOr<std::vector<float>> {
    const std::vector<std::string_view> views(texts.begin(), texts.end());
    std::vector<float> vectors(texts.size() * dimension);
    if (absl::Status status = embedder.Embed(views, vectors); !status.ok()) {
      return status;
    }
    return vectors;
  };
  absl::StatusOr<std::vector<float>> references = embed(set.references);
  if (!references.ok()) return references.status();
  absl::StatusOr<std::vector<float>> questions = embed(set.questions);
  if (!questions.ok()) return questions.status();

  const auto n = static_cast<int64_t>(set.references.size());
  const auto count = static_cast<int64_t>(set.questions.size());
  std::vector<float> scores(kQueryBatch * n);
  int64_t found = 0;
  for (int64_t begin = 0; begin < count; begin += kQueryBatch) {
    const int64_t rows = std::min<int64_t>(kQueryBatch, count - begin);
    const dnnl_status_t status =
        dnnl_sgemm('N', 'T', rows, n, dimension, 1.0f, questions->data() + begin * dimension,
                   dimension, references->data(), dimension, 0.0f, scores.data(), n);
    if (status != dnnl_success) return absl::InternalError("dnnl_sgemm failed");
    for (int64_t i = 0; i < rows; ++i) {
      if (RankOf(scores.data() + i * n, n, set.gold[begin + i]) < k) ++found;
    }
  }
  return static_cast<double>(found) / static_cast<double>(count);
}

}  // namespace memory3
