#include "transformer/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"

namespace memory3 {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

absl::Status CheckRange(std::string_view field, float value, float low, float high,
                        bool low_allowed = true) {
  if (value >= low && value <= high && (low_allowed || value != low))
    return absl::OkStatus();  // NaN fails
  return absl::InvalidArgumentError(absl::StrCat(std::string(field), " is ", value, ", must be in ",
                                                 low_allowed ? "[" : "(", low, ", ", high, "]"));
}

// ln Σ exp(logits), in double and in order of ids.
double LogSumExp(std::span<const float> logits) {
  const float largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (float x : logits) sum += std::exp(static_cast<double>(x) - largest);
  return largest + std::log(sum);
}

bool Likelier(const std::pair<float, int32_t>& a, const std::pair<float, int32_t>& b) {
  return a.first > b.first || (a.first == b.first && a.second < b.second);
}

uint64_t Mix(uint64_t x) {  // the finaliser of splitmix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

}  // namespace

double SamplingDraw(uint64_t seed, uint64_t index) {
  constexpr uint64_t kGolden = 0x9e3779b97f4a7c15;
  const uint64_t bits = Mix(Mix(seed + kGolden) + (index + 1) * kGolden);
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

absl::Status CheckSampling(const SamplingOptions& o, int vocab_size) {
  absl::Status status = CheckRange("temperature", o.temperature, 0, 100);
  status.Update(CheckRange("top_p", o.top_p, 0, 1, /*low_allowed=*/false));
  if (!(o.min_p >= 0 && o.min_p < 1)) {
    status.Update(
        absl::InvalidArgumentError(absl::StrCat("min_p is ", o.min_p, ", must be in [0, 1)")));
  }
  status.Update(
      CheckRange("repetition_penalty", o.repetition_penalty, 0, 10, /*low_allowed=*/false));
  status.Update(CheckRange("presence_penalty", o.presence_penalty, -2, 2));
  status.Update(CheckRange("frequency_penalty", o.frequency_penalty, -2, 2));
  if (!status.ok()) return status;
  if (o.top_k < 0)
    return absl::InvalidArgumentError(absl::StrCat("top_k is ", o.top_k, ", must be >= 0"));
  absl::flat_hash_set<int32_t> ids;
  for (const auto& [id, bias] : o.logit_bias) {
    if (id < 0 || id >= vocab_size) {
      return absl::InvalidArgumentError(
          absl::StrCat("logit_bias: token id ", id, " is not in the vocabulary of ", vocab_size));
    }
    if (!ids.insert(id).second) {
      return absl::InvalidArgumentError(
          absl::StrCat("logit_bias: token id ", id, " is given twice"));
    }
    status = CheckRange(absl::StrCat("logit_bias of token id ", id), bias, -100, 100);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

float Logprob(std::span<const float> logits, int32_t id) {
  return static_cast<float>(logits[id] - LogSumExp(logits));
}

std::vector<TokenLogprob> TopLogprobs(std::span<const float> logits, int count) {
  std::vector<std::pair<float, int32_t>> ranked;
  ranked.reserve(logits.size());
  for (size_t id = 0; id < logits.size(); ++id)
    ranked.emplace_back(logits[id], static_cast<int32_t>(id));
  count = std::clamp<int>(count, 0, static_cast<int>(ranked.size()));
  std::partial_sort(ranked.begin(), ranked.begin() + count, ranked.end(), Likelier);
  const double log_sum = LogSumExp(logits);
  std::vector<TokenLogprob> top;
  top.reserve(count);
  for (int i = 0; i < count; ++i)
    top.push_back({ranked[i].second, static_cast<float>(ranked[i].first - log_sum)});
  return top;
}

absl::StatusOr<Sampler> Sampler::Create(const SamplingOptions& options, int vocab_size,
                                        std::span<const int32_t> prompt) {
  if (absl::Status status = CheckSampling(options, vocab_size); !status.ok()) return status;
  Sampler sampler;
  sampler.options_ = options;
  sampler.vocab_size_ = vocab_size;
  sampler.plain_greedy_ = options.temperature == 0 && options.logit_bias.empty() &&
                          options.repetition_penalty == 1 && options.presence_penalty == 0 &&
                          options.frequency_penalty == 0;
  for (int32_t id : prompt) sampler.seen_[id].in_prompt = true;
  return sampler;
}

void Sampler::Accept(int32_t id) {
  ++seen_[id].generated;
  ++generated_;
}

absl::StatusOr<int32_t> Sampler::Sample(std::span<const float> logits,
                                        std::span<const int32_t> banned) {
  if (static_cast<int>(logits.size()) != vocab_size_) {
    return absl::InvalidArgumentError(
        absl::StrCat("sampler: ", logits.size(), " logits, the vocabulary has ", vocab_size_));
  }
  for (size_t id = 0; id < logits.size(); ++id) {
    if (!(logits[id] < kInfinity)) {
      return absl::InternalError(
          absl::StrCat("the model's logit of token id ", id, " is ", logits[id]));
    }
  }
  logits_.assign(logits.begin(), logits.end());
  for (const auto& [id, bias] : options_.logit_bias) logits_[id] += bias;
  for (const auto& [id, seen] : seen_) {
    if (id < 0 || id >= vocab_size_) continue;
    float& x = logits_[id];
    x = x > 0 ? x / options_.repetition_penalty : x * options_.repetition_penalty;
    if (seen.generated > 0)
      x -= options_.presence_penalty + options_.frequency_penalty * seen.generated;
  }
  for (int32_t id : banned) {
    if (id >= 0 && id < vocab_size_) logits_[id] = -kInfinity;
  }
  const int32_t best =
      static_cast<int32_t>(std::max_element(logits_.begin(), logits_.end()) - logits_.begin());
  if (logits_[best] == -kInfinity)
    return absl::InvalidArgumentError("sampler: every token is banned");
  if (options_.temperature == 0) {
    Accept(best);
    return best;
  }

  // Unnormalised probabilities, the likeliest 1.
  candidates_.clear();
  for (int32_t id = 0; id < vocab_size_; ++id) {
    const float p = std::exp((logits_[id] - logits_[best]) / options_.temperature);
    if (p > 0) candidates_.emplace_back(p, id);
  }
  if (options_.top_k > 0 && options_.top_k < static_cast<int>(candidates_.size())) {
    std::nth_element(candidates_.begin(), candidates_.begin() + options_.top_k, candidates_.end(),
                     Likelier);
    candidates_.resize(options_.top_k);
  }
  if (options_.top_p < 1) {
    std::sort(candidates_.begin(), candidates_.end(), Likelier);
    double total = 0, reached = 0;
    for (const auto& [p, id] : candidates_) total += p;
    size_t kept = 0;
    while (kept < candidates_.size() && reached < options_.top_p * total)
      reached += candidates_[kept++].first;
    candidates_.resize(kept);
  }
  std::erase_if(candidates_, [&](const auto& c) { return c.first < options_.min_p; });
  // In order of ids, so that the draw does not depend on how ties were sorted.
  std::sort(candidates_.begin(), candidates_.end(),
            [](const auto& a, const auto& b) { return a.second < b.second; });
  double total = 0;
  for (const auto& [p, id] : candidates_) total += p;
  const double draw = SamplingDraw(options_.seed, generated_) * total;
  double reached = 0;
  int32_t chosen = candidates_.back().second;
  for (const auto& [p, id] : candidates_) {
    reached += p;
    if (draw < reached) {
      chosen = id;
      break;
    }
  }
  Accept(chosen);
  return chosen;
}

}  // namespace memory3
