#include "inference_server/openai_response.h"

#include <algorithm>
#include <map>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "inference_server/finish_reason.h"
#include "nlohmann/json.hpp"
#include "serving/duration.h"

namespace memory3 {
namespace {

using Json = nlohmann::ordered_json;

constexpr char kNoSuchModel[] = "model: '";
constexpr char kReplacement[] = "\xEF\xBF\xBD";  // U+FFFD

std::string Dump(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}
std::string ServerSentEvent(const Json& json) { return absl::StrCat("data: ", Dump(json), "\n\n"); }

size_t Characters(const std::string& text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; });
}

// Infinite logarithms (a token of probability 0) have no JSON; OpenAI writes -9999.
double Finite(float logprob) { return std::max(static_cast<double>(logprob), -9999.0); }

Json TimingsJson(const v1::Timings& t) {
  return {{"queue_ms", Milliseconds(t.queue())},
          {"retrieve_ms", Milliseconds(t.retrieve())},
          {"load_ms", Milliseconds(t.load())},
          {"prefill_ms", Milliseconds(t.prefill())},
          {"decode_ms", Milliseconds(t.decode())},
          {"time_to_first_token_ms", Milliseconds(t.time_to_first_token())},
          {"total_ms", Milliseconds(t.total())}};
}

Json UsageJson(const v1::Usage& usage) {
  return {{"prompt_tokens", usage.prompt_tokens()},
          {"completion_tokens", usage.completion_tokens()},
          {"total_tokens", usage.prompt_tokens() + usage.completion_tokens()},
          {"prompt_tokens_details", {{"cached_tokens", usage.cached_prompt_tokens()}}}};
}

void AddUsage(const v1::Usage& usage, v1::Usage* sum) {
  sum->set_prompt_tokens(sum->prompt_tokens() + usage.prompt_tokens());
  sum->set_completion_tokens(sum->completion_tokens() + usage.completion_tokens());
  sum->set_cached_prompt_tokens(sum->cached_prompt_tokens() + usage.cached_prompt_tokens());
  sum->set_retrievals(sum->retrievals() + usage.retrievals());
  sum->set_memories_read(sum->memories_read() + usage.memories_read());
}

const char* ByteSourceName(v1::ByteSource from) {
  switch (from) {
    case v1::DEVICE:
      return "device";
    case v1::HOST:
      return "host";
    case v1::STORE:
      return "store";
    default:
      return "unknown";
  }
}

Json SourceJson(const v1::Source& source) {
  Json json = {{"document_id", source.document_id()},
               {"ordinal", source.ordinal()},
               {"title", source.title()},
               {"uri", source.uri()},
               {"char_begin", source.char_begin()},
               {"char_end", source.char_end()}};
  if (!source.text().empty()) json["text"] = source.text();
  if (!source.metadata().empty()) {
    // Sorted: a protobuf map has no order of its own.
    json["metadata"] =
        std::map<std::string, std::string>(source.metadata().begin(), source.metadata().end());
  }
  return json;
}

Json ChunkJson(int choice, const v1::ChunkProvenance& chunk) {
  Json memories = Json::array();
  for (const v1::ChunkProvenance::Memory& memory : chunk.memories()) {
    Json sources = Json::array();
    for (const v1::Source& source : memory.sources()) sources.push_back(SourceJson(source));
    memories.push_back({{"record_id", absl::BytesToHexString(memory.record_id())},
                        {"score", memory.score()},
                        {"from", ByteSourceName(memory.from())},
                        {"sources", std::move(sources)}});
  }
  return {{"index", choice},
          {"chunk", chunk.chunk()},
          {"generated", chunk.generated()},
          {"token_begin", chunk.token_begin()},
          {"token_end", chunk.token_end()},
          {"inherited", chunk.inherited()},
          {"timed_out", chunk.timed_out()},
          {"unavailable", chunk.unavailable()},
          {"memories", std::move(memories)}};
}

