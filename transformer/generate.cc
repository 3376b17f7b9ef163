#include "transformer/generate.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace memory3 {
namespace {

// One sequence that is fed token by token number, each with the memories of its chunk.
class ChunkedSequence {
 public:
  static absl::StatusOr<ChunkedSequence> Start(Decoder& decoder, std::span<const int32_t> prompt,
                                               Layout layout, const RetrieveFunction& retrieve,
                                               int slice_tokens) {
    if (layout == Layout::kPlain && retrieve != nullptr) {
      return absl::InvalidArgumentError("retrieve: the plain layout reads no memories");
    }
    if (decoder.config().bos_token_id < 0)
      return absl::InvalidArgumentError("bos_token_id: the model has none");
    if (slice_tokens < 0)
      return absl::InvalidArgumentError(absl::StrCat("slice_tokens is ", slice_tokens));
    absl::StatusOr<Sequence> sequence = decoder.Start(layout);
    if (!sequence.ok()) return sequence.status();
    return ChunkedSequence(decoder, WithoutBos(prompt, decoder.config().bos_token_id), retrieve,
                           slice_tokens, *std::move(sequence));
  }

  const ChunkGrid& grid() const { return grid_; }
  void Append(int32_t id) { tokens_.push_back(id); }

  // Retrieves for all tokens before `end` that no retrieval was made for yet.
  absl::Status RetrieveUntil(int end) {
    if (retrieve_ == nullptr || end <= 0) return absl::OkStatus();
    const int last = grid_.RetrievalOf(end - 1);
    while (static_cast<int>(retrieved_.size()) <= last) {
      const int r = static_cast<int>(retrieved_.size());
      const ChunkGrid::Range query = grid_.QueryOf(r);
      auto found = retrieve_(std::span(tokens_).subspan(query.first, query.tokens));
      if (!found.ok()) return found.status();
      if (static_cast<int>(found->size()) > decoder_.pool().slots()) {
        return absl::InvalidArgumentError(absl::StrCat("retrieve: ", found->size(),
                                                       " memories, the pool has ",
                                                       decoder_.pool().slots(), " slots"));
      }
      retrieved_.push_back(*std::move(found));
    }
    return absl::OkStatus();
  }

  // Feeds tokens [first, end), `<s>` being ChunkGrid::kBos, in slices that end with chunks, and
  // hands the logits after each token from `first_logits` on to `use`.
  absl::Status Feed(int first, int end, int first_logits,
                    const std::function<void(int token, std::span<const float> logits)>& use) {
    while (first < end) {
      const int retrieval =
          retrieve_ == nullptr ? ChunkGrid::kNoRetrieval : grid_.RetrievalOf(first);
      int last = first + 1;
      const int longest =
          first >= first_logits ? decoder_.options().max_logit_rows : decoder_.options().max_rows;
      const int limit = slice_tokens_ > 0 ? std::min(slice_tokens_, longest) : longest;
      while (last < end && last - first < limit &&
             grid_.RetrievalOf(last) == grid_.RetrievalOf(first) &&
             (last < first_logits) == (first < first_logits)) {
        ++last;
      }
      if (absl::Status status = FeedSlice(first, last, retrieval, first >= first_logits, use);
          !status.ok()) {
        return status;
      }
      first = last;
    }
    return absl::OkStatus();
  }

  std::vector<ChunkRead> Reads(int generated) const {
    std::vector<ChunkRead> reads;
    for (int r = 0; r < static_cast<int>(retrieved_.size()); ++r) {
      ChunkRead& read = reads.emplace_back();
      read.query = grid_.QueryOf(r);
      read.readers = grid_.ReadersOf(r, generated);
      for (const RetrievedMemory& memory : retrieved_[r]) read.memory_ids.push_back(memory.id);
    }
    return reads;
  }

 private:
  ChunkedSequence(Decoder& decoder, std::span<const int32_t> prompt,
                  const RetrieveFunction& retrieve, int slice_tokens, Sequence sequence)
      : decoder_(decoder),
        retrieve_(retrieve),
        // Without a geometry there are no chunks; any length does.
        grid_(static_cast<int>(prompt.size()),
              decoder.memory() ? decoder.memory()->chunk_tokens : 64),
        slice_tokens_(slice_tokens),
        tokens_(prompt.begin(), prompt.end()),
        sequence_(std::move(sequence)) {}

  absl::Status FeedSlice(int first, int last, int retrieval, bool logits,
                         const std::function<void(int token, std::span<const float> logits)>& use) {
    MemoryRead read{last - first, {}};
    if (retrieval != ChunkGrid::kNoRetrieval) {
      if (absl::Status status = RetrieveUntil(std::max(first, 0) + 1); !status.ok()) return status;
      if (absl::Status status = Load(retrieval); !status.ok()) return status;
      read.slots.resize(retrieved_[retrieval].size());
      std::iota(read.slots.begin(), read.slots.end(), 0);
    }
    std::vector<int32_t> ids;
    for (int t = first; t < last; ++t) {
      ids.push_back(t == ChunkGrid::kBos ? decoder_.config().bos_token_id : tokens_[t]);
    }
    const Slice slice{&sequence_, ids, {&read, 1}, logits ? last - first : 0};
    if (absl::Status status = decoder_.Forward({&slice, 1}); !status.ok()) return status;
    if (!logits) return absl::OkStatus();
    if (absl::Status status = decoder_.DownloadLogits(&logits_); !status.ok()) return status;
    const size_t vocab = decoder_.config().vocab_size;
    for (int t = first; t < last; ++t)
      use(t, std::span(logits_).subspan((t - first) * vocab, vocab));
    return absl::OkStatus();
  }

