#include "trainer/qa_batches.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "trainer/random.h"

namespace memory3 {

std::vector<int32_t> TextPrompt(const Tokenizer& tokenizer, int32_t bos, const QaStore& store,
                                const std::vector<int>& references,
                                const std::vector<int32_t>& prompt) {
  const std::vector<int32_t> end = tokenizer.Encode("\n");
  std::vector<int32_t> ids = {bos};
  for (const int r : references) {
    const std::vector<int32_t>& text = store.reference(r).token_ids;
    ids.insert(ids.end(), text.begin(), text.end());
    ids.insert(ids.end(), end.begin(), end.end());
  }
  ids.insert(ids.end(), prompt.begin(), prompt.end());
  return ids;
}

QaBatches::QaBatches(const ModelConfig* config, const Tokenizer* tokenizer, const QaStore* store,
                     std::vector<QaExample> questions, std::vector<QaExample> clozes,
                     ContinualBatches* rehearsal, QaBatchOptions options)
    : config_(config),
      tokenizer_(tokenizer),
      store_(store),
      rehearsal_(rehearsal),
      options_(std::move(options)) {
  questions_.examples = std::move(questions);
  clozes_.examples = std::move(clozes);
}

const QaExample& QaBatches::At(Order* list, int64_t number) const {
  const auto n = static_cast<int64_t>(list->examples.size());
  if (number / n != list->epoch) {
    list->epoch = number / n;
    list->order = RandomOrder(static_cast<uint32_t>(n),
                              Random({options_.seed, static_cast<uint64_t>(list->epoch), 0x9a}));
  }
  return list->examples[list->order[number % n]];
}

TrainingSequence AnswerSequence(std::vector<int32_t> prompt, const std::vector<int32_t>& answer) {
  TrainingSequence s;
  s.token_ids = std::move(prompt);
  s.targets.assign(s.token_ids.size() - 1, -1);
  s.targets.insert(s.targets.end(), answer.begin(), answer.end());
  s.token_ids.insert(s.token_ids.end(), answer.begin(), answer.end() - 1);
  return s;
}

TrainingSequence QuestionSequence(const ModelConfig& config, const QaExample& example) {
  std::vector<int32_t> prompt = {config.bos_token_id};
  prompt.insert(prompt.end(), example.prompt.begin(), example.prompt.end());
  return AnswerSequence(std::move(prompt), example.answer);
}

void QaBatches::AddQuestion(const QaExample& example, std::vector<int> references, Random* random,
                            TrainingBatch* batch) const {
  if (options_.mode == QaMode::kMemory) {
    batch->sequences.push_back(QuestionSequence(*config_, example));
    return;
  }
  for (size_t i = references.size(); i > 1; --i) {
    std::swap(references[i - 1], references[random->Below(i)]);
  }
  batch->sequences.push_back(AnswerSequence(
      TextPrompt(*tokenizer_, config_->bos_token_id, *store_, references, example.prompt),
      example.answer));
}

absl::StatusOr<TrainingBatch> QaBatches::Make(int64_t number) {
  TrainingBatch batch;
  batch.layout = TrainingBatch::Layout::kMemory;
  batch.tokens_kept = options_.kept.At(number / options_.accumulate);
  batch.gradient_through_writing = options_.gradient_through_writing;
  Random random({options_.seed, static_cast<uint64_t>(number), 0x9a5});
  const int wanted = config_->explicit_memory->references_per_chunk;
  const int clozes = clozes_.examples.empty()
                         ? 0
                         : static_cast<int>(std::lround(options_.cloze * options_.questions));
  const int asked = options_.questions - clozes;
  std::vector<const QaExample*> examples;
  examples.reserve(options_.questions);
  for (int i = 0; i < asked; ++i) examples.push_back(&At(&questions_, number * asked + i));
  for (int i = 0; i < clozes; ++i) examples.push_back(&At(&clozes_, number * clozes + i));
  kinds_.assign(asked, "question");
  kinds_.resize(options_.questions, "cloze");

  // References of each question, as indices of the store: gold, the retrieved, then others' of the
  // batch.
  std::vector<std::vector<int>> reads;
  std::vector<int> all;
  for (const QaExample* example : examples) {
    std::vector<int>& mine = reads.emplace_back();
    mine.push_back(example->gold);
    std::vector<int> near = example->others;
    for (int i = 0;
         i < options_.retrieved && !near.empty() && static_cast<int>(mine.size()) < wanted; ++i) {
      const size_t pick = random.Below(near.size());
      mine.push_back(near[pick]);
      near.erase(near.begin() + static_cast<int64_t>(pick));
    }
    all.insert(all.end(), mine.begin(), mine.end());
  }
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  const size_t possible = std::min<size_t>(wanted, all.size());
  for (std::vector<int>& mine : reads) {
    while (mine.size() < possible) {
      const int r = all[random.Below(all.size())];
      if (std::find(mine.begin(), mine.end(), r) == mine.end()) mine.push_back(r);
    }
  }
  std::map<int, int> place;  // in the batch, by index of the store
  if (options_.mode == QaMode::kMemory) {
    for (const int r : all) {
      place[r] = static_cast<int>(batch.references.size());
      batch.references.push_back(store_->reference(r).token_ids);
    }
  }
  const int chunk = config_->explicit_memory->chunk_tokens;
  for (size_t i = 0; i < examples.size(); ++i) {
    AddQuestion(*examples[i], reads[i], &random, &batch);
    if (options_.mode != QaMode::kMemory) continue;
    TrainingSequence& s = batch.sequences.back();
    std::vector<int> indices;
    for (const int r : reads[i]) indices.push_back(place[r]);
    const int tokens = static_cast<int>(s.token_ids.size()) - 1;
    s.chunk_references.assign(std::max(1, (tokens + chunk - 1) / chunk), indices);
  }
  if (rehearsal_ != nullptr) {
    absl::StatusOr<TrainingBatch> more = rehearsal_->Make(number);
    if (!more.ok()) return more.status();
    AppendBatch(*std::move(more), &batch);
    const std::vector<std::string> kinds = rehearsal_->Kinds();
    kinds_.insert(kinds_.end(), kinds.begin(), kinds.end());
  }
  return batch;
}

void AppendBatch(TrainingBatch more, TrainingBatch* batch) {
  const int first = static_cast<int>(batch->references.size());
  for (TrainingSequence& s : more.sequences) {
    for (std::vector<int>& reads : s.chunk_references) {
      for (int& r : reads) r += first;
    }
    batch->sequences.push_back(std::move(s));
  }
  for (std::vector<int32_t>& r : more.references) batch->references.push_back(std::move(r));
}

}  // namespace memory3
