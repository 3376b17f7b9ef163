#include "inference_server/inference_metrics.h"

#include <prometheus/metric_family.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace memory3 {
namespace {

using Buckets = prometheus::Histogram::BucketBoundaries;
const Buckets kRequestSeconds = {0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1,  2.5,
                                 5,    10,    20,   30,  60,   120, 300};
const Buckets kStepSeconds = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1,
                              0.15,  0.2,    0.3,   0.5,  1,     2.5,  5};
const Buckets kFirstTokenSeconds = {0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
                                    0.75,  1,     2.5,  5,     10,   20,  40,   80};
const Buckets kRetrievalSeconds = {0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1,
                                   0.25,   0.5,   1,      2.5,   5,    10,    30};

prometheus::Histogram& Histogram(prometheus::Registry& registry, const char* name, const char* help,
                                 const Buckets& buckets) {
  return prometheus::BuildHistogram().Name(name).Help(help).Register(registry).Add({}, buckets);
}

prometheus::Family<prometheus::Counter>& Counters(prometheus::Registry& registry, const char* name,
                                                  const char* help) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(registry);
}

prometheus::MetricFamily Value(const char* name, const char* help, prometheus::MetricType type,
                               double value) {
  prometheus::ClientMetric metric;
  (type == prometheus::MetricType::Gauge ? metric.gauge.value : metric.counter.value) = value;
  return {name, help, type, {metric}};
}

double Share(double part, double whole) { return whole > 0 ? part / whole : 0; }

double Seconds(const google::protobuf::Duration& proto) {
  return static_cast<double>(proto.seconds()) + 1e-9 * proto.nanos();
}

}  // namespace

InferenceMetrics::InferenceMetrics()
    : first_token_(Histogram(registry_, "memory3_time_to_first_token_seconds",
                             "From a request's arrival to its first token", kFirstTokenSeconds)),
      inter_token_(Histogram(registry_, "memory3_inter_token_latency_seconds",
                             "From one token of a request to its next", kStepSeconds)),
      request_(Histogram(registry_, "memory3_e2e_request_latency_seconds",
                         "From a request's arrival to its end", kRequestSeconds)),
      queue_(Histogram(registry_, "memory3_request_queue_time_seconds",
                       "How long a request waited to be admitted to the batch", kRequestSeconds)),
      prefill_(Histogram(registry_, "memory3_request_prefill_time_seconds",
                         "Of a request, without waiting for memories", kRequestSeconds)),
      decode_(Histogram(registry_, "memory3_request_decode_time_seconds",
                        "From a request's first token to its end", kRequestSeconds)),
      retrieval_(Histogram(registry_, "memory3_retrieval_seconds",
                           "From a retrieval's texts to memories that can be read",
                           kRetrievalSeconds)),
      memory_wait_(Histogram(registry_, "memory3_request_memory_wait_seconds",
                             "Per request: waited for memories and not hidden behind compute",
                             kRetrievalSeconds)),
      finished_(Counters(registry_, "memory3_request_success_total",
                         "Requests that finished, by reason; failures by their code")),
      refused_(Counters(registry_, "memory3_requests_refused_total",
                        "Requests that were not taken, by code")),
      prompt_tokens_(Counters(registry_, "memory3_prompt_tokens_total",
                              "Prompt tokens of finished requests, <s> included")
                         .Add({})),
      generated_tokens_(
          Counters(registry_, "memory3_generation_tokens_total", "Tokens generated").Add({})),
      queries_(Counters(registry_, "memory3_memory_queries_total", "Chunks that asked for memories")
                   .Add({})),
      device_hits_(
          Counters(registry_, "memory3_memory_hits_total",
                   "Memories read by chunks, by where their bytes were: device, host or store")
              .Add({{"tier", "device"}})),
      host_hits_(Counters(registry_, "memory3_memory_hits_total",
                          "Memories read by chunks, by where their bytes were: device, host or "
                          "store")
                     .Add({{"tier", "host"}})),
      store_hits_(Counters(registry_, "memory3_memory_hits_total",
                           "Memories read by chunks, by where their bytes were: device, host or "
                           "store")
                      .Add({{"tier", "store"}})),
      fallbacks_(Counters(registry_, "memory3_retrieval_fallbacks_total",
                          "Chunks that went on without all their memories")
                     .Add({})) {}

void InferenceMetrics::Ended(const std::string& outcome, absl::Duration since_request) {
  Observe(request_, since_request);
  finished_.Add({{"finished_reason", outcome}}).Increment();
}

void InferenceMetrics::Finished(const v1::Finish& finish) {
  prompt_tokens_.Increment(finish.usage().prompt_tokens());
  queue_.Observe(Seconds(finish.timings().queue()));
  prefill_.Observe(Seconds(finish.timings().prefill()));
  decode_.Observe(Seconds(finish.timings().decode()));
  memory_wait_.Observe(Seconds(finish.timings().retrieve()));
}

void InferenceMetrics::Refused(const std::string& code) {
  refused_.Add({{"code", code}}).Increment();
}

void InferenceMetrics::ChunkRead(const v1::ChunkProvenance& chunk) {
  if (chunk.inherited()) return;
  queries_.Increment();
  if (chunk.timed_out() || chunk.unavailable()) fallbacks_.Increment();
  for (const v1::ChunkProvenance::Memory& memory : chunk.memories()) {
    (memory.from() == v1::DEVICE ? device_hits_
     : memory.from() == v1::HOST ? host_hits_
                                 : store_hits_)
        .Increment();
  }
}

std::vector<prometheus::MetricFamily> InferenceMetrics::Collect(const EngineStats& engine,
                                                                const MemoryReaderStats& reader,
                                                                bool ready) const {
  using Type = prometheus::MetricType;
  std::vector<prometheus::MetricFamily> families = registry_.Collect();
  for (prometheus::MetricFamily& family : std::vector<prometheus::MetricFamily>{
           Value("memory3_ready", "1 while requests are taken", Type::Gauge, ready ? 1 : 0),
           Value("memory3_num_requests_running", "Requests in the batch", Type::Gauge,
                 engine.running),
           Value("memory3_num_requests_waiting", "Requests that wait to be in the batch",
                 Type::Gauge, engine.waiting),
           Value("memory3_kv_cache_usage_perc", "Share of the KV cache in use, 1 is all of it",
                 Type::Gauge, Share(engine.kv_pages_used, engine.kv_pages)),
           Value("memory3_memory_slots_usage_perc",
                 "Share of the device's memory slots that are being read, 1 is all of them",
                 Type::Gauge, Share(engine.memory_slots_pinned, engine.memory_slots)),
           Value("memory3_num_preemptions_total", "Sequences that gave their pages up",
                 Type::Counter, static_cast<double>(engine.preemptions)),
           Value("memory3_engine_steps_total", "Forward passes", Type::Counter,
                 static_cast<double>(engine.steps)),
           Value("memory3_retrievals_total", "Retrievals, each of all queries due together",
                 Type::Counter, static_cast<double>(reader.retrievals)),
           Value("memory3_memory_loaded_bytes_total", "Bytes of records that came from the store",
                 Type::Counter, static_cast<double>(reader.bytes_loaded)),
           Value("memory3_host_cache_bytes", "Bytes of memories in the host's cache", Type::Gauge,
                 static_cast<double>(reader.cache_bytes)),
       }) {
    families.push_back(std::move(family));
  }
  return families;
}

}  // namespace memory3
