#include "inference_server/http_gateway.h"

#include <algorithm>
#include <random>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "inference_server/request_events.h"
#include "inference_server/web_files.h"

namespace memory3 {
namespace {

constexpr char kJson[] = "application/json";

int64_t UnixSeconds() { return absl::ToUnixSeconds(absl::Now()); }

uint64_t RandomNumber() {
  thread_local std::mt19937_64 random{std::random_device{}()};
  return random();
}

// Words for what neither a handler nor the engine has answered.
std::string PlainErrorBody(int http_status, const std::string& words) {
  absl::Status status = absl::InvalidArgumentError(words);
  if (http_status == 404) status = absl::NotFoundError(words);
  if (http_status == 429) status = absl::ResourceExhaustedError(words);
  if (http_status == 503) status = absl::UnavailableError(words);
  if (http_status == 500) status = absl::InternalError(words);
  return ToHttpError(status).body;
}

// Nobody is there to read it.
void GiveUp(HttpConnection& connection, httplib::Response& response) {
  connection.MustClose();
  response.status = 499;  // nginx's number for it
}

}  // namespace

// The generations of one request, and the connection that waits for them. Cancels in its destructor
// what has not ended.
class HttpGateway::Generation {
 public:
  Generation(Inference* inference, std::shared_ptr<RequestEvents> events, int choices)
      : inference_(inference), events_(std::move(events)), choices_(choices) {}
  ~Generation() {
    for (const uint64_t number : numbers_) inference_->Cancel(number);
  }
  Generation(const Generation&) = delete;

  absl::Status Start(const Identity& identity, std::vector<v1::GenerateRequest>& requests) {
    for (int i = 0; i < choices_; ++i) {
      absl::StatusOr<uint64_t> number =
          inference_->Generate(identity, requests[i], events_->SinkFor(i));
      if (!number.ok()) return number.status();
      numbers_.push_back(*number);
    }
    return absl::OkStatus();
  }

  using Woken = HttpConnection::Woken;
  // Waits for more items, at most until `deadline`. kGone: the client is.
  Woken Wait(HttpConnection& connection, HttpTime deadline,
             std::vector<RequestEvents::Item>* items) {
    const Woken woken = connection.WaitFor(events_->fd(), deadline);
    if (woken != Woken::kEvent) return woken;
    *items = events_->Take();
    for (const RequestEvents::Item& item : *items) {
      if (!item.event) ++ended_;
    }
    return woken;
  }
  bool ended() const { return ended_ == choices_; }
  bool overflown() const { return events_->overflown(); }
  int choices() const { return choices_; }