// The bytes of a token's text; null where it is a part of a character, which its text cannot say.
Json BytesJson(const std::string& text) {
  if (absl::StrContains(text, kReplacement)) return nullptr;
  Json bytes = Json::array();
  for (const char byte : text) bytes.push_back(static_cast<uint8_t>(byte));
  return bytes;
}

Json ChatTokenJson(const v1::TokenLogprob& token) {
  return {{"token", token.text()},
          {"logprob", Finite(token.logprob())},
          {"bytes", BytesJson(token.text())}};
}

Json ChatLogprobsJson(const google::protobuf::RepeatedPtrField<v1::TokenLogprobs>& tokens) {
  Json content = Json::array();
  for (const v1::TokenLogprobs& token : tokens) {
    Json entry = ChatTokenJson(token.chosen());
    Json top = Json::array();
    for (const v1::TokenLogprob& other : token.top()) top.push_back(ChatTokenJson(other));
    entry["top_logprobs"] = std::move(top);
    content.push_back(std::move(entry));
  }
  return {{"content", std::move(content)}, {"refusal", nullptr}};
}

// `offset`: characters of the text before the first token; moved behind the last.
Json CompletionLogprobsJson(const google::protobuf::RepeatedPtrField<v1::TokenLogprobs>& tokens,
                            size_t* offset) {
  Json texts = Json::array(), logprobs = Json::array(), tops = Json::array(),
       offsets = Json::array();
  for (const v1::TokenLogprobs& token : tokens) {
    texts.push_back(token.chosen().text());
    logprobs.push_back(Finite(token.chosen().logprob()));
    // Two tokens may have one text (parts of characters); the likelier one stands.
    Json top = Json::object();
    const auto add = [&](const v1::TokenLogprob& other) {
      const auto found = top.find(other.text());
      if (found == top.end() || found->get<double>() < Finite(other.logprob()))
        top[other.text()] = Finite(other.logprob());
    };
    for (const v1::TokenLogprob& other : token.top()) add(other);
    add(token.chosen());
    tops.push_back(token.top().empty() ? Json(nullptr) : std::move(top));
    offsets.push_back(*offset);
    *offset += Characters(token.chosen().text());
  }
  return {{"tokens", std::move(texts)},
          {"token_logprobs", std::move(logprobs)},
          {"top_logprobs", std::move(tops)},
          {"text_offset", std::move(offsets)}};
}

Json HeaderJson(const AnswerHeader& header, const char* object) {
  return {
      {"id", header.id}, {"object", object}, {"created", header.created}, {"model", header.model}};
}

Json KnowledgeBaseJson(const v1::PromptInfo& prompt) {
  return {{"knowledge_base", prompt.knowledge_base()},
          {"knowledge_base_version", prompt.knowledge_base_version()}};
}

Json ModelJson(const v1::GetModelResponse& model, const std::string& id, int64_t created) {
  return {{"id", id},
          {"object", "model"},
          {"created", created},
          {"owned_by", "memory3"},
          {"memory",
           {{"knowledge_bases", model.knowledge_bases()},
            {"chunk_tokens", model.chunk_tokens()},
            {"references_per_chunk", model.references_per_chunk()},
            {"dense_mode", model.dense_mode()}}},
          {"parameters", model.parameters()},
          {"max_context_tokens", model.max_context_tokens()},
          {"vocabulary_size", model.vocabulary_size()},
          {"device", model.device()},
          {"weights", model.weights()}};
}

}  // namespace

void AddEvent(const v1::GenerateResponse& event, v1::GenerateUnaryResponse* answer) {
  switch (event.event_case()) {
    case v1::GenerateResponse::kPrompt:
      *answer->mutable_prompt() = event.prompt();
      break;
    case v1::GenerateResponse::kDelta:
      answer->mutable_text()->append(event.delta().text());
      answer->mutable_token_ids()->MergeFrom(event.delta().token_ids());
      answer->mutable_logprobs()->MergeFrom(event.delta().logprobs());
      break;
    case v1::GenerateResponse::kProvenance:
      *answer->add_provenance() = event.provenance();
      break;
    case v1::GenerateResponse::kFinish:
      *answer->mutable_finish() = event.finish();
      break;
    case v1::GenerateResponse::EVENT_NOT_SET:
      break;
  }
}

