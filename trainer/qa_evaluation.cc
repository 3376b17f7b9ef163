#include "trainer/qa_evaluation.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "trainer/qa_batches.h"
#include "trainer/qa_metrics.h"
#include "trainer/random.h"
#include "trainer/reference_index.h"
#include "transformer/decoder.h"
#include "transformer/generate.h"
#include "transformer/memory_writer.h"

namespace memory3 {
namespace {

// What the model says and how likely it finds the gold answer.
struct Reply {
  std::string text;
  double log_likelihood = 0;
};

class Examiner {
 public:
  static absl::StatusOr<std::unique_ptr<Examiner>> Create(const std::shared_ptr<const Model>& model,
                                                          const Tokenizer& tokenizer,
                                                          const QaStore& store,
                                                          const QaEvaluationOptions& options) {
    if (!model->config().explicit_memory) {
      return absl::FailedPreconditionError("evaluate: the model has no explicit_memory");
    }
    ExplicitMemoryConfig memory = *model->config().explicit_memory;
    if (options.tokens_kept > 0) memory.tokens_kept = options.tokens_kept;
    DecoderOptions decoder_options;
    decoder_options.memory = memory;
    decoder_options.max_rows = 512;
    decoder_options.max_logit_rows = 128;
    decoder_options.kv_pages = model->config().max_position_embeddings / kKvPageTokens + 1;
    decoder_options.memory_slots = memory.references_per_chunk;
    auto examiner = std::unique_ptr<Examiner>(new Examiner(tokenizer, store, options));
    auto decoder = Decoder::Create(model, decoder_options);
    if (!decoder.ok()) return decoder.status();
    examiner->decoder_ = *std::move(decoder);
    auto writer = MemoryWriter::Create(model, {.memory = memory}, examiner->decoder_->prefix());
    if (!writer.ok()) return writer.status();
    examiner->writer_ = *std::move(writer);
    return examiner;
  }

  absl::StatusOr<Reply> Ask(QaReading reading, const QaExample& example,
                            const std::vector<int>& references, Random random) {
    std::vector<RetrievedMemory> memories;
    std::vector<int32_t> prompt = example.prompt;
    if (reading == QaReading::kText) {
      std::vector<int> order = references;
      for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.Below(i)]);
      prompt =
          TextPrompt(tokenizer_, decoder_->config().bos_token_id, store_, order, example.prompt);
    } else if (reading != QaReading::kNone) {
      absl::Status status = Write(references, reading == QaReading::kMemoryVq, &memories);
      if (!status.ok()) return status;
    }
    const RetrieveFunction retrieve =
        [&](std::span<const int32_t>) -> absl::StatusOr<std::vector<RetrievedMemory>> {
      return memories;
    };
    const RetrieveFunction none;
    const RetrieveFunction& used = memories.empty() ? none : retrieve;
    GenerateOptions options;
    options.max_new_tokens = options_.max_new_tokens;
    options.stop_ids = decoder_->config().eos_token_ids;
    absl::StatusOr<Generation> generation = Generate(*decoder_, prompt, used, options);
    if (!generation.ok()) return generation.status();
    absl::StatusOr<Score> score = ScoreContinuation(*decoder_, prompt, example.answer, used, {});
    if (!score.ok()) return score.status();
    Reply reply;
    reply.text = tokenizer_.Decode(generation->tokens);
    reply.text =
        std::string(absl::StripAsciiWhitespace(reply.text.substr(0, reply.text.find('\n'))));
    for (const float logprob : score->logprobs) reply.log_likelihood += logprob;
    return reply;
  }

 private:
  Examiner(const Tokenizer& tokenizer, const QaStore& store, const QaEvaluationOptions& options)
      : tokenizer_(tokenizer), store_(store), options_(options) {}

  absl::Status Write(const std::vector<int>& references, bool vq,
                     std::vector<RetrievedMemory>* memories) {
    std::vector<std::vector<int32_t>> texts;
    texts.reserve(references.size());
    for (const int r : references) texts.push_back(store_.reference(r).token_ids);
    auto written = writer_->Write(texts);
    if (!written.ok()) return written.status();
    for (size_t i = 0; i < written->size(); ++i) {
      ExplicitMemory& memory = (*written)[i];
      if (vq) {
        std::vector<uint8_t> bytes(memory.shape.vectors() * options_.vq->bytes_per_vector());
        absl::Status status = options_.vq->Encode(memory.values, bytes);
        if (status.ok()) status = options_.vq->Decode(bytes, memory.values);
        if (!status.ok()) return status;
      }
      memories->push_back(
          {absl::StrCat(references[i]), std::make_shared<const ExplicitMemory>(std::move(memory))});
    }
    return absl::OkStatus();
  }

  const Tokenizer& tokenizer_;
  const QaStore& store_;
  const QaEvaluationOptions& options_;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<MemoryWriter> writer_;
};

}  // namespace

const char* QaReadingName(QaReading reading) {
  switch (reading) {
    case QaReading::kNone:
      return "none";
    case QaReading::kMemory:
      return "memory";
    case QaReading::kMemoryVq:
      return "memory_vq";
    case QaReading::kText:
      return "text";
  }
  return "";
}

absl::StatusOr<std::vector<QaResult>> EvaluateQuestions(
    const std::shared_ptr<const Model>& model, const Tokenizer& tokenizer,
    const std::vector<Question>& questions, const std::vector<QaExample>& examples,
    const QaStore& store, const QaEvaluationOptions& options, const ProgressFunction& progress) {
  std::vector<QaResult> results;
  for (const QaReading reading : options.readings) {
    if (reading == QaReading::kMemoryVq && options.vq == nullptr) {
      return absl::InvalidArgumentError("evaluate: mode memory_vq needs a codebook");
    }
    results.emplace_back().reading = reading;
  }
  auto examiner = Examiner::Create(model, tokenizer, store, options);
  if (!examiner.ok()) return examiner.status();
  const auto total = static_cast<int64_t>(examples.size());
  for (int64_t i = 0; i < total; ++i) {
    const QaExample& example = examples[i];
    const Question& question = questions[example.question];
    std::vector<int> references = {example.gold};
    references.insert(references.end(), example.others.begin(), example.others.end());
    const size_t all = references.size();
    if (options.overlap_limit < 1) {
      std::erase_if(references, [&](int r) {
        return Overlap(store.reference(r).token_ids, example.prompt) > options.overlap_limit;
      });
    }
    for (QaResult& result : results) {
      absl::StatusOr<Reply> reply = (*examiner)->Ask(
          result.reading, example, references, Random({options.seed, static_cast<uint64_t>(i)}));
      if (!reply.ok()) return reply.status();
      result.questions += 1;
      result.dropped_references += static_cast<int64_t>(all - references.size());
      result.exact_match += ExactMatch(reply->text, question.answers);
      result.f1 += AnswerF1(reply->text, question.answers);
      result.log_likelihood += reply->log_likelihood;
      result.answers.push_back(std::move(reply->text));
    }
    if (progress) progress(i + 1, total);
  }
  for (QaResult& result : results) {
    const auto n = static_cast<double>(std::max<int64_t>(1, result.questions));
    result.exact_match /= n;
    result.f1 /= n;
    result.log_likelihood /= n;
  }
  return results;
}

}  // namespace memory3
