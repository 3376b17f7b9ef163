#include "memory_server/metrics.h"

#include <prometheus/metric_family.h>

namespace memory3 {
namespace {

class StoreGauges : public prometheus::Collectable {
 public:
  explicit StoreGauges(MemoryStore* store) : store_(store) {}

  std::vector<prometheus::MetricFamily> Collect() const override {
    const StoreStatus status = store_->GetStatus();
    return {
        Gauge("memory3_knowledge_bases", "Knowledge bases", status.knowledge_bases),
        Gauge("memory3_entries", "Entries of published versions", status.entries),
        Gauge("memory3_records", "Distinct records of published versions", status.records),
        Gauge("memory3_disk_bytes", "Bytes of the store on disk", status.disk_bytes),
        Gauge("memory3_index_bytes", "Bytes of the indexes in memory", status.index_bytes),
        Gauge("memory3_writable", "1 where writes succeed", status.writable.ok() ? 1 : 0),
    };
  }

 private:
  template <typename T>
  static prometheus::MetricFamily Gauge(const char* name, const char* help, T value) {
    prometheus::ClientMetric metric;
    metric.gauge.value = static_cast<double>(value);
    return {name, help, prometheus::MetricType::Gauge, {metric}};
  }

  MemoryStore* const store_;
};

const prometheus::Histogram::BucketBoundaries kSeconds = {
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05,
    0.1,    0.25,    0.5,    1,     2.5,    5,     10,   30,    60};

}  // namespace

MemoryServerMetrics::MemoryServerMetrics(MemoryStore* store)
    : store_gauges_(std::make_shared<StoreGauges>(store)),
      requests_(prometheus::BuildCounter()
                    .Name("memory3_memory_requests_total")
                    .Help("Requests by method and canonical status code")
                    .Register(*registry_)),
      seconds_(
          prometheus::BuildHistogram()
              .Name("memory3_memory_request_seconds")
              .Help("Time taken by method; of Retrieve, from request to the answer's last message")
              .Register(*registry_)),
      queries_(prometheus::BuildCounter()
                   .Name("memory3_retrieve_queries_total")
                   .Help("Query vectors searched")
                   .Register(*registry_)
                   .Add({})),
      hits_(prometheus::BuildCounter()
                .Name("memory3_retrieve_hits_total")
                .Help("Hits answered")
                .Register(*registry_)
                .Add({})),
      held_hits_(prometheus::BuildCounter()
                     .Name("memory3_retrieve_held_hits_total")
                     .Help("Hits answered without bytes, since the client held them")
                     .Register(*registry_)
                     .Add({})),
      record_bytes_(prometheus::BuildCounter()
                        .Name("memory3_retrieve_record_bytes_total")
                        .Help("Bytes of records sent")
                        .Register(*registry_)
                        .Add({})),
      streams_(prometheus::BuildGauge()
                   .Name("memory3_retrieve_streams")
                   .Help("Open Retrieve streams")
                   .Register(*registry_)
                   .Add({})) {}

void MemoryServerMetrics::CountRequest(const std::string& method, const absl::Status& status,
                                       absl::Duration took) {
  requests_.Add({{"method", method}, {"code", absl::StatusCodeToString(status.code())}})
      .Increment();
  seconds_.Add({{"method", method}}, kSeconds).Observe(absl::ToDoubleSeconds(took));
}

void MemoryServerMetrics::CountRetrieve(uint64_t queries, uint64_t hits, uint64_t held_hits,
                                        uint64_t record_bytes) {
  queries_.Increment(static_cast<double>(queries));
  hits_.Increment(static_cast<double>(hits));
  held_hits_.Increment(static_cast<double>(held_hits));
  record_bytes_.Increment(static_cast<double>(record_bytes));
}

}  // namespace memory3