std::string AnswerBody(const AnswerHeader& header,
                       std::span<const v1::GenerateUnaryResponse> answers) {
  const bool chat = header.endpoint == OpenAiEndpoint::kChat;
  Json choices = Json::array(), chunks = Json::array();
  v1::Usage usage;
  for (size_t i = 0; i < answers.size(); ++i) {
    const v1::GenerateUnaryResponse& answer = answers[i];
    Json choice = {{"index", i}};
    Json logprobs = nullptr;
    if (chat) {
      choice["message"] = {{"role", "assistant"}, {"content", answer.text()}, {"refusal", nullptr}};
      if (answer.logprobs_size() > 0) logprobs = ChatLogprobsJson(answer.logprobs());
    } else {
      choice["text"] = answer.text();
      size_t offset = 0;
      if (answer.logprobs_size() > 0) logprobs = CompletionLogprobsJson(answer.logprobs(), &offset);
    }
    choice["logprobs"] = std::move(logprobs);
    choice["finish_reason"] = FinishReasonName(answer.finish().reason());
    choices.push_back(std::move(choice));
    for (const v1::ChunkProvenance& chunk : answer.provenance())
      chunks.push_back(ChunkJson(static_cast<int>(i), chunk));
    AddUsage(answer.finish().usage(), &usage);
  }
  Json body = HeaderJson(header, chat ? "chat.completion" : "text_completion");
  body["choices"] = std::move(choices);
  body["usage"] = UsageJson(usage);
  if (!answers.empty()) {
    body["timings"] = TimingsJson(answers[0].finish().timings());
    if (!answers[0].prompt().knowledge_base().empty() || !chunks.empty()) {
      body["memory"] = KnowledgeBaseJson(answers[0].prompt());
      body["memory"]["retrievals"] = usage.retrievals();
      body["memory"]["memories_read"] = usage.memories_read();
      body["memory"]["chunks"] = std::move(chunks);
    }
  }
  return Dump(body);
}

AnswerStream::AnswerStream(AnswerHeader header, int choices, bool include_usage)
    : header_(std::move(header)), include_usage_(include_usage), choices_(choices) {}

std::string AnswerStream::Event(int choice, const v1::GenerateResponse& event) {
  const bool chat = header_.endpoint == OpenAiEndpoint::kChat;
  Choice& state = choices_[choice];
  // Every part has a choice, though maybe an empty one: clients look at choices[0] unasked.
  Json part = {{"index", choice}};
  Json text = chat ? Json::object() : Json("");
  Json logprobs = nullptr, finish_reason = nullptr, memory, timings;
  if (chat && !state.begun) text = {{"role", "assistant"}, {"content", ""}};

  switch (event.event_case()) {
    case v1::GenerateResponse::kPrompt:
      if (!event.prompt().knowledge_base().empty()) memory = KnowledgeBaseJson(event.prompt());
      if (!chat && memory.is_null()) return "";
      break;
    case v1::GenerateResponse::kDelta: {
      const v1::Delta& delta = event.delta();
      if (delta.text().empty() && delta.logprobs().empty()) return "";
      if (chat) {
        text["content"] = delta.text();
        if (!delta.logprobs().empty()) logprobs = ChatLogprobsJson(delta.logprobs());
      } else {
        text = delta.text();
        if (!delta.logprobs().empty())
          logprobs = CompletionLogprobsJson(delta.logprobs(), &state.text_offset);
      }
      break;
    }
    case v1::GenerateResponse::kProvenance:
      memory = {{"chunks", Json::array({ChunkJson(choice, event.provenance())})}};
      break;
    case v1::GenerateResponse::kFinish: {
      const v1::Finish& finish = event.finish();
      finish_reason = FinishReasonName(finish.reason());
      AddUsage(finish.usage(), &usage_);
      timings = TimingsJson(finish.timings());
      if (finish.usage().retrievals() > 0) {
        memory = {{"retrievals", finish.usage().retrievals()},
                  {"memories_read", finish.usage().memories_read()}};
      }
      break;
    }
    case v1::GenerateResponse::EVENT_NOT_SET:
      return "";
  }
  state.begun = true;
  part[chat ? "delta" : "text"] = std::move(text);
  part["logprobs"] = std::move(logprobs);
  part["finish_reason"] = std::move(finish_reason);
  Json body = HeaderJson(header_, chat ? "chat.completion.chunk" : "text_completion");
  body["choices"] = Json::array({std::move(part)});
  if (include_usage_) body["usage"] = nullptr;
  if (!memory.is_null()) body["memory"] = std::move(memory);
  if (!timings.is_null()) body["timings"] = std::move(timings);
  return ServerSentEvent(body);
}

