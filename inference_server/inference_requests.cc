#include "inference_server/inference_requests.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"

namespace memory3 {
namespace {

constexpr size_t kMaxRequestId = 256;
constexpr size_t kMaxStopBytes = 4096;
constexpr int kMaxStopIds = 1024;  // each is compared with every token

// Values that no limit of the engine's reaches are its to refuse or to cut.
int ToInt(uint32_t value) {
  return static_cast<int>(std::min<uint32_t>(value, std::numeric_limits<int>::max()));
}

std::vector<int32_t> ToVector(const google::protobuf::RepeatedField<int32_t>& ids) {
  return {ids.begin(), ids.end()};
}

absl::StatusOr<std::vector<int32_t>> PromptIds(bool has_text, const std::string& text,
                                               const v1::TokenIds& token_ids,
                                               const Tokenizer& tokenizer) {
  if (!has_text) {
    if (token_ids.ids().empty()) return absl::InvalidArgumentError("prompt: it is empty");
    return ToVector(token_ids.ids());
  }
  if (text.empty()) return absl::InvalidArgumentError("prompt.text: it is empty");
  return tokenizer.Encode(text);
}

SamplingOptions ToSampling(const v1::SamplingOptions& proto) {
  SamplingOptions options;
  if (proto.has_temperature()) options.temperature = proto.temperature();
  options.top_k = ToInt(proto.top_k());
  if (proto.has_top_p()) options.top_p = proto.top_p();
  if (proto.has_min_p()) options.min_p = proto.min_p();
  if (proto.has_repetition_penalty()) options.repetition_penalty = proto.repetition_penalty();
  options.presence_penalty = proto.presence_penalty();
  options.frequency_penalty = proto.frequency_penalty();
  options.logit_bias.assign(proto.logit_bias().begin(), proto.logit_bias().end());
  std::sort(options.logit_bias.begin(), options.logit_bias.end());
  options.seed = proto.seed();
  return options;
}

// A duration of the wire. INVALID_ARGUMENT: none that Protobuf allows, or negative.
absl::StatusOr<absl::Duration> ToDuration(const google::protobuf::Duration& proto,
                                          const char* field) {
  constexpr int64_t kLongest = 315'576'000'000;  // seconds: Protobuf's limit
  if (proto.seconds() < 0 || proto.nanos() < 0 || proto.seconds() > kLongest ||
      proto.nanos() > 999'999'999) {
    return absl::InvalidArgumentError(absl::StrCat(field, " is ", proto.seconds(), " s and ",
                                                   proto.nanos(), " ns, which is no duration"));
  }
  return absl::Seconds(proto.seconds()) + absl::Nanoseconds(proto.nanos());
}

}  // namespace

absl::StatusOr<EngineRequest> ToEngineRequest(const v1::GenerateRequest& request,
                                              const Tokenizer& tokenizer,
                                              const std::vector<int32_t>& eos) {
  EngineRequest result;
  if (request.request_id().size() > kMaxRequestId) {
    return absl::InvalidArgumentError(absl::StrCat("request_id has ", request.request_id().size(),
                                                   " bytes, at most ", kMaxRequestId));
  }
  result.request_id = request.request_id();
  absl::StatusOr<std::vector<int32_t>> prompt =
      PromptIds(request.has_text(), request.text(), request.token_ids(), tokenizer);
  if (!prompt.ok()) return prompt.status();
  result.prompt = *std::move(prompt);
  result.sampling = ToSampling(request.sampling());

  const v1::StopOptions& stopping = request.stopping();
  if (stopping.has_max_new_tokens()) result.max_new_tokens = ToInt(stopping.max_new_tokens());
  result.min_new_tokens = ToInt(stopping.min_new_tokens());
  for (int i = 0; i < stopping.stop_size(); ++i) {
    if (stopping.stop(i).size() > kMaxStopBytes) {
      return absl::InvalidArgumentError(absl::StrCat("stopping.stop[", i, "] has ",
                                                     stopping.stop(i).size(), " bytes, at most ",
                                                     kMaxStopBytes));
    }
    result.stop.push_back(stopping.stop(i));
  }
  if (stopping.stop_token_ids_size() > kMaxStopIds) {
    return absl::InvalidArgumentError(absl::StrCat("stopping.stop_token_ids has ",
                                                   stopping.stop_token_ids_size(), " ids, at most ",
                                                   kMaxStopIds));
  }
  result.stop_token_ids = ToVector(stopping.stop_token_ids());
  if (!stopping.ignore_eos()) result.eos_token_ids = eos;
  if (request.has_logprobs()) result.logprobs = ToInt(request.logprobs());
  result.echo = request.echo();
  return result;
}

absl::StatusOr<EngineRequest> ToEngineRequest(const v1::ScoreRequest& request,
                                              const Tokenizer& tokenizer) {
  EngineRequest result;
  absl::StatusOr<std::vector<int32_t>> prompt =
      PromptIds(request.has_text(), request.text(), request.token_ids(), tokenizer);
  if (!prompt.ok()) return prompt.status();
  result.prompt = *std::move(prompt);
  if (request.has_continuation_ids()) {
    result.continuation = ToVector(request.continuation_ids().ids());
  } else if (request.has_text()) {
    // The two are encoded together and cut where the prompt's own ids end, as evaluations do: a
    // tokenizer may put a space before a text of its own.
    const std::vector<int32_t> both =
        tokenizer.Encode(request.text() + request.continuation_text());
    result.continuation.emplace(both.begin() + std::min(both.size(), result.prompt.size()),
                                both.end());
    result.prompt.assign(both.begin(), both.begin() + std::min(both.size(), result.prompt.size()));
  } else {
    result.continuation = tokenizer.Encode(request.continuation_text());
  }
  if (result.continuation->empty())
    return absl::InvalidArgumentError("continuation: it has no tokens");
  return result;
}

absl::StatusOr<bool> WantsMemory(const v1::MemoryOptions& options) {
  const bool named = !options.knowledge_base().empty();
  const bool wanted = options.has_enabled() ? options.enabled() : named;
  if (wanted && !named)
    return absl::InvalidArgumentError("memory.knowledge_base: it is empty, and memory.enabled set");
  return wanted;
}

absl::StatusOr<MemoryPlan> ToMemoryPlan(const v1::MemoryOptions& options,
                                        int references_per_chunk) {
  MemoryPlan plan;
  plan.references_per_chunk = options.has_references_per_chunk()
                                  ? options.references_per_chunk()
                                  : static_cast<uint32_t>(references_per_chunk);
  if (options.has_min_score()) plan.min_score = options.min_score();
  plan.filter = options.filter();
  if (options.policy() == v1::MemoryOptions::DEADLINE) {
    if (!options.has_deadline())
      return absl::InvalidArgumentError("memory.deadline: the policy DEADLINE needs one");
    const absl::StatusOr<absl::Duration> deadline =
        ToDuration(options.deadline(), "memory.deadline");
    if (!deadline.ok()) return deadline.status();
    plan.deadline = *deadline;
  } else if (options.policy() != v1::MemoryOptions::POLICY_UNSPECIFIED &&
             options.policy() != v1::MemoryOptions::WAIT) {
    return absl::InvalidArgumentError(
        absl::StrCat("memory.policy is ", static_cast<int>(options.policy())));
  }
  if (!v1::MemoryOptions::OnUnavailable_IsValid(options.on_unavailable())) {
    return absl::InvalidArgumentError(
        absl::StrCat("memory.on_unavailable is ", static_cast<int>(options.on_unavailable())));
  }
  plan.fail_if_unavailable = options.on_unavailable() == v1::MemoryOptions::FAIL;
  plan.with_text = options.with_text();
  return plan;
}

}  // namespace memory3
