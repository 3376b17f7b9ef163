#include "trainer/corpus.h"

#include <limits>

#include "absl/strings/str_cat.h"
#include "trainer/pack.h"
#include "trainer/random.h"

namespace memory3 {

absl::StatusOr<std::unique_ptr<TokenCorpus>> TokenCorpus::Open(
    const std::vector<std::string>& inputs, const Hash256& tokenizer) {
  absl::StatusOr<std::vector<std::string>> paths = ShardPaths(inputs);
  if (!paths.ok()) return paths.status();
  auto corpus = std::make_unique<TokenCorpus>();
  for (const std::string& path : *paths) {
    absl::StatusOr<std::unique_ptr<TokenShard>> shard = TokenShard::Open(path);
    if (!shard.ok()) return shard.status();
    if ((*shard)->tokenizer() != tokenizer) {
      return absl::FailedPreconditionError(absl::StrCat(
          path, ": packed with tokenizer ", (*shard)->tokenizer().ToHex().substr(0, 16),
          ", this one is ", tokenizer.ToHex().substr(0, 16)));
    }
    corpus->shards_.push_back(*std::move(shard));
  }
  return corpus;
}

int64_t TokenCorpus::tokens() const {
  int64_t n = 0;
  for (const auto& shard : shards_) n += static_cast<int64_t>(shard->tokens());
  return n;
}

std::string TokenCorpus::digest() const {
  Sha256 sha;
  for (const auto& shard : shards_) {
    sha.UpdateLengthPrefixed(absl::StrCat(shard->checksum(), " ", shard->tokens()));
  }
  return sha.Finish().ToHex();
}

absl::StatusOr<WindowOrder> WindowOrder::Create(const TokenCorpus* corpus, int tokens,
                                                uint64_t seed, bool shuffle) {
  WindowOrder order;
  order.seed_ = seed;
  order.shuffle_ = shuffle;
  for (size_t s = 0; s < corpus->shards().size(); ++s) {
    const uint64_t n = corpus->shards()[s]->tokens();
    for (uint64_t at = 0; at + tokens <= n; at += tokens) {
      order.windows_.push_back({static_cast<int>(s), at});
    }
  }
  if (order.windows_.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("context: no shard holds ", tokens, " tokens"));
  }
  if (order.windows_.size() > std::numeric_limits<uint32_t>::max()) {
    return absl::InvalidArgumentError("shards: more than 2^32 windows");
  }
  return order;
}

Window WindowOrder::At(int64_t number) {
  const int64_t epoch = number / windows(), within = number % windows();
  if (!shuffle_) return windows_[within];
  if (epoch != epoch_) {
    order_ = RandomOrder(static_cast<uint32_t>(windows()),
                         Random({seed_, static_cast<uint64_t>(epoch), 0x0de5}));
    epoch_ = epoch;
  }
  return windows_[order_[within]];
}

TrainingSequence SequenceOf(const TokenCorpus& corpus, const Window& window, int tokens,
                            int32_t bos) {
  TrainingSequence s;
  s.targets.resize(tokens);
  corpus.shards()[window.shard]->Copy(window.first, s.targets);
  s.token_ids.push_back(bos);
  s.token_ids.insert(s.token_ids.end(), s.targets.begin(), s.targets.end() - 1);
  return s;
}

}  // namespace memory3
