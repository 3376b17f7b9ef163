#include "embedder/bert.h"

#include <algorithm>
#include <bit>
#include <thread>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace memory3 {
namespace {

// Tokens of one pass through the encoder: enough for the products to run at full speed, few enough
// to bound the memory. One text may be longer.
constexpr size_t kPassTokens = 2048;

}  // namespace

absl::StatusOr<std::unique_ptr<BertEmbedder>> BertEmbedder::Load(const std::string& directory,
                                                                 const EmbedderOptions& options) {
  absl::StatusOr<BertConfig> config = LoadBertConfig(directory);
  if (!config.ok()) return config.status();
  absl::StatusOr<LoadedTokenizer> tokenizer = LoadTextTokenizer(directory, config->model_type);
  if (!tokenizer.ok()) return tokenizer.status();
  if (tokenizer->tokenizer->max_id() >= config->vocab_size) {
    return absl::InvalidArgumentError(
        absl::StrCat(directory, "/config.json: vocab_size is ", config->vocab_size,
                     ", but the tokenizer's ids go up to ", tokenizer->tokenizer->max_id()));
  }
  absl::StatusOr<std::unique_ptr<BertEncoder>> encoder = BertEncoder::Load(directory, *config);
  if (!encoder.ok()) return encoder.status();

  std::unique_ptr<BertEmbedder> e(new BertEmbedder);
  e->config_ = *std::move(config);
  e->threads_ = options.threads > 0
                    ? options.threads
                    : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  e->tokenizer_ = std::move(tokenizer->tokenizer);
  e->encoder_ = *std::move(encoder);
  const BertConfig& c = e->config_;
  Sha256 sha;
  sha.UpdateLengthPrefixed("m3bert1");
  sha.UpdateLengthPrefixed(
      absl::StrCat(c.model_type, " heads=", c.heads,
                   " eps=", absl::Hex(std::bit_cast<uint32_t>(c.layer_norm_eps)),
                   " offset=", c.position_offset, " max_tokens=", c.max_tokens,
                   " pooling=", c.pooling == BertConfig::Pooling::kCls ? "cls" : "mean"));
  sha.UpdateLengthPrefixed(tokenizer->digest.view());
  sha.UpdateLengthPrefixed(e->encoder_->digest().view());
  e->fingerprint_ = sha.Finish();
  return e;
}

std::vector<int32_t> BertEmbedder::Tokenize(std::string_view text) const {
  std::vector<int32_t> ids = {tokenizer_->begin_id()};
  tokenizer_->Encode(text, static_cast<size_t>(config_.max_tokens) - 2, &ids);
  ids.push_back(tokenizer_->end_id());
  return ids;
}

absl::Status BertEmbedder::Embed(std::span<const std::string_view> texts,
                                 std::span<float> out) const {
  const size_t width = config_.hidden_size;
  if (out.size() != texts.size() * width) {
    return absl::InvalidArgumentError(
        absl::StrCat("out: ", out.size(), " numbers for ", texts.size(), " texts of ", width));
  }
  std::vector<int32_t> ids;
  std::vector<int> lengths;
  size_t done = 0;
  for (size_t i = 0; i < texts.size(); ++i) {
    const std::vector<int32_t> tokens = Tokenize(texts[i]);
    ids.insert(ids.end(), tokens.begin(), tokens.end());
    lengths.push_back(static_cast<int>(tokens.size()));
    if (ids.size() < kPassTokens && i + 1 < texts.size()) continue;
    if (absl::Status status = encoder_->Encode(ids, lengths, threads_,
                                               out.subspan(done * width, lengths.size() * width));
        !status.ok()) {
      return status;
    }
    done = i + 1;
    ids.clear();
    lengths.clear();
  }
  return absl::OkStatus();
}

}  // namespace memory3
