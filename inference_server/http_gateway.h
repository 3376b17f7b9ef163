// The HTTP door of the inference server: the OpenAI API (/v1/completions, /v1/chat/completions,
// /v1/models), /health, /metrics, and at / a page to try it. docs/http_api.md is its reference.
//
// A client that goes away ends its request within a decode step; one that does not read is given up
// after a while, with a bounded number of its bytes kept. Health, metrics and page are answered
// however many requests run.
//
// Thread-safety: Start and Shutdown from one thread. Ownership: the Inference must outlive the
// gateway, and be drained before or after it is shut down.
#pragma once

#include <chrono>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "inference_server/http_listener.h"
#include "inference_server/inference_api.h"
#include "inference_server/openai_request.h"
#include "inference_server/openai_response.h"

namespace memory3 {

struct HttpGatewayOptions {
  HttpListenerOptions listener;
  // Events of one request that its client has not read yet; more end it.
  size_t max_unread_bytes = 4 << 20;
  // A comment is sent to a stream that has been silent for so long, so that proxies keep it.
  std::chrono::milliseconds keep_alive{15'000};
  // How long a client may take to read what is left when its generation has ended.
  std::chrono::milliseconds read_out{30'000};
};

class HttpGateway {
 public:
  // Errors as HttpListener::Start. Until the Inference serves, requests are answered with 503.
  static absl::StatusOr<std::unique_ptr<HttpGateway>> Start(HttpGatewayOptions options,
                                                            Inference* inference);
  ~HttpGateway();

  int port() const { return listener_->port(); }
  // Takes no more requests, lets running ones end for up to `limit`, then cancels them.
  void Shutdown(absl::Duration limit);

 private:
  class Generation;
  HttpGateway(HttpGatewayOptions options, Inference* inference)
      : options_(std::move(options)), inference_(inference) {}

  void AddRoutes(httplib::Server& server);
  void Models(const httplib::Request& request, httplib::Response& response) const;
  void Generate(OpenAiEndpoint endpoint, const httplib::Request& request,
                const httplib::ContentReader& reader, httplib::Response& response) const;
  // Turns what was asked into requests of ours: model, conversation, seed, ids.
  absl::Status Complete(const std::string& id, OpenAiRequest& request) const;
  void Stream(const std::shared_ptr<Generation>& generation, AnswerHeader header,
              bool include_usage, HttpConnection& connection, httplib::Response& response) const;
  void Answer(Generation& generation, const AnswerHeader& header, HttpConnection& connection,
              httplib::Response& response) const;
  void Fail(const absl::Status& status, httplib::Response& response) const;

  const HttpGatewayOptions options_;
  Inference* const inference_;
  std::unique_ptr<HttpListener> listener_;
};

}  // namespace memory3