std::string AnswerStream::End() {
  std::string out;
  if (include_usage_) {
    Json body =
        HeaderJson(header_, header_.endpoint == OpenAiEndpoint::kChat ? "chat.completion.chunk"
                                                                      : "text_completion");
    body["choices"] = Json::array();
    body["usage"] = UsageJson(usage_);
    out = ServerSentEvent(body);
  }
  return out + "data: [DONE]\n\n";
}

std::string AnswerStream::Error(const absl::Status& status) {
  return absl::StrCat("data: ", ToHttpError(status).body, "\n\n");
}

std::string ModelsBody(const v1::GetModelResponse& model, int64_t created) {
  Json models = Json::array({ModelJson(model, model.name(), created)});
  for (const std::string& name : model.knowledge_bases())
    models.push_back(ModelJson(model, absl::StrCat(model.name(), "@", name), created));
  return Dump({{"object", "list"}, {"data", std::move(models)}});
}

std::string ModelBody(const v1::GetModelResponse& model, const std::string& id, int64_t created) {
  return Dump(ModelJson(model, id, created));
}

HttpError ToHttpError(const absl::Status& status) {
  struct Kind {
    int http;
    const char* type;
    const char* code;  // null: none
  };
  const auto kind = [&]() -> Kind {
    switch (status.code()) {
      case absl::StatusCode::kInvalidArgument:
      case absl::StatusCode::kOutOfRange:
      case absl::StatusCode::kFailedPrecondition:
        return {400, "invalid_request_error", nullptr};
      case absl::StatusCode::kUnauthenticated:
        return {401, "invalid_request_error", "invalid_api_key"};
      case absl::StatusCode::kPermissionDenied:
        return {403, "permission_error", "permission_denied"};
      case absl::StatusCode::kNotFound:
        if (absl::StartsWith(std::string(status.message()), kNoSuchModel))
          return {404, "invalid_request_error", "model_not_found"};
        return {404, "invalid_request_error", "not_found"};
      case absl::StatusCode::kAlreadyExists:
      case absl::StatusCode::kAborted:
        return {409, "invalid_request_error", "conflict"};
      case absl::StatusCode::kResourceExhausted:
        return {429, "requests", "rate_limit_exceeded"};
      case absl::StatusCode::kUnimplemented:
        return {501, "server_error", nullptr};
      case absl::StatusCode::kUnavailable:
      case absl::StatusCode::kCancelled:
        return {503, "server_error", "unavailable"};
      case absl::StatusCode::kDeadlineExceeded:
        return {504, "server_error", "timeout"};
      default:
        return {500, "server_error", nullptr};
    }
  }();
  const std::string message(status.message());
  const std::string param = OpenAiParam(message);
  return {kind.http, Dump({{"error",
                            {{"message", message},
                             {"type", kind.type},
                             {"param", param.empty() ? Json(nullptr) : Json(param)},
                             {"code", kind.code == nullptr ? Json(nullptr) : Json(kind.code)}}}})};
}

absl::Status NoSuchModel(const std::string& asked, const std::string& served) {
  return absl::NotFoundError(
      absl::StrCat(kNoSuchModel, asked, "' does not exist; this server has '", served, "'"));
}

}  // namespace memory3
