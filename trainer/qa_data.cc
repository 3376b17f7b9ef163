#include "trainer/qa_data.h"

#include <dnnl.h>

#include <algorithm>
#include <initializer_list>
#include <numeric>
#include <optional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "trainer/cloze.h"
#include "trainer/compressed_file.h"
#include "trainer/qa_metrics.h"
#include "trainer/random.h"
#include "transformer/json.h"

namespace memory3 {
namespace {

using nlohmann::json;

constexpr size_t kMostFileBytes = size_t{1} << 30;
constexpr int kTextsAtOnce = 512;

absl::StatusOr<std::string> ReadWhole(const std::string& path) {
  absl::StatusOr<std::unique_ptr<CompressedFile>> file = CompressedFile::Open(path);
  if (!file.ok()) return file.status();
  std::string text;
  std::vector<char> buffer(size_t{1} << 20);
  while (true) {
    absl::StatusOr<size_t> n = (*file)->Read(buffer);
    if (!n.ok()) return n.status();
    if (*n == 0) return text;
    text.append(buffer.data(), *n);
    if (text.size() > kMostFileBytes) {
      return absl::ResourceExhaustedError(absl::StrCat(path, ": more than 1 GiB of questions"));
    }
  }
}

absl::Status ReadString(const json& line, const char* field, const std::string& place,
                        std::string* out) {
  const auto found = line.find(field);
  if (found == line.end() || !found->is_string() || found->get<std::string>().empty()) {
    return absl::InvalidArgumentError(absl::StrCat(place, ": field \"", field, "\" is no text"));
  }
  *out = found->get<std::string>();
  return absl::OkStatus();
}

absl::Status ReadAnswers(const json& line, const std::string& place, Question* q) {
  const auto answers = line.find("answers");
  if (answers == line.end() || !answers->is_array()) {
    return absl::InvalidArgumentError(absl::StrCat(place, ": field \"answers\" is no list"));
  }
  for (const json& answer : *answers) {
    if (!answer.is_string()) {
      return absl::InvalidArgumentError(absl::StrCat(place, ": field \"answers\" holds no text"));
    }
    q->answers.push_back(answer.get<std::string>());
  }
  return absl::OkStatus();
}

absl::Status ReadTexts(
    const json& line, const std::string& place,
    std::initializer_list<std::pair<const char*, std::string*>> fields_and_texts) {
  for (const auto& [field, out] : fields_and_texts) {
    if (absl::Status status = ReadString(line, field, place, out); !status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::optional<Question>> ParseQuestion(const json& line, const std::string& place,
                                                      const HoldOut& hold_out) {
  Question q;
  absl::Status status = ReadTexts(line, place,
                                  {{"question", &q.question},
                                   {"answer_found", &q.answer},
                                   {"title", &q.title},
                                   {"passage", &q.passage}});
  if (status.ok()) status = ReadAnswers(line, place, &q);
  if (!status.ok()) return status;
  if (std::find(q.answers.begin(), q.answers.end(), q.answer) == q.answers.end()) {
    q.answers.push_back(q.answer);
  }
  for (const char* field : {"doc_id", "n_title_words"}) {
    const auto found = line.find(field);
    if (found == line.end() || !found->is_number_integer()) {
      return absl::InvalidArgumentError(
          absl::StrCat(place, ": field \"", field, "\" is no whole number"));
    }
  }
  q.document = line["doc_id"].get<int64_t>();
  q.title_words = line["n_title_words"].get<int>();
  Document document;
  document.id = absl::StrCat(q.document);
  document.title = q.title;
  if (hold_out.Contains(document)) return std::nullopt;
  return q;
}

absl::StatusOr<std::optional<Question>> ParseSquadQuestion(const json& line,
                                                           const std::string& place) {
  const auto unanswerable = line.find("unanswerable");
  if (unanswerable == line.end() || !unanswerable->is_boolean()) {
    return absl::InvalidArgumentError(
        absl::StrCat(place, ": field \"unanswerable\" is neither true nor false"));
  }
  if (unanswerable->get<bool>()) return std::nullopt;
  Question q;
  absl::Status status = ReadTexts(
      line, place, {{"question", &q.question}, {"title", &q.title}, {"context", &q.passage}});
  if (status.ok()) status = ReadAnswers(line, place, &q);
  if (!status.ok()) return status;
  if (q.answers.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(place, ": field \"answers\" is empty"));
  }
  q.answer = q.answers[0];
  return q;
}

// Questions of the lines that `parse`(line, place) takes: nothing leaves one out.
template <typename Parse>
absl::StatusOr<std::vector<Question>> ReadQuestionLines(const std::string& path, Parse parse) {
  absl::StatusOr<std::string> text = ReadWhole(path);
  if (!text.ok()) return text.status();
  std::vector<Question> questions;
  int64_t number = 0;
  for (const absl::string_view line : absl::StrSplit(*text, '\n')) {
    ++number;
    if (absl::StripAsciiWhitespace(line).empty()) continue;
    const std::string place = absl::StrCat(path, ":", number);
    absl::StatusOr<json> object = ParseJson(std::string_view(line.data(), line.size()), place);
    if (!object.ok()) return object.status();
    if (!object->is_object()) return absl::InvalidArgumentError(absl::StrCat(place, ": no object"));
    absl::StatusOr<std::optional<Question>> question = parse(*object, place);
    if (!question.ok()) return question.status();
    if (question->has_value()) questions.push_back(**std::move(question));
  }
  if (questions.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": holds no question to use"));
  }
  return questions;
}

// Whether `words` stand in a row in `text`.
bool HasWords(const std::vector<std::string>& text, const std::vector<std::string>& words) {
  return !words.empty() &&
         std::search(text.begin(), text.end(), words.begin(), words.end()) != text.end();
}

}  // namespace

absl::StatusOr<std::vector<Question>> LoadQuestions(const std::string& path,
                                                    const HoldOut& hold_out) {
  return ReadQuestionLines(path, [&](const json& line, const std::string& place) {
    return ParseQuestion(line, place, hold_out);
  });
}

absl::StatusOr<std::vector<Question>> LoadSquadQuestions(const std::string& path) {
  return ReadQuestionLines(path, ParseSquadQuestion);
}

bool HoldsAnswer(std::string_view text, std::string_view answer) {
  return HasWords(AnswerWords(text), AnswerWords(answer));
}

int QaStore::Add(CutReference reference) {
  const auto [it, inserted] = index_.try_emplace(reference.text, size());
  if (inserted) references_.push_back(std::move(reference));
  return it->second;
}

absl::Status QaStore::Embed() {
  const size_t dimension = embedder_->dimension();
  size_t at = vectors_.size() / dimension;
  vectors_.resize(references_.size() * dimension);
  while (at < references_.size()) {
    const size_t n = std::min<size_t>(kTextsAtOnce, references_.size() - at);
    std::vector<std::string_view> texts;
    for (size_t i = at; i < at + n; ++i) texts.push_back(references_[i].text);
    absl::Status status =
        embedder_->Embed(texts, std::span(vectors_).subspan(at * dimension, n * dimension));
    if (!status.ok()) return status;
    at += n;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<std::vector<int>>> QaStore::Search(
    const std::vector<std::string>& queries, int k) const {
  const int64_t dimension = embedder_->dimension(), n = size();
  std::vector<std::vector<int>> found;
  std::vector<int> order(n);
  for (size_t at = 0; at < queries.size(); at += kTextsAtOnce) {
    const size_t count = std::min<size_t>(kTextsAtOnce, queries.size() - at);
    std::vector<float> vectors(count * dimension), scores(count * n);
    const std::vector<std::string_view> views(queries.begin() + static_cast<int64_t>(at),
                                              queries.begin() + static_cast<int64_t>(at + count));
    if (absl::Status status = embedder_->Embed(views, vectors); !status.ok()) return status;
    if (dnnl_sgemm('N', 'T', static_cast<dnnl_dim_t>(count), n, dimension, 1, vectors.data(),
                   dimension, vectors_.data(), dimension, 0, scores.data(), n) != dnnl_success) {
      return absl::InternalError("oneDNN: sgemm failed");
    }
    for (size_t q = 0; q < count; ++q) {
      const float* row = scores.data() + q * n;
      std::iota(order.begin(), order.end(), 0);
      const int64_t best = std::min<int64_t>(k, n);
      std::partial_sort(order.begin(), order.begin() + best, order.end(),
                        [&](int a, int b) { return row[a] != row[b] ? row[a] > row[b] : a < b; });
      found.emplace_back(order.begin(), order.begin() + best);
    }
  }
  return found;
}

std::string QaPrompt(std::string_view question) {
  return absl::StrCat("Question: ", std::string(question), "\nAnswer:");
}

std::vector<int32_t> EncodeAnswer(const Tokenizer& tokenizer, std::string_view answer) {
  const bool own_space = tokenizer.leading_space() != LeadingSpace::kNone;
  std::vector<int32_t> ids =
      tokenizer.Encode(absl::StrCat(own_space ? "" : " ", std::string(answer)));
  if (tokenizer.eos_id() >= 0) ids.push_back(tokenizer.eos_id());
  return ids;
}

absl::Status FindOthers(const QaStore& store, const std::vector<std::string>& queries, int k,
                        std::vector<QaExample>* examples) {
  absl::StatusOr<std::vector<std::vector<int>>> found = store.Search(queries, k + 1);
  if (!found.ok()) return found.status();
  for (size_t i = 0; i < examples->size(); ++i) {
    QaExample& example = (*examples)[i];
    example.others.clear();
    for (const int r : (*found)[i]) {
      if (r != example.gold && static_cast<int>(example.others.size()) < k) {
        example.others.push_back(r);
      }
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<QaExample>> MakeQaExamples(const std::vector<Question>& questions,
                                                      const Tokenizer& tokenizer,
                                                      int reference_tokens, int others, bool skip,
                                                      QaStore* store, QaExampleCounts* counts) {
  std::vector<QaExample> examples;
  std::vector<std::string> queries;
  for (size_t q = 0; q < questions.size(); ++q) {
    const Question& question = questions[q];
    absl::StatusOr<std::vector<CutReference>> pieces =
        CutReferences(question.title, question.passage, tokenizer, reference_tokens);
    if (!pieces.ok()) return pieces.status();
    const std::vector<std::string> words = AnswerWords(question.answer);
    QaExample example;
    example.question = static_cast<int>(q);
    int first = -1;
    for (CutReference& piece : *pieces) {
      const bool has = HasWords(AnswerWords(piece.text), words);
      const int index = store->Add(std::move(piece));
      if (first < 0) first = index;
      if (has && example.gold < 0) example.gold = index;
    }
    if (example.gold < 0) {
      ++counts->without_answer;
      if (skip || first < 0) continue;
      example.gold = first;
    }
    example.prompt = tokenizer.Encode(QaPrompt(question.question));
    example.answer = EncodeAnswer(tokenizer, question.answer);
    queries.push_back(question.question);
    examples.push_back(std::move(example));
  }
  if (examples.empty()) return absl::InvalidArgumentError("questions: none has an answer to read");
  counts->examples = static_cast<int64_t>(examples.size());
  absl::Status status = store->Embed();
  if (status.ok()) status = FindOthers(*store, queries, others, &examples);
  if (!status.ok()) return status;
  return examples;
}

std::vector<QaExample> MakeClozeExamples(const QaStore& store, const Tokenizer& tokenizer, int n,
                                         uint64_t seed) {
  constexpr int kTries = 40;  // for each
  std::vector<QaExample> examples;
  for (int64_t i = 0; i < int64_t{n} * kTries && static_cast<int>(examples.size()) < n; ++i) {
    Random random({seed, static_cast<uint64_t>(i), 0xc102e});
    const int r = static_cast<int>(random.Below(store.size()));
    const Cloze cloze = TryCloze(store.reference(r), &random);
    if (cloze.question.empty()) continue;
    QaExample& example = examples.emplace_back();
    example.prompt = tokenizer.Encode(QaPrompt(cloze.question));
    example.answer = EncodeAnswer(tokenizer, cloze.answer);
    example.gold = r;
  }
  return examples;
}

}  // namespace memory3