  // Puts retrieval r's memories into slots 0, 1, ….
  absl::Status Load(int r) {
    if (loaded_ == r) return absl::OkStatus();
    // A device may still be reading what the slots held for the chunk before.
    if (absl::Status status = decoder_.model().device().Synchronize(); !status.ok()) return status;
    for (int slot = 0; slot < static_cast<int>(retrieved_[r].size()); ++slot) {
      if (retrieved_[r][slot].memory == nullptr) {
        return absl::InvalidArgumentError(
            absl::StrCat("retrieve: memory ", retrieved_[r][slot].id, " is null"));
      }
      if (absl::Status status = decoder_.pool().Load(slot, *retrieved_[r][slot].memory);
          !status.ok()) {
        return status;
      }
    }
    loaded_ = r;
    return absl::OkStatus();
  }

  Decoder& decoder_;
  const RetrieveFunction& retrieve_;
  ChunkGrid grid_;
  int slice_tokens_;
  std::vector<int32_t> tokens_;  // prompt, then generated
  Sequence sequence_;
  std::vector<std::vector<RetrievedMemory>> retrieved_;  // by retrieval
  int loaded_ = ChunkGrid::kNoRetrieval;
  std::vector<float> logits_;
};

}  // namespace

absl::StatusOr<Generation> Generate(Decoder& decoder, std::span<const int32_t> prompt,
                                    const RetrieveFunction& retrieve,
                                    const GenerateOptions& options) {
  if (options.max_new_tokens < 0) {
    return absl::InvalidArgumentError(absl::StrCat("max_new_tokens is ", options.max_new_tokens));
  }
  auto started =
      ChunkedSequence::Start(decoder, prompt, options.layout, retrieve, options.slice_tokens);
  if (!started.ok()) return started.status();
  ChunkedSequence& sequence = *started;
  auto sampler = Sampler::Create(options.sampling, decoder.config().vocab_size, prompt);
  if (!sampler.ok()) return sampler.status();

  Generation result;
  std::vector<float> logits;
  const auto keep = [&](int, std::span<const float> row) { logits.assign(row.begin(), row.end()); };
  const int n = sequence.grid().prompt_tokens();
  absl::Status status = sequence.Feed(ChunkGrid::kBos, n, n - 1, keep);
  if (!status.ok()) return status;
  for (int i = 0; i < options.max_new_tokens; ++i) {
    const bool may_stop = i >= options.min_new_tokens;
    auto id = sampler->Sample(logits, may_stop ? std::span<const int32_t>() : options.stop_ids);
    if (!id.ok()) return id.status();
    result.tokens.push_back(*id);
    sequence.Append(*id);
    result.stopped =
        std::find(options.stop_ids.begin(), options.stop_ids.end(), *id) != options.stop_ids.end();
    if (result.stopped || i + 1 == options.max_new_tokens) break;
    // The token just chosen may complete the query of the chunk that starts with the next one.
    const int token = n + i;
    if (status = sequence.RetrieveUntil(token + 2); !status.ok()) return status;
    if (status = sequence.Feed(token, token + 1, token, keep); !status.ok()) return status;
  }
  result.reads = sequence.Reads(static_cast<int>(result.tokens.size()));
  return result;
}

absl::StatusOr<Score> ScoreContinuation(Decoder& decoder, std::span<const int32_t> prompt,
                                        std::span<const int32_t> continuation,
                                        const RetrieveFunction& retrieve,
                                        const ScoreOptions& options) {
  for (size_t i = 0; i < continuation.size(); ++i) {
    if (continuation[i] < 0 || continuation[i] >= decoder.config().vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat("continuation[", i, "] is ", continuation[i],
                                                     ", not in the vocabulary of ",
                                                     decoder.config().vocab_size));
    }
  }
  auto started =
      ChunkedSequence::Start(decoder, prompt, options.layout, retrieve, options.slice_tokens);
  if (!started.ok()) return started.status();
  ChunkedSequence& sequence = *started;
  const int n = sequence.grid().prompt_tokens(), m = static_cast<int>(continuation.size());
  Score score;
  if (m == 0) return score;
  for (int32_t id : continuation) sequence.Append(id);
  absl::Status status = sequence.RetrieveUntil(n + m);
  if (!status.ok()) return status;
  status = sequence.Feed(
      ChunkGrid::kBos, n + m - 1, n - 1, [&](int token, std::span<const float> logits) {
        const int32_t next = continuation[token + 1 - n];
        score.logprobs.push_back(Logprob(logits, next));
        score.is_greedy.push_back(std::max_element(logits.begin(), logits.end()) - logits.begin() ==
                                  next);
      });
  if (!status.ok()) return status;
  score.reads = sequence.Reads(m);
  return score;
}

}  // namespace memory3
