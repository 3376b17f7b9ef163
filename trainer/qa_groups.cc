#include "trainer/qa_groups.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <utility>

#include "trainer/cloze.h"
#include "trainer/qa_batches.h"
#include "trainer/random.h"

namespace memory3 {
namespace {

constexpr int kTriesForCloze = 12;
constexpr std::array<int, 4> kSparse = {64, 32, 16, 8};

bool Has(const std::vector<int>& list, int value) {
  return std::find(list.begin(), list.end(), value) != list.end();
}

}  // namespace

std::vector<QaGroup> GroupQuestions(const std::vector<QaExample>& examples,
                                    const std::vector<Question>& questions, int references,
                                    const QaGroupOptions& options, int64_t epoch) {
  std::map<int64_t, std::vector<int>> of_document;
  std::map<int, std::vector<int>> of_gold;
  const std::vector<uint32_t> order =
      RandomOrder(static_cast<uint32_t>(examples.size()),
                  Random({options.seed, static_cast<uint64_t>(epoch), 0x9c0}));
  for (const uint32_t i : order) {
    of_document[questions[examples[i].question].document].push_back(static_cast<int>(i));
    of_gold[examples[i].gold].push_back(static_cast<int>(i));
  }
  std::vector<bool> asked(examples.size());
  std::vector<QaGroup> groups;
  for (const uint32_t first : order) {
    if (asked[first]) continue;
    QaGroup& group = groups.emplace_back();
    const auto ask = [&](int i) {
      asked[i] = true;
      group.questions.push_back(i);
      if (!Has(group.references, examples[i].gold)) group.references.push_back(examples[i].gold);
    };
    ask(static_cast<int>(first));
    const int golds = std::min(options.golds, references);
    for (const int i : of_document[questions[examples[first].question].document]) {
      if (static_cast<int>(group.questions.size()) >= options.questions) break;
      const bool room = static_cast<int>(group.references.size()) < golds;
      if (!asked[i] && (room || Has(group.references, examples[i].gold))) ask(i);
    }
    for (const int r : examples[first].others) {
      if (static_cast<int>(group.references.size()) >= references) break;
      if (!Has(group.references, r)) group.references.push_back(r);
    }
    // What was retrieved may answer other questions.
    const std::vector<int> reads = group.references;
    for (const int r : reads) {
      const auto found = of_gold.find(r);
      if (found == of_gold.end()) continue;
      for (const int i : found->second) {
        if (static_cast<int>(group.questions.size()) < options.questions && !asked[i]) ask(i);
      }
    }
  }
  return groups;
}

absl::StatusOr<std::vector<TextPieces>> CutTexts(const std::vector<std::string>& paths,
                                                 const HoldOut& hold_out,
                                                 const Tokenizer& tokenizer, int reference_tokens,
                                                 int most_pieces) {
  auto reader = DocumentReader::Open(paths);
  if (!reader.ok()) return reader.status();
  // No piece is longer, but for a word of many bytes that is one token.
  const size_t most_bytes = size_t{8} * reference_tokens * most_pieces;
  std::vector<TextPieces> texts;
  Document document;
  while (true) {
    absl::StatusOr<bool> more = (*reader)->Next(&document);
    if (!more.ok()) return more.status();
    if (!*more) return texts;
    if (hold_out.Contains(document)) continue;
    std::string_view text = document.text;
    if (text.size() > most_bytes) text = text.substr(0, text.find(' ', most_bytes));
    auto pieces = CutReferences(document.title, text, tokenizer, reference_tokens);
    if (!pieces.ok()) return pieces.status();
    if (pieces->size() > static_cast<size_t>(most_pieces)) pieces->resize(most_pieces);
    if (pieces->size() >= 2) texts.push_back(*std::move(pieces));
  }
}

QaGroupBatches::QaGroupBatches(const ModelConfig* config, const Tokenizer* tokenizer,
                               const QaStore* store, const std::vector<Question>* questions,
                               std::vector<QaExample> examples, std::vector<TextPieces> texts,
                               ContinualBatches* rehearsal, QaGroupOptions options)
    : config_(config),
      tokenizer_(tokenizer),
      store_(store),
      questions_(questions),
      examples_(std::move(examples)),
      texts_(std::move(texts)),
      rehearsal_(rehearsal),
      options_(std::move(options)) {}

const QaGroup& QaGroupBatches::GroupAt(int64_t number) {
  while (number >= static_cast<int64_t>(groups_.size())) {
    const std::vector<QaGroup> more =
        GroupQuestions(examples_, *questions_, config_->explicit_memory->references_per_chunk,
                       options_, epochs_++);
    groups_.insert(groups_.end(), more.begin(), more.end());
  }
  return groups_[number];
}

void QaGroupBatches::AddSequence(const QaExample& example, const std::vector<int>& reads,
                                 const char* kind, TrainingBatch* batch) {
  TrainingSequence s = QuestionSequence(*config_, example);
  const int chunk = config_->explicit_memory->chunk_tokens;
  const int tokens = static_cast<int>(s.token_ids.size()) - 1;
  s.chunk_references.assign(std::max(1, (tokens + chunk - 1) / chunk), reads);
  batch->sequences.push_back(std::move(s));
  kinds_.emplace_back(kind);
}

void QaGroupBatches::AddClozes(const CutReference& reference, const std::vector<int>& reads,
                               Random* random, TrainingBatch* batch) {
  int made = 0;
  for (int i = 0; i < kTriesForCloze * options_.clozes && made < options_.clozes; ++i) {
    const Cloze cloze = TryCloze(reference, random);
    if (cloze.question.empty()) continue;
    QaExample example;
    example.prompt = tokenizer_->Encode(QaPrompt(cloze.question));
    example.answer = EncodeAnswer(*tokenizer_, cloze.answer);
    AddSequence(example, reads, "cloze", batch);
    ++made;
  }
}

void QaGroupBatches::AddQuestions(const QaGroup& group, Random* random, TrainingBatch* batch) {
  std::vector<int> reads;
  for (const int r : group.references) {
    reads.push_back(static_cast<int>(batch->references.size()));
    batch->references.push_back(store_->reference(r).token_ids);
  }
  for (const int i : group.questions) AddSequence(examples_[i], reads, "question", batch);
  for (const int r : group.references) AddClozes(store_->reference(r), reads, random, batch);
}

void QaGroupBatches::AddTexts(Random* random, TrainingBatch* batch) {
  const int wanted = config_->explicit_memory->references_per_chunk;
  std::vector<const CutReference*> pieces;
  // Half of one document, as far as it goes, half of two.
  while (static_cast<int>(pieces.size()) < wanted) {
    const TextPieces& text = texts_[random->Below(texts_.size())];
    const int left = wanted - static_cast<int>(pieces.size());
    const int most = random->Below(2) == 0 ? left : (left + 1) / 2;
    const int n = std::min(most, static_cast<int>(text.size()));
    const size_t first = random->Below(text.size() - n + 1);
    for (int i = 0; i < n; ++i) pieces.push_back(&text[first + i]);
  }
  std::vector<int> reads;
  for (const CutReference* piece : pieces) {
    reads.push_back(static_cast<int>(batch->references.size()));
    batch->references.push_back(piece->token_ids);
  }
  for (const CutReference* piece : pieces) AddClozes(*piece, reads, random, batch);
}

absl::StatusOr<TrainingBatch> QaGroupBatches::Make(int64_t number) {
  TrainingBatch batch;
  batch.layout = TrainingBatch::Layout::kMemory;
  batch.gradient_through_writing = options_.gradient_through_writing;
  batch.tokens_kept = options_.kept.At(number / options_.accumulate);
  Random random({options_.seed, static_cast<uint64_t>(number), 0x96c});
  if (random.Unit() < options_.sparse) batch.tokens_kept = kSparse[random.Below(kSparse.size())];
  const int texts =
      texts_.empty() ? 0 : static_cast<int>(std::lround(options_.texts * options_.groups));
  const int asked = options_.groups - texts;
  kinds_.clear();
  for (int g = 0; g < asked; ++g) {
    AddQuestions(GroupAt(number * asked + g), &random, &batch);
  }
  for (int g = 0; g < texts; ++g) AddTexts(&random, &batch);
  if (rehearsal_ != nullptr) {
    absl::StatusOr<TrainingBatch> more = rehearsal_->Make(number);
    if (!more.ok()) return more.status();
    AppendBatch(*std::move(more), &batch);
    const std::vector<std::string> kinds = rehearsal_->Kinds();
    kinds_.insert(kinds_.end(), kinds.begin(), kinds.end());
  }
  return batch;
}

}  // namespace memory3
