// From logits to the next token, on the host.
//
// In this order: logit bias; repetition penalty (over prompt and output), presence and frequency
// penalties (over the output); then, unless greedy, temperature, top_k, top_p, min_p, each on the
// distribution the one before leaves; then one draw. The draw for output token i is a function of
// (seed, i) alone, so a request gives the same tokens wherever, with whatever else and however
// often preempted it runs. Ties in any ranking go to the lower id.
//
// Thread-safety: a Sampler is one sequence's state, for one thread.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace memory3 {

struct SamplingOptions {
  float temperature = 0;  // [0, 100]; 0: greedy
  int top_k = 0;          // keep the k likeliest; 0: all
  float top_p = 1;        // (0, 1]: keep the fewest that together reach it
  float min_p = 0;        // [0, 1): keep those at least min_p as likely as the likeliest
  float repetition_penalty =
      1;                       // (0, 10]: divides positive logits of tokens seen, multiplies others
  float presence_penalty = 0;  // [-2, 2]: taken off tokens generated
  float frequency_penalty = 0;                             // [-2, 2]: the same per time generated
  std::vector<std::pair<int32_t, float>> logit_bias = {};  // token id, [-100, 100] added
  uint64_t seed = 0;
};

// INVALID_ARGUMENT naming the field: NaN, out of range, an id out of the vocabulary or given twice.
absl::Status CheckSampling(const SamplingOptions& options, int vocab_size);

struct TokenLogprob {
  int32_t id = 0;
  float logprob = 0;  // natural, of the model's distribution before any processing
};

// ln softmax(logits)[id].
float Logprob(std::span<const float> logits, int32_t id);
// The `count` likeliest, descending, ties to the lower id.
std::vector<TokenLogprob> TopLogprobs(std::span<const float> logits, int count);

class Sampler {
 public:
  // `prompt`: ids the repetition penalty counts as seen.
  static absl::StatusOr<Sampler> Create(const SamplingOptions& options, int vocab_size,
                                        std::span<const int32_t> prompt);

  // The next token for `logits` [vocab_size]; remembers it as generated. `banned`: ids that must
  // not be chosen now (end-of-sequence before a minimum length). INVALID_ARGUMENT: another size,
  // everything banned; INTERNAL: a logit that is NaN or +infinity.
  absl::StatusOr<int32_t> Sample(std::span<const float> logits,
                                 std::span<const int32_t> banned = {});
  // Remembers a token chosen elsewhere (a greedy choice on the device, a replay).
  void Accept(int32_t id);
  // True where Sample is the plain argmax of the logits, so that the device may choose.
  bool is_plain_greedy() const { return plain_greedy_; }
  // Tokens generated so far.
  int64_t generated() const { return generated_; }

 private:
  Sampler() = default;

  struct Seen {
    bool in_prompt = false;
    int generated = 0;
  };

  SamplingOptions options_;
  int vocab_size_ = 0;
  bool plain_greedy_ = false;
  int64_t generated_ = 0;
  absl::flat_hash_map<int32_t, Seen> seen_;
  std::vector<float> logits_;                          // scratch
  std::vector<std::pair<float, int32_t>> candidates_;  // scratch
};

// A number in [0, 1) that depends on its arguments only: the draw for output token `index`.
double SamplingDraw(uint64_t seed, uint64_t index);

}  // namespace memory3
