#include "inference_server/openai_request.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "transformer/json.h"

namespace memory3 {
namespace {

using Json = nlohmann::json;

// OpenAI's defaults where they differ from the proto's.
constexpr float kDefaultTemperature = 1;
constexpr int kDefaultCompletionTokens = 16;
constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();
constexpr int kMaxLogprobs = 20;
// A filter travels to the memory server with every retrieval.
constexpr size_t kMaxFilterTerms = 1024;

const char* KindOf(const Json& value) {
  if (value.is_string()) return "a string";
  if (value.is_boolean()) return "a boolean";
  if (value.is_number_float()) return "a fraction";
  if (value.is_number()) return "an integer";
  if (value.is_array()) return "an array";
  return value.is_object() ? "an object" : "null";
}

// Reads the fields of one JSON object. The first thing wrong stays in `status`; after that every
// read answers nothing.
class Fields {
 public:
  // `path` goes before a field's name in messages ("memory.").
  Fields(const Json& object, std::string path, absl::Status* status)
      : object_(object), path_(std::move(path)), status_(status) {}

  // The field, if it is there and not null.
  const Json* Find(const char* name) {
    known_.insert(name);
    if (!status_->ok()) return nullptr;
    const auto found = object_.find(name);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }
  void Fail(std::string_view name, std::string_view what) {
    if (status_->ok()) {
      *status_ = absl::InvalidArgumentError(
          absl::StrCat(path_, std::string(name), ": ", std::string(what)));
    }
  }
  void WrongKind(const char* name, const Json& value, const char* wanted) {
    Fail(name, absl::StrCat("must be ", wanted, ", not ", KindOf(value)));
  }

  std::optional<double> Number(const char* name, double low, double high) {
    const Json* value = Find(name);
    if (value == nullptr) return std::nullopt;
    if (!value->is_number()) {
      WrongKind(name, *value, "a number");
      return std::nullopt;
    }
    const double number = value->get<double>();
    if (!(number >= low && number <= high)) {
      Fail(name, absl::StrCat(number, " is not within ", low, " and ", high));
      return std::nullopt;
    }
    return number;
  }
  std::optional<int64_t> Integer(const char* name, int64_t low, int64_t high) {
    const Json* value = Find(name);
    if (value == nullptr) return std::nullopt;
    if (!value->is_number_integer()) {
      WrongKind(name, *value, "an integer");
      return std::nullopt;
    }
    if (!InRange(*value, low, high)) {
      Fail(name, absl::StrCat(value->dump(), " is not within ", low, " and ", high));
      return std::nullopt;
    }
    return value->get<int64_t>();
  }
  std::optional<bool> Boolean(const char* name) {
    const Json* value = Find(name);
    if (value == nullptr) return std::nullopt;
    if (!value->is_boolean()) {
      WrongKind(name, *value, "a boolean");
      return std::nullopt;
    }
    return value->get<bool>();
  }
  std::optional<std::string> String(const char* name) {
    const Json* value = Find(name);
    if (value == nullptr) return std::nullopt;
    if (!value->is_string()) {
      WrongKind(name, *value, "a string");
      return std::nullopt;
    }
    return value->get<std::string>();
  }
  // Of strings.
  std::vector<std::string> Strings(const char* name, size_t most) {
    const Json* value = Find(name);
    std::vector<std::string> strings;
    if (value == nullptr) return strings;
    if (!value->is_array() ||
        !std::all_of(value->begin(), value->end(), [](const Json& s) { return s.is_string(); })) {
      WrongKind(name, *value, "an array of strings");
    } else if (value->size() > most) {
      Fail(name, absl::StrCat(value->size(), " entries, at most ", most));
    } else {
      strings = value->get<std::vector<std::string>>();
    }
    return strings;
  }
  // Accepted, without effect.
  void Ignore(std::initializer_list<const char*> names) {
    known_.insert(names.begin(), names.end());
  }
  // Accepted where it says what is the case anyway.
  void Only(const char* name, const Json& neutral) {
    const Json* value = Find(name);
    if (value != nullptr && *value != neutral)
      Fail(name, absl::StrCat("only ", neutral.dump(), " is supported"));
  }
  void Unsupported(std::initializer_list<const char*> names) {
    for (const char* name : names) {
      const Json* value = Find(name);
      if (value != nullptr && !(value->is_array() && value->empty()))
        Fail(name, "is not supported");
    }
  }
  void RefuseUnknown() {
    if (!status_->ok()) return;
    for (const auto& [name, value] : object_.items()) {
      if (!known_.contains(name)) {
        *status_ = absl::InvalidArgumentError(
            absl::StrCat("Unrecognized request argument supplied: ", path_, name.substr(0, 64)));
        return;
      }
    }
  }

