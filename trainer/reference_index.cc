#include "trainer/reference_index.h"

#include <dnnl.h>

#include <algorithm>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "trainer/random.h"

namespace memory3 {
namespace {

constexpr uint64_t kLeastTokens = 16;
constexpr size_t kTextsAtOnce = 512;

int LongestCommonSubsequence(std::span<const int32_t> a, std::span<const int32_t> b) {
  std::vector<int> row(b.size() + 1, 0);
  for (const int32_t x : a) {
    int diagonal = 0;
    for (size_t j = 1; j <= b.size(); ++j) {
      const int above = row[j];
      row[j] = x == b[j - 1] ? diagonal + 1 : std::max(row[j], row[j - 1]);
      diagonal = above;
    }
  }
  return row.back();
}

}  // namespace

double Overlap(std::span<const int32_t> reference, std::span<const int32_t> text) {
  if (reference.empty()) return 0;
  const size_t length = 2 * reference.size();
  const size_t step = std::max<size_t>(1, reference.size() / 2);
  int most = 0;
  for (size_t at = 0; at < text.size(); at += step) {
    const size_t n = std::min(length, text.size() - at);
    most = std::max(most, LongestCommonSubsequence(reference, text.subspan(at, n)));
    if (at + n == text.size()) break;
  }
  return static_cast<double>(most) / static_cast<double>(reference.size());
}

absl::StatusOr<std::unique_ptr<ReferenceIndex>> ReferenceIndex::Build(
    const TokenCorpus* corpus, const Tokenizer* tokenizer, const Embedder* embedder,
    const Options& options, const ProgressFunction& progress) {
  auto index = std::make_unique<ReferenceIndex>();
  index->corpus_ = corpus;
  index->embedder_ = embedder;
  index->eos_ = tokenizer->eos_id();
  index->reference_tokens_ = options.reference_tokens;
  std::vector<std::pair<uint64_t, Place>> all;
  for (uint32_t s = 0; s < corpus->shards().size(); ++s) {
    const TokenShard& shard = *corpus->shards()[s];
    for (uint64_t d = 0; d < shard.documents(); ++d) {
      const ShardDocument document = shard.document(d);
      uint64_t tokens = document.tokens;
      if (tokens > 0 && shard.token(document.first + tokens - 1) == index->eos_) --tokens;
      for (uint64_t at = 0; at + kLeastTokens <= tokens; at += options.reference_tokens) {
        const uint64_t n = std::min<uint64_t>(options.reference_tokens, tokens - at);
        const Place place = {s, static_cast<uint32_t>(n), document.first + at};
        all.emplace_back(Random({options.seed, s, place.first}).Next(), place);
      }
    }
  }
  if (all.empty()) return absl::InvalidArgumentError("references: the shards hold none");
  std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  all.resize(std::min<size_t>(all.size(), options.most));
  for (const auto& [hash, place] : all) index->places_.push_back(place);

  const int64_t dimension = embedder->dimension();
  index->vectors_.resize(index->places_.size() * dimension);
  for (size_t at = 0; at < index->places_.size(); at += kTextsAtOnce) {
    const size_t n = std::min(kTextsAtOnce, index->places_.size() - at);
    std::vector<std::string> texts;
    for (size_t i = 0; i < n; ++i) {
      texts.push_back(tokenizer->DecodeQuery(index->Tokens(static_cast<int64_t>(at + i))));
    }
    const std::vector<std::string_view> views(texts.begin(), texts.end());
    absl::Status status =
        embedder->Embed(views, std::span(index->vectors_).subspan(at * dimension, n * dimension));
    if (!status.ok()) return status;
    if (progress) {
      progress(static_cast<int64_t>(at + n), static_cast<int64_t>(index->places_.size()));
    }
  }
  return index;
}

std::vector<int32_t> ReferenceIndex::Tokens(int64_t reference) const {
  const Place& place = places_[reference];
  std::vector<int32_t> ids(place.tokens);
  corpus_->shards()[place.shard]->Copy(place.first, ids);
  return ids;
}

std::string_view ReferenceIndex::DocumentId(int64_t reference) const {
  const Place& place = places_[reference];
  const TokenShard& shard = *corpus_->shards()[place.shard];
  return shard.document(shard.DocumentOf(place.first)).id;
}

absl::StatusOr<std::vector<std::vector<int>>> ReferenceIndex::Search(
    std::span<const std::string> queries, int k) const {
  const int64_t dimension = embedder_->dimension();
  std::vector<float> vectors(queries.size() * dimension);
  const std::vector<std::string_view> views(queries.begin(), queries.end());
  if (absl::Status status = embedder_->Embed(views, vectors); !status.ok()) return status;
  std::vector<float> scores(queries.size() * places_.size());
  if (dnnl_sgemm('N', 'T', static_cast<dnnl_dim_t>(queries.size()), size(), dimension, 1,
                 vectors.data(), dimension, vectors_.data(), dimension, 0, scores.data(),
                 size()) != dnnl_success) {
    return absl::InternalError("oneDNN: sgemm failed");
  }
  std::vector<std::vector<int>> found(queries.size());
  std::vector<int> order(places_.size());
  for (size_t q = 0; q < queries.size(); ++q) {
    const float* row = scores.data() + q * places_.size();
    std::iota(order.begin(), order.end(), 0);
    const size_t n = std::min<size_t>(k, order.size());
    std::partial_sort(order.begin(), order.begin() + static_cast<int64_t>(n), order.end(),
                      [&](int a, int b) { return row[a] != row[b] ? row[a] > row[b] : a < b; });
    for (size_t i = 0; i < n && row[order[i]] > 0; ++i) found[q].push_back(order[i]);
  }
  return found;
}

std::vector<int32_t> ReferenceIndex::FromSameDocument(const TokenCorpus& corpus,
                                                      const Window& window, int tokens, uint64_t at,
                                                      uint64_t random) const {
  const TokenShard& shard = *corpus.shards()[window.shard];
  const ShardDocument document = shard.document(shard.DocumentOf(at));
  const uint64_t end = document.first + document.tokens;
  const uint64_t length = reference_tokens_;
  // Starts before the window, and after it.
  const uint64_t before =
      window.first >= document.first + length ? window.first - length - document.first + 1 : 0;
  const uint64_t after_begin = window.first + tokens;
  const uint64_t after = end >= after_begin + length + 1 ? end - after_begin - length : 0;
  if (before + after == 0) return {};
  const uint64_t pick = Random({random}).Below(before + after);
  std::vector<int32_t> ids(length);
  shard.Copy(pick < before ? document.first + pick : after_begin + pick - before, ids);
  return ids;
}

}  // namespace memory3