 private:
  Inference* const inference_;
  const std::shared_ptr<RequestEvents> events_;
  const int choices_;
  std::vector<uint64_t> numbers_;
  int ended_ = 0;
};

absl::StatusOr<std::unique_ptr<HttpGateway>> HttpGateway::Start(HttpGatewayOptions options,
                                                                Inference* inference) {
  auto gateway = std::unique_ptr<HttpGateway>(new HttpGateway(std::move(options), inference));
  absl::StatusOr<std::unique_ptr<HttpListener>> listener = HttpListener::Start(
      gateway->options_.listener,
      {.routes = [self = gateway.get()](httplib::Server& server) { self->AddRoutes(server); },
       // The rest is answered from memory. What is behind /v1/ may wait for an engine or a store.
       .is_slow = [](std::string_view /*method*/,
                     std::string_view target) { return target.substr(0, 4) == "/v1/"; },
       .error_body = PlainErrorBody});
  if (!listener.ok()) return listener.status();
  gateway->listener_ = *std::move(listener);
  return gateway;
}

HttpGateway::~HttpGateway() = default;

void HttpGateway::Shutdown(absl::Duration limit) {
  listener_->Shutdown(absl::ToChronoMilliseconds(limit));
}

void HttpGateway::AddRoutes(httplib::Server& server) {
  using httplib::ContentReader;
  using httplib::Request;
  using httplib::Response;
  server.set_pre_routing_handler([](const Request& request, Response& response) {
    using Routed = httplib::Server::HandlerResponse;
    if (request.method == "GET" || request.method == "HEAD" || request.method == "POST")
      return Routed::Unhandled;
    response.status = 405;
    response.set_header("Allow", "GET, HEAD, POST");
    response.set_content(PlainErrorBody(405, "this method is not allowed"), kJson);
    HttpListener::Current().MustClose();
    return Routed::Handled;
  });
  server.set_default_headers({{"X-Content-Type-Options", "nosniff"}});
  for (const WebFile& file : WebFiles()) {
    server.Get(file.path, [&file](const Request&, Response& response) {
      response.set_header("Cache-Control", "no-cache");
      // Nothing but what this server itself sends may run, load or be asked.
      response.set_header("Content-Security-Policy",
                          "default-src 'none'; script-src 'self'; style-src 'self'; "
                          "connect-src 'self'; img-src data:; base-uri 'none'; "
                          "form-action 'none'; frame-ancestors 'none'");
      response.set_header("Referrer-Policy", "no-referrer");
      response.set_content(file.content.data(), file.content.size(), file.type);
    });
  }
  server.Get("/health", [this](const Request&, Response& response) {
    const absl::Status ready = inference_->Ready();
    response.status = ready.ok() ? 200 : 503;
    response.set_content(
        ready.ok() ? R"({"status":"ok"})" : PlainErrorBody(503, std::string(ready.message())),
        kJson);
  });
  server.Get("/metrics", [this](const Request&, Response& response) {
    response.set_content(inference_->MetricsText(), "text/plain; version=0.0.4; charset=utf-8");
  });
  const auto models = [this](const Request& request, Response& response) {
    Models(request, response);
  };
  server.Get("/v1/models", models);
  server.Get("/v1/models/(.+)", models);
  server.Post("/v1/completions",
              [this](const Request& request, Response& response, const ContentReader& reader) {
                Generate(OpenAiEndpoint::kCompletions, request, reader, response);
              });
  server.Post("/v1/chat/completions",
              [this](const Request& request, Response& response, const ContentReader& reader) {
                Generate(OpenAiEndpoint::kChat, request, reader, response);
              });
  // Without this httplib would read any body, of any size, before it says 404.
  server.Post(".*", [](const Request&, Response& response, const ContentReader&) {
    response.status = 404;
  });
}

void HttpGateway::Fail(const absl::Status& status, httplib::Response& response) const {
  const HttpError error = ToHttpError(status);
  response.status = error.status;
  response.set_content(error.body, kJson);
  if (error.status == 429 || error.status == 503) {
    const absl::Duration wait =
        absl::IsResourceExhausted(status) ? inference_->RetryAfter() : absl::Seconds(1);
    const int64_t ms = std::max<int64_t>(absl::ToInt64Milliseconds(wait), 1);
    response.set_header("Retry-After", absl::StrCat((ms + 999) / 1000));
    response.set_header("retry-after-ms", absl::StrCat(ms));  // what OpenAI's clients look at first
  }
}

void HttpGateway::Models(const httplib::Request& request, httplib::Response& response) const {
  const absl::StatusOr<Identity> identity =
      inference_->Authenticate(request.get_header_value("Authorization"));
  if (!identity.ok()) return Fail(identity.status(), response);
  const absl::StatusOr<v1::GetModelResponse> model = inference_->GetModel(*identity);
  if (!model.ok()) return Fail(model.status(), response);
  if (request.matches.size() < 2) {
    return response.set_content(ModelsBody(*model, UnixSeconds()), kJson);
  }
  const std::string id = request.matches[1];
  const std::string prefix = model->name() + "@";
  const auto& bases = model->knowledge_bases();
  const bool known = id == model->name() || (absl::StartsWith(id, prefix) &&
                                             std::find(bases.begin(), bases.end(),
                                                       id.substr(prefix.size())) != bases.end());
  if (!known) return Fail(NoSuchModel(id, model->name()), response);
  response.set_content(ModelBody(*model, id, UnixSeconds()), kJson);
}

absl::Status HttpGateway::Complete(const std::string& id, OpenAiRequest& request) const {
  // "MODEL@KNOWLEDGE_BASE" is for clients that can say no more than a model's name.
  const std::string served = inference_->model_name();
  const std::string prefix = served + "@";
  std::string knowledge_base;
  if (request.model != served) {
    if (!absl::StartsWith(request.model, prefix)) return NoSuchModel(request.model, served);
    knowledge_base = request.model.substr(prefix.size());
  }
  if (request.endpoint == OpenAiEndpoint::kChat) {
    absl::StatusOr<std::vector<int32_t>> ids = inference_->EncodeChat(request.messages);
    if (!ids.ok()) return ids.status();
    const absl::StatusOr<ChatStops> stops = inference_->StopsOfChat();
    if (!stops.ok()) return stops.status();
    v1::GenerateRequest& one = request.requests[0];
    one.mutable_token_ids()->mutable_ids()->Add(ids->begin(), ids->end());
    for (const std::string& text : stops->strings) one.mutable_stopping()->add_stop(text);
    one.mutable_stopping()->mutable_stop_token_ids()->Add(stops->token_ids.begin(),
                                                          stops->token_ids.end());
  }
  // Who gives no seed wants another answer each time.
  const uint64_t seed = RandomNumber();
  for (size_t i = 0; i < request.requests.size(); ++i) {
    v1::GenerateRequest& one = request.requests[i];
    one.set_request_id(i == 0 ? id : absl::StrCat(id, "-", i));
    if (!one.sampling().has_seed()) one.mutable_sampling()->set_seed(seed + i);
    if (knowledge_base.empty()) continue;
    v1::MemoryOptions& memory = *one.mutable_memory();
    if (!memory.knowledge_base().empty() && memory.knowledge_base() != knowledge_base) {
      return absl::InvalidArgumentError(
          absl::StrCat("memory.knowledge_base: '", memory.knowledge_base(),
                       "' contradicts the model '", request.model, "'"));
    }
    memory.set_knowledge_base(knowledge_base);
  }
  return absl::OkStatus();
}

void HttpGateway::Generate(OpenAiEndpoint endpoint, const httplib::Request& request,
                           const httplib::ContentReader& reader,
                           httplib::Response& response) const {
  HttpConnection& connection = HttpListener::Current();
  const AnswerHeader header = {
      .endpoint = endpoint,
      .id = absl::StrFormat("%s-%016x%08x", endpoint == OpenAiEndpoint::kChat ? "chatcmpl" : "cmpl",
                            RandomNumber(), static_cast<uint32_t>(RandomNumber())),
      .created = UnixSeconds()};
  response.set_header("X-Request-Id", header.id);
  const absl::StatusOr<Identity> identity =
      inference_->Authenticate(request.get_header_value("Authorization"));
  if (!identity.ok()) {
    connection.MustClose();  // the body stays unread
    return Fail(identity.status(), response);
  }
  std::string body;
  if (!HttpListener::ReadBody(reader, options_.listener.max_body_bytes, PlainErrorBody, &body,
                              &response)) {
    return;
  }
  if (const absl::Status ready = inference_->Ready(); !ready.ok()) return Fail(ready, response);
  absl::StatusOr<OpenAiRequest> asked = ParseOpenAiRequest(endpoint, body);
  if (!asked.ok()) return Fail(asked.status(), response);
  std::string().swap(body);
  if (const absl::Status status = Complete(header.id, *asked); !status.ok())
    return Fail(status, response);

  absl::StatusOr<std::shared_ptr<RequestEvents>> events =
      RequestEvents::Create(options_.max_unread_bytes);
  if (!events.ok()) return Fail(events.status(), response);
  const int choices = static_cast<int>(asked->requests.size());
  const auto generation = std::make_shared<Generation>(inference_, *std::move(events), choices);
  if (const absl::Status started = generation->Start(*identity, asked->requests); !started.ok())
    return Fail(started, response);
  AnswerHeader full = header;
  full.model = asked->model;
  if (asked->stream) {
    Stream(generation, std::move(full), asked->include_usage, connection, response);
  } else {
    Answer(*generation, full, connection, response);
  }
}

void HttpGateway::Answer(Generation& generation, const AnswerHeader& header,
                         HttpConnection& connection, httplib::Response& response) const {
  std::vector<v1::GenerateUnaryResponse> answers(generation.choices());
  std::vector<RequestEvents::Item> items;
  while (!generation.ended()) {
    if (generation.Wait(connection, HttpTime::max(), &items) != HttpConnection::Woken::kEvent)
      return GiveUp(connection, response);
    for (const RequestEvents::Item& item : items) {
      if (item.event) {
        AddEvent(*item.event, &answers[item.choice]);
      } else if (!item.end.ok()) {
        return Fail(item.end, response);
      }
    }
  }
  if (generation.overflown())
    return Fail(absl::InternalError("the answer is larger than is kept"), response);
  response.set_content(AnswerBody(header, answers), kJson);
}

void HttpGateway::Stream(const std::shared_ptr<Generation>& generation, AnswerHeader header,
                         bool include_usage, HttpConnection& connection,
                         httplib::Response& response) const {
  // What fails before the first event still has a status of its own.
  std::vector<RequestEvents::Item> first;
  if (generation->Wait(connection, HttpTime::max(), &first) != HttpConnection::Woken::kEvent)
    return GiveUp(connection, response);
  for (const RequestEvents::Item& item : first) {
    if (!item.event && !item.end.ok()) return Fail(item.end, response);
  }
  response.set_header("Cache-Control", "no-cache");
  response.set_header("X-Accel-Buffering", "no");  // nginx would collect events otherwise
  struct State {
    std::shared_ptr<Generation> generation;
    AnswerStream stream;
    std::vector<RequestEvents::Item> items;
  };
  const auto state = std::make_shared<State>(
      State{generation, AnswerStream(std::move(header), generation->choices(), include_usage),
            std::move(first)});
  response.set_chunked_content_provider("text/event-stream", [this, state, &connection](
                                                                 size_t, httplib::DataSink& sink) {
    Generation& generation = *state->generation;
    const auto send = [&](const std::string& text) {
      if (text.empty() || sink.write(text.data(), text.size())) return true;
      connection.MustClose();
      return false;
    };
    std::string out;
    absl::Status failed;
    for (const RequestEvents::Item& item : std::exchange(state->items, {})) {
      if (item.event) {
        out += state->stream.Event(item.choice, *item.event);
      } else if (failed.ok()) {
        failed = item.end;
      }
    }
    if (generation.overflown())
      failed = absl::ResourceExhaustedError("the client reads too slowly");
    const bool over = !failed.ok() || generation.ended();
    if (over) {
      connection.LimitWrites(HttpClock::now() + options_.read_out);
      out += failed.ok() ? state->stream.End() : AnswerStream::Error(failed);
    }
    if (!send(out)) return false;
    if (over) {
      sink.done();
      return true;
    }
    switch (generation.Wait(connection, HttpClock::now() + options_.keep_alive, &state->items)) {
      case HttpConnection::Woken::kEvent:
        return true;
      case HttpConnection::Woken::kTimeout:
        return send(": still here\n\n");
      case HttpConnection::Woken::kGone:
        connection.MustClose();
        return false;
    }
    return false;
  });
}

}  // namespace memory3