 private:
  // 2^63 and above is unsigned in the parser's eyes.
  static bool InRange(const Json& value, int64_t low, int64_t high) {
    if (value.is_number_unsigned()) {
      const auto number = value.get<uint64_t>();
      return number <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) &&
             static_cast<int64_t>(number) >= low && static_cast<int64_t>(number) <= high;
    }
    return value.get<int64_t>() >= low && value.get<int64_t>() <= high;
  }

  const Json& object_;
  const std::string path_;
  absl::Status* const status_;
  std::set<std::string, std::less<>> known_;
};

bool IsIds(const Json& value) {
  return value.is_array() && !value.empty() &&
         std::all_of(value.begin(), value.end(),
                     [](const Json& id) { return id.is_number_integer(); });
}

// False: an id that is no int32.
bool ReadIds(const Json& value, google::protobuf::RepeatedField<int32_t>* ids) {
  for (const Json& id : value) {
    if (id.is_number_unsigned() && id.get<uint64_t>() > kMaxTokens) return false;
    const auto number = id.get<int64_t>();
    if (number < 0 || number > kMaxTokens) return false;
    ids->Add(static_cast<int32_t>(number));
  }
  return true;
}

// `prompt`: a string, ids, or an array of either.
void ReadPrompts(Fields& fields, OpenAiRequest* out) {
  const Json* prompt = fields.Find("prompt");
  if (prompt == nullptr) return fields.Fail("prompt", "is missing");
  const auto add = [&](const Json& one, const std::string& name) {
    v1::GenerateRequest& request = out->requests.emplace_back();
    if (one.is_string()) {
      request.set_text(one.get<std::string>());
      if (request.text().empty()) fields.Fail(name, "it is empty");
    } else if (!IsIds(one)) {
      fields.Fail(name, "must be a string or an array of token ids that is not empty");
    } else if (!ReadIds(one, request.mutable_token_ids()->mutable_ids())) {
      fields.Fail(name, "an id is negative or too large");
    }
  };
  if (!prompt->is_array() || IsIds(*prompt)) return add(*prompt, "prompt");
  if (prompt->empty()) return fields.Fail("prompt", "it is empty");
  if (prompt->size() > kMaxPrompts)
    return fields.Fail("prompt", absl::StrCat(prompt->size(), " prompts, at most ", kMaxPrompts));
  for (size_t i = 0; i < prompt->size(); ++i) add((*prompt)[i], absl::StrCat("prompt[", i, "]"));
}

// A message's content: a string, or an array of text parts.
std::optional<std::string> ReadContent(Fields& fields) {
  const Json* content = fields.Find("content");
  if (content == nullptr) {
    fields.Fail("content", "is missing");
    return std::nullopt;
  }
  if (content->is_string()) return content->get<std::string>();
  if (!content->is_array()) {
    fields.WrongKind("content", *content, "a string or an array of parts");
    return std::nullopt;
  }
  std::string text;
  for (size_t i = 0; i < content->size(); ++i) {
    const Json& part = (*content)[i];
    const auto type = part.is_object() ? part.find("type") : part.end();
    const auto part_text = part.is_object() ? part.find("text") : part.end();
    if (!part.is_object() || type == part.end() || *type != "text" || part_text == part.end() ||
        !part_text->is_string()) {
      fields.Fail(absl::StrCat("content[", i, "]"),
                  R"(only parts {"type": "text", "text": …} are supported)");
      return std::nullopt;
    }
    text += part_text->get_ref<const std::string&>();
  }
  return text;
}

void ReadMessages(Fields& fields, absl::Status* status, OpenAiRequest* out) {
  const Json* messages = fields.Find("messages");
  if (messages == nullptr) return fields.Fail("messages", "is missing");
  if (!messages->is_array()) return fields.WrongKind("messages", *messages, "an array");
  if (messages->empty()) return fields.Fail("messages", "it is empty");
  for (size_t i = 0; i < messages->size() && status->ok(); ++i) {
    const Json& message = (*messages)[i];
    if (!message.is_object())
      return fields.Fail(absl::StrCat("messages[", i, "]"), "must be an object");
    Fields of_message(message, absl::StrCat("messages[", i, "]."), status);
    std::optional<std::string> role = of_message.String("role");
    if (!role) of_message.Fail("role", "is missing");
    std::optional<std::string> content = ReadContent(of_message);
    of_message.Ignore({"name"});
    of_message.Unsupported(
        {"tool_calls", "tool_call_id", "function_call", "refusal", "audio", "annotations"});
    of_message.RefuseUnknown();
    // What OpenAI calls the system's words to its newer models.
    if (role == "developer") role = "system";
    if (role && content) out->messages.push_back({*std::move(role), *std::move(content)});
  }
  out->requests.emplace_back();
}

void ReadFilter(const Json& value, absl::Status* status, v1::Filter* filter) {
  Fields fields(value, "memory.filter.", status);
  for (std::string& id : fields.Strings("document_ids", kMaxFilterTerms))
    filter->add_document_ids(std::move(id));
  if (const Json* metadata = fields.Find("metadata")) {
    if (!metadata->is_object()) return fields.WrongKind("metadata", *metadata, "an object");
    if (metadata->size() > kMaxFilterTerms) {
      return fields.Fail("metadata",
                         absl::StrCat(metadata->size(), " entries, at most ", kMaxFilterTerms));
    }
    for (const auto& [key, text] : metadata->items()) {
      if (!text.is_string()) return fields.Fail("metadata", "values must be strings");
      (*filter->mutable_metadata())[key] = text.get<std::string>();
    }
  }
  fields.RefuseUnknown();
}

void ReadPolicy(Fields& fields, v1::MemoryOptions* options) {
  const std::optional<double> deadline_ms = fields.Number("deadline_ms", 0, 3.6e6);
  const std::optional<std::string> policy = fields.String("policy");
  if (policy == "off") {
    options->set_enabled(false);
  } else if (policy == "wait") {
    options->set_policy(v1::MemoryOptions::WAIT);
  } else if (policy == "deadline" || (!policy && deadline_ms)) {
    options->set_policy(v1::MemoryOptions::DEADLINE);
    if (!deadline_ms) fields.Fail("deadline_ms", "is missing; the policy \"deadline\" needs it");
  } else if (policy) {
    fields.Fail("policy", R"(must be "wait", "deadline" or "off")");
  }
  if (!deadline_ms) return;
  if (options->policy() != v1::MemoryOptions::DEADLINE)
    return fields.Fail("deadline_ms", "goes with the policy \"deadline\" only");
  const auto nanoseconds = static_cast<int64_t>(std::llround(*deadline_ms * 1e6));
  options->mutable_deadline()->set_seconds(nanoseconds / 1'000'000'000);
  options->mutable_deadline()->set_nanos(static_cast<int32_t>(nanoseconds % 1'000'000'000));
}

void ReadMemory(const Json& value, absl::Status* status, v1::MemoryOptions* options) {
  Fields fields(value, "memory.", status);
  if (const auto enabled = fields.Boolean("enabled")) options->set_enabled(*enabled);
  if (auto name = fields.String("knowledge_base")) options->set_knowledge_base(*std::move(name));
  if (const auto count = fields.Integer("references_per_chunk", 0, kMaxTokens))
    options->set_references_per_chunk(static_cast<uint32_t>(*count));
  if (const auto score = fields.Number("min_score", -1e6, 1e6))
    options->set_min_score(static_cast<float>(*score));
  if (const auto with_text = fields.Boolean("with_text")) options->set_with_text(*with_text);
  if (const auto unavailable = fields.String("on_unavailable")) {
    if (*unavailable == "degrade") {
      options->set_on_unavailable(v1::MemoryOptions::DEGRADE);
    } else if (*unavailable == "fail") {
      options->set_on_unavailable(v1::MemoryOptions::FAIL);
    } else {
      fields.Fail("on_unavailable", R"(must be "degrade" or "fail")");
    }
  }
  ReadPolicy(fields, options);
  if (const Json* filter = fields.Find("filter")) {
    if (filter->is_object()) {
      ReadFilter(*filter, status, options->mutable_filter());
    } else {
      fields.WrongKind("filter", *filter, "an object");
    }
  }
  fields.RefuseUnknown();
}

void ReadSampling(Fields& fields, v1::SamplingOptions* sampling) {
  sampling->set_temperature(
      static_cast<float>(fields.Number("temperature", 0, 2).value_or(kDefaultTemperature)));
  if (const auto p = fields.Number("top_p", 0, 1)) sampling->set_top_p(static_cast<float>(*p));
  if (const auto p = fields.Number("min_p", 0, 1)) sampling->set_min_p(static_cast<float>(*p));
  if (const auto k = fields.Integer("top_k", -1, kMaxTokens))
    sampling->set_top_k(static_cast<uint32_t>(std::max<int64_t>(*k, 0)));
  if (const auto penalty = fields.Number("repetition_penalty", 0, 10))
    sampling->set_repetition_penalty(static_cast<float>(*penalty));
  if (const auto penalty = fields.Number("presence_penalty", -2, 2))
    sampling->set_presence_penalty(static_cast<float>(*penalty));
  if (const auto penalty = fields.Number("frequency_penalty", -2, 2))
    sampling->set_frequency_penalty(static_cast<float>(*penalty));
  if (const auto seed = fields.Integer("seed", std::numeric_limits<int64_t>::min(),
                                       std::numeric_limits<int64_t>::max()))
    sampling->set_seed(static_cast<uint64_t>(*seed));
  const Json* bias = fields.Find("logit_bias");
  if (bias == nullptr) return;
  if (!bias->is_object()) return fields.WrongKind("logit_bias", *bias, "an object");
  for (const auto& [key, value] : bias->items()) {
    int32_t id = 0;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), id);
    if (error != std::errc() || end != key.data() + key.size() || id < 0)
      return fields.Fail("logit_bias", "a key is no token id");
    const double number = value.is_number() ? value.get<double>() : 1000;
    if (!(number >= -100 && number <= 100))
      return fields.Fail(
          "logit_bias", absl::StrCat("the value of ", id, " must be a number within -100 and 100"));
    if (!sampling->mutable_logit_bias()->insert({id, static_cast<float>(number)}).second)
      return fields.Fail("logit_bias", absl::StrCat("token id ", id, " is given twice"));
  }
}

void ReadStopping(OpenAiEndpoint endpoint, Fields& fields, v1::StopOptions* stopping) {
  std::optional<int64_t> most = fields.Integer("max_tokens", 1, kMaxTokens);
  if (endpoint == OpenAiEndpoint::kChat) {
    const auto newer = fields.Integer("max_completion_tokens", 1, kMaxTokens);
    if (most && newer && *most != *newer)
      fields.Fail("max_completion_tokens", "contradicts max_tokens");
    if (newer) most = newer;
  } else if (!most) {
    most = kDefaultCompletionTokens;
  }
  if (most) stopping->set_max_new_tokens(static_cast<uint32_t>(*most));
  if (const auto least = fields.Integer("min_tokens", 0, kMaxTokens))
    stopping->set_min_new_tokens(static_cast<uint32_t>(*least));
  if (const auto ignore = fields.Boolean("ignore_eos")) stopping->set_ignore_eos(*ignore);
  const Json* stop = fields.Find("stop");
  if (stop != nullptr && stop->is_string()) {
    stopping->add_stop(stop->get<std::string>());
  } else if (stop != nullptr) {
    for (std::string& text : fields.Strings("stop", 16)) stopping->add_stop(std::move(text));
  }
  if (std::any_of(stopping->stop().begin(), stopping->stop().end(),
                  [](const std::string& text) { return text.empty(); }))
    fields.Fail("stop", "a string is empty");
  if (const Json* ids = fields.Find("stop_token_ids")) {
    const bool empty = ids->is_array() && ids->empty();
    if (!empty && (!IsIds(*ids) || !ReadIds(*ids, stopping->mutable_stop_token_ids())))
      fields.Fail("stop_token_ids", "must be an array of token ids");
  }
}

void ReadLogprobs(OpenAiEndpoint endpoint, Fields& fields, v1::GenerateRequest* request) {
  if (endpoint == OpenAiEndpoint::kCompletions) {
    if (const auto count = fields.Integer("logprobs", 0, kMaxLogprobs))
      request->set_logprobs(static_cast<uint32_t>(*count));
    if (const auto echo = fields.Boolean("echo")) request->set_echo(*echo);
    // OpenAI's would have those of the prompt's tokens, too.
    if (request->echo() && request->has_logprobs())
      fields.Fail("logprobs", "cannot be combined with echo");
    return;
  }
  const bool wanted = fields.Boolean("logprobs").value_or(false);
  const auto top = fields.Integer("top_logprobs", 0, kMaxLogprobs);
  if (top && *top > 0 && !wanted) fields.Fail("top_logprobs", "needs logprobs = true");
  if (wanted) request->set_logprobs(static_cast<uint32_t>(top.value_or(0)));
}

void ReadStream(Fields& fields, absl::Status* status, OpenAiRequest* out) {
  out->stream = fields.Boolean("stream").value_or(false);
  const Json* options = fields.Find("stream_options");
  if (options == nullptr) return;
  if (!out->stream) return fields.Fail("stream_options", "goes with stream = true only");
  if (!options->is_object()) return fields.WrongKind("stream_options", *options, "an object");
  Fields of_stream(*options, "stream_options.", status);
  out->include_usage = of_stream.Boolean("include_usage").value_or(false);
  of_stream.Ignore({"include_obfuscation"});
  of_stream.RefuseUnknown();
}

// What OpenAI has and we have not.
void ReadForeign(OpenAiEndpoint endpoint, Fields& fields) {
  fields.Only("n", 1);
  fields.Ignore({"user", "metadata", "service_tier", "store", "safety_identifier",
                 "prompt_cache_key", "prompt_cache_retention"});
  if (endpoint == OpenAiEndpoint::kCompletions) {
    fields.Only("best_of", 1);
    fields.Only("suffix", "");
    return;
  }
  fields.Only("response_format", Json{{"type", "text"}});
  fields.Only("modalities", Json::array({"text"}));
  fields.Unsupported({"tools", "functions", "audio", "prediction", "web_search_options",
                      "reasoning_effort", "verbosity", "function_call"});
  if (const Json* choice = fields.Find("tool_choice");
      choice && *choice != "none" && *choice != "auto")
    fields.Fail("tool_choice", "is not supported");
  fields.Ignore({"parallel_tool_calls"});  // without tools there is nothing to call
}

}  // namespace

absl::StatusOr<OpenAiRequest> ParseOpenAiRequest(OpenAiEndpoint endpoint, std::string_view body) {
  absl::StatusOr<Json> root = ParseJson(body, "the request's body");
  if (!root.ok()) return root.status();
  if (!root->is_object())
    return absl::InvalidArgumentError("the request's body must be a JSON object");
  absl::Status status;
  OpenAiRequest out{.endpoint = endpoint};
  Fields fields(*root, "", &status);
  if (auto model = fields.String("model")) {
    out.model = *std::move(model);
  } else {
    fields.Fail("model", "is missing");
  }
  v1::GenerateRequest options;
  if (endpoint == OpenAiEndpoint::kChat) {
    ReadMessages(fields, &status, &out);
  } else {
    ReadPrompts(fields, &out);
  }
  ReadSampling(fields, options.mutable_sampling());
  ReadStopping(endpoint, fields, options.mutable_stopping());
  ReadLogprobs(endpoint, fields, &options);
  ReadStream(fields, &status, &out);
  ReadForeign(endpoint, fields);
  if (const Json* memory = fields.Find("memory")) {
    if (memory->is_boolean()) {
      options.mutable_memory()->set_enabled(memory->get<bool>());
    } else if (memory->is_object()) {
      ReadMemory(*memory, &status, options.mutable_memory());
    } else {
      fields.WrongKind("memory", *memory, "an object or a boolean");
    }
  }
  fields.RefuseUnknown();
  if (!status.ok()) return status;
  for (v1::GenerateRequest& request : out.requests) request.MergeFrom(options);
  return out;
}

std::string OpenAiParam(std::string_view message) {
  constexpr std::string_view kUnknown = "Unrecognized request argument supplied: ";
  if (message.substr(0, kUnknown.size()) == kUnknown)
    return std::string(message.substr(kUnknown.size()));
  size_t end = 0;
  while (end < message.size() &&
         ((message[end] >= 'a' && message[end] <= 'z') ||
          (message[end] >= '0' && message[end] <= '9') || message[end] == '_' ||
          message[end] == '.' || message[end] == '[' || message[end] == ']')) {
    ++end;
  }
  const std::string_view rest = message.substr(end);
  const auto follows = [&](std::string_view next) { return rest.substr(0, next.size()) == next; };
  if (end == 0 || !(follows(": ") || follows(" is ") || follows(" has "))) return "";
  std::string param(message.substr(0, end));
  // The engine's words for what OpenAI's clients call otherwise.
  static constexpr std::array<std::pair<std::string_view, std::string_view>, 5> kNames = {{
      {"stopping.max_new_tokens", "max_tokens"},
      {"stopping.min_new_tokens", "min_tokens"},
      {"memory.deadline", "memory.deadline_ms"},
      {"prompt.token_ids", "prompt"},
      {"prompt.text", "prompt"},
  }};
  for (const auto& [ours, theirs] : kNames) {
    if (param == ours || (param.substr(0, ours.size()) == ours && param[ours.size()] == '['))
      return std::string(theirs) + param.substr(ours.size());
  }
  for (const std::string_view prefix : {"stopping.", "sampling."}) {
    if (param.substr(0, prefix.size()) == prefix) param.erase(0, prefix.size());
  }
  return param;
}

}  // namespace memory3
