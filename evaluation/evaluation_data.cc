#include "evaluation/evaluation_data.h"

#include <algorithm>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "nlohmann/json.hpp"
#include "trainer/documents.h"
#include "trainer/random.h"
#include "transformer/atomic_file.h"

namespace memory3 {
namespace {

constexpr int kShards = 8;
// What the shared data's README holds out, besides SQuAD's titles.
constexpr int kHeldOutModulus = 10, kHeldOutRemainder = 3;
// Shorter lines are headings and remnants of tables.
constexpr size_t kShortestParagraph = 100;

// Paragraphs, found by their text.
class Paragraphs {
 public:
  // The index of the paragraph with this text.
  size_t Add(EvaluationDocument paragraph, int64_t article) {
    const auto [it, inserted] = by_text_.try_emplace(paragraph.text, all_.size());
    if (inserted) {
      all_.push_back(std::move(paragraph));
      articles_.push_back(article);
    }
    return it->second;
  }
  // SIZE_MAX: no such paragraph.
  size_t Find(const std::string& text) const {
    const auto it = by_text_.find(text);
    return it == by_text_.end() ? SIZE_MAX : it->second;
  }
  const EvaluationDocument& operator[](size_t i) const { return all_[i]; }
  int64_t ArticleOf(size_t i) const { return articles_[i]; }
  size_t size() const { return all_.size(); }

 private:
  std::vector<EvaluationDocument> all_;
  std::vector<int64_t> articles_;
  absl::flat_hash_map<std::string, size_t> by_text_;
};

// The long lines of held-out articles, and those, however short, that `wanted` holds.
absl::Status ReadArticles(const EvaluationDataOptions& options, const std::string& squad,
                          const absl::flat_hash_set<std::string>& wanted, Paragraphs* paragraphs) {
  HoldOut held_out(kHeldOutModulus, kHeldOutRemainder);
  if (absl::Status status = held_out.AddTitlesFrom(squad); !status.ok()) return status;
  std::vector<std::string> files;
  for (int shard = 0; shard < kShards; ++shard)
    files.push_back(absl::StrCat(options.directory, "/enwiki/articles-", shard, ".jsonl.zst"));
  absl::StatusOr<std::unique_ptr<DocumentReader>> reader = DocumentReader::Open(files);
  if (!reader.ok()) return reader.status();
  Document article;
  for (int64_t number = 1;; ++number) {
    const absl::StatusOr<bool> more = (*reader)->Next(&article);
    if (!more.ok()) return more.status();
    if (!*more) return absl::OkStatus();
    if (!held_out.Contains(article)) continue;
    int line_number = 0;
    for (const absl::string_view line : absl::StrSplit(article.text, '\n')) {
      std::string text(line);
      const int at = line_number++;
      if (text.size() < kShortestParagraph && !wanted.contains(text)) continue;
      paragraphs->Add(
          {absl::StrCat("enwiki/", article.id, "/", at), article.title, std::move(text)}, number);
    }
  }
}

// Questions in random order whose paragraph is there, up to the number asked for.
EvaluationSet Draw(const std::string& name, const std::vector<Question>& questions,
                   const Paragraphs& paragraphs, const EvaluationDataOptions& options) {
  EvaluationSet set = {.name = name};
  for (const uint32_t i : RandomOrder(static_cast<uint32_t>(questions.size()),
                                      Random({options.seed, 0x9e57, questions.size()}))) {
    const size_t found = paragraphs.Find(questions[i].passage);
    if (static_cast<int>(set.questions.size()) == options.questions) break;
    if (found != SIZE_MAX)
      set.questions.push_back({questions[i], paragraphs[found].id, paragraphs[found].title});
  }
  return set;
}

}  // namespace

absl::StatusOr<EvaluationData> ReadEvaluationData(const EvaluationDataOptions& options) {
  const std::string squad_file = options.directory + "/qa/squad.jsonl.zst";
  absl::StatusOr<std::vector<Question>> grounded =
      LoadQuestions(options.directory + "/qa/grounded-dev.jsonl.zst", HoldOut());
  if (!grounded.ok()) return grounded.status();
  absl::StatusOr<std::vector<Question>> squad = LoadSquadQuestions(squad_file);
  if (!squad.ok()) return squad.status();
  std::erase_if(*grounded, [&](const Question& q) { return q.title_words < options.title_words; });

  absl::flat_hash_set<std::string> wanted;
  for (const Question& question : *grounded) wanted.insert(question.passage);
  Paragraphs paragraphs;
  absl::flat_hash_map<std::string, int64_t> squad_articles;  // by title, below the others' numbers
  for (const Question& question : *squad) {
    const auto [article, inserted] = squad_articles.try_emplace(
        question.title, -static_cast<int64_t>(squad_articles.size()) - 1);
    paragraphs.Add({absl::StrCat("squad/", paragraphs.size()),
                    absl::StrReplaceAll(question.title, {{"_", " "}}), question.passage},
                   article->second);
  }
  if (absl::Status status = ReadArticles(options, squad_file, wanted, &paragraphs); !status.ok())
    return status;

  EvaluationData data;
  data.sets.push_back(Draw("grounded", *grounded, paragraphs, options));
  data.sets.push_back(Draw("squad", *squad, paragraphs, options));

  // Paragraphs of answers first, then of their articles, then the others.
  absl::flat_hash_set<size_t> answering;
  absl::flat_hash_set<int64_t> asked;
  for (const EvaluationSet& set : data.sets) {
    for (const EvaluationQuestion& question : set.questions) {
      const size_t at = paragraphs.Find(question.question.passage);
      answering.insert(at);
      asked.insert(paragraphs.ArticleOf(at));
    }
  }
  std::vector<uint32_t> order =
      RandomOrder(static_cast<uint32_t>(paragraphs.size()), Random({options.seed, 0xd0c5}));
  const auto rank = [&](uint32_t i) {
    return answering.contains(i) ? 0 : asked.contains(paragraphs.ArticleOf(i)) ? 1 : 2;
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](uint32_t a, uint32_t b) { return rank(a) < rank(b); });
  const size_t most = std::max<size_t>(static_cast<size_t>(options.documents), answering.size());
  order.resize(std::min(order.size(), most));
  for (const uint32_t i : order) data.documents.push_back(paragraphs[i]);
  return data;
}

absl::Status WriteEvaluationDocuments(const std::vector<EvaluationDocument>& documents,
                                      const std::string& path) {
  std::string lines;
  for (const EvaluationDocument& document : documents) {
    const nlohmann::json line = {
        {"id", document.id}, {"title", document.title}, {"text", document.text}};
    absl::StrAppend(&lines, line.dump(), "\n");
  }
  return WriteFileAtomically(path, lines);
}

absl::StatusOr<std::vector<EvaluationDocument>> SampleDocuments(const std::string& path,
                                                                int documents, uint64_t seed) {
  absl::StatusOr<std::unique_ptr<DocumentReader>> reader = DocumentReader::Open({path});
  if (!reader.ok()) return reader.status();
  std::vector<EvaluationDocument> all, drawn;
  for (Document document;;) {
    const absl::StatusOr<bool> more = (*reader)->Next(&document);
    if (!more.ok()) return more.status();
    if (!*more) break;
    all.push_back({document.id, document.title, document.text});
  }
  std::vector<uint32_t> order =
      RandomOrder(static_cast<uint32_t>(all.size()), Random({seed, 0xfac7}));
  order.resize(std::min(order.size(), static_cast<size_t>(documents)));
  for (const uint32_t i : order) drawn.push_back(std::move(all[i]));
  return drawn;
}

}  // namespace memory3
