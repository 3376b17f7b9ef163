// What the inference server tells Prometheus (docs/inference_server.md lists it).
//
// Thread-safety: all methods from any thread.
#pragma once

#include <prometheus/counter.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <string>
#include <vector>

#include "absl/time/time.h"
#include "inference_server/engine.h"
#include "inference_server/memory_reader.h"
#include "memory3/v1/inference.pb.h"

namespace memory3 {

class InferenceMetrics {
 public:
  InferenceMetrics();

  void FirstToken(absl::Duration since_request) { Observe(first_token_, since_request); }
  void NextToken(absl::Duration since_last) { Observe(inter_token_, since_last); }
  void Tokens(int count) { generated_tokens_.Increment(count); }
  // A request that ended: `outcome` is a finish reason ("stop", "length", "abort") or the canonical
  // code of its failure ("CANCELLED").
  void Ended(const std::string& outcome, absl::Duration since_request);
  void Finished(const v1::Finish& finish);
  // A request that was not taken, by the canonical code of its refusal.
  void Refused(const std::string& code);
  // What a chunk read; one that inherits counts for the chunk it inherits from.
  void ChunkRead(const v1::ChunkProvenance& chunk);
  // A retrieval, from its query's text to memories that can be read.
  void Retrieved(absl::Duration took) { Observe(retrieval_, took); }

  // The above, and gauges and counters of these parts.
  std::vector<prometheus::MetricFamily> Collect(const EngineStats& engine,
                                                const MemoryReaderStats& reader, bool ready) const;

 private:
  static void Observe(prometheus::Histogram& histogram, absl::Duration duration) {
    histogram.Observe(absl::ToDoubleSeconds(duration));
  }

  prometheus::Registry registry_;
  prometheus::Histogram &first_token_, &inter_token_, &request_, &queue_, &prefill_, &decode_;
  prometheus::Histogram &retrieval_, &memory_wait_;
  prometheus::Family<prometheus::Counter>&finished_, &refused_;
  prometheus::Counter &prompt_tokens_, &generated_tokens_;
  prometheus::Counter &queries_, &device_hits_, &host_hits_, &store_hits_, &fallbacks_;
};

}  // namespace memory3
