// Questions with the passages that answer them, the references these are cut into, and examples:
// a question, its answer, the gold reference and the nearest others of the store.
//
// Thread-safety: immutable once made.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "embedder/embedder.h"
#include "trainer/documents.h"
#include "trainer/references.h"
#include "transformer/tokenizer.h"

namespace memory3 {

struct Question {
  std::string question;
  std::vector<std::string> answers;  // all that count as right, answer_found among them
  std::string answer;                // as it stands in the passage: what is taught
  std::string title, passage;
  int64_t document = 0;
  int title_words = 0;  // of the title that stand in the question (n_title_words)
};

// A .jsonl file (also .gz, .zst) with question, answers, answer_found, title, passage, doc_id and
// n_title_words. INVALID_ARGUMENT names file, line and field; the errors of CompressedFile. Those
// that `hold_out` holds (by doc_id and title) are left out.
absl::StatusOr<std::vector<Question>> LoadQuestions(const std::string& path,
                                                    const HoldOut& hold_out);

// The questions of a SQuAD file as the shared data has it that can be answered: a .jsonl (also .gz,
// .zst) with question, answers, context, title and unanswerable. `document` is 0. Errors as above.
absl::StatusOr<std::vector<Question>> LoadSquadQuestions(const std::string& path);

// References, all different, and exact search over them by cosine.
class QaStore {
 public:
  // `embedder` must outlive it.
  explicit QaStore(const Embedder* embedder) : embedder_(embedder) {}
  // The reference's index; one that is there already keeps its index.
  int Add(CutReference reference);
  // Embeds what was added since. Call before Search.
  absl::Status Embed();
  // The `k` nearest of each query, best first.
  absl::StatusOr<std::vector<std::vector<int>>> Search(const std::vector<std::string>& queries,
                                                       int k) const;
  int size() const { return static_cast<int>(references_.size()); }
  const CutReference& reference(int i) const { return references_[i]; }

 private:
  const Embedder* embedder_;
  std::vector<CutReference> references_;
  absl::flat_hash_map<std::string, int> index_;  // by text
  std::vector<float> vectors_;                   // [size, dimension], of the first so many
};

// Whether a text holds the words of an answer in a row, both normalised (qa_metrics.h).
bool HoldsAnswer(std::string_view text, std::string_view answer);

struct QaExample {
  std::vector<int32_t> prompt;  // without `<s>`
  std::vector<int32_t> answer;  // with eos where the tokenizer has one
  int gold = -1;                // of the store
  std::vector<int> others;      // the nearest that are not gold, best first
  int question = -1;            // of the questions; -1: a cloze
};

// The prompt, fixed: "Question: " question "\nAnswer:". The answer follows as " " answer.
std::string QaPrompt(std::string_view question);
std::vector<int32_t> EncodeAnswer(const Tokenizer& tokenizer, std::string_view answer);

struct QaExampleCounts {
  int64_t examples = 0, without_answer = 0;  // the latter: cut so that no piece has the answer
};

// Cuts the passages into `store` and finds each question's gold reference, the first piece that has
// the answer's words in a row (where none has: the first piece, or no example if `skip`), and
// `others` more. A piece has at most `reference_tokens` tokens.
absl::StatusOr<std::vector<QaExample>> MakeQaExamples(const std::vector<Question>& questions,
                                                      const Tokenizer& tokenizer,
                                                      int reference_tokens, int others, bool skip,
                                                      QaStore* store, QaExampleCounts* counts);

// Cloze questions: of a sentence of a reference of the store, a capitalised name or a number that
// stands once in the reference is the answer, the words around it, some dropped at random, are the
// question. About `n` of them, a function of `seed`. They teach to find a place by its words and to
// copy what stands there.
std::vector<QaExample> MakeClozeExamples(const QaStore& store, const Tokenizer& tokenizer, int n,
                                         uint64_t seed);
// Fills `others` of examples: the `k` nearest to their prompts' questions that are not gold.
absl::Status FindOthers(const QaStore& store, const std::vector<std::string>& queries, int k,
                        std::vector<QaExample>* examples);

}  // namespace memory3
